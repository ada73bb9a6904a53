"""bench.py runs on a tiny shape and prints its cases."""
import argparse
import json

import bench
import pytest

KEYS = {"batched", "shared", "shared_over_one", "max_abs_diff", "tokens_unshared", "tokens_scored", "matmul_share"}


def test_the_benchmark_prints_every_case_and_its_ways_agree(capsys):
    bench.main("--shape tiny --users 4 --history 3 --candidates 9 --sweep 2 4 --rounds 1".split())
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [case["case"] for case in cases] == ["score", "candidates", "candidates", "embed", "train",
                                              "train_all"]
    assert [case.get("candidates") for case in cases[:3]] == [None, 2, 4]
    assert cases.pop()["shared"] > 0
    for case in cases:
        assert KEYS <= set(case) and case["shared"] > 0 and case["max_abs_diff"] < 1e-5
        assert case["tokens_scored"] < case["tokens_unshared"] and case["batched"] > 0 < case["matmul_share"]
        if case["shared_over_one"]:
            assert case["shared_over_one"] == case["shared"] / case["one_at_a_time"]


@pytest.mark.parametrize("shape, layout", [("gemma3", "packed"), ("hybrid", "cached")])
def test_windows_and_states_are_shared_and_change_nothing(monkeypatch, capsys, shape, layout):
    config_class, sizes = bench.SHAPES[shape]
    small = dict(sizes, hidden_size=64, intermediate_size=96, vocab_size=500)
    monkeypatch.setitem(bench.SHAPES, shape, (config_class, small))
    bench.main(f"--shape {shape} --only score --users 2 --history 9 --rounds 1".split())
    case = json.loads(capsys.readouterr().out)
    assert case["layout"] == layout and case["max_abs_diff"] < 1e-5 and case["tokens_scored"] < case["tokens_unshared"]


def test_operations_are_counted_by_hand():
    """Two layers of width 32: 4 x 32 x 32 weights for attention and 3 x 32 x 48 for the rest."""
    args = argparse.Namespace(shape="tiny", device="cpu", dtype="float32", max_tokens=None)
    scorer, _ = bench.build(args)
    rows = [bench.common.Row([1, 2], [[3], [4, 5]], [0, 1])]  # sees: 1 + 2 in the prefix, 3, 3 + 4
    layer, pairs = 4 * 32 * 32 + 3 * 32 * 48, 1 + 2 + 3 + 3 + 4
    assert bench.operations(scorer.model, rows) == 2 * 2 * layer * 5 + 2 * 4 * 32 * pairs
