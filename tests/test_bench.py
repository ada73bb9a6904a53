"""bench.py runs on a tiny shape and prints its cases."""
import argparse
import json

import bench

KEYS = {"batched", "packed", "packed_over_one", "max_abs_diff", "tokens_unpacked", "tokens_packed", "matmul_share"}


def test_the_benchmark_prints_every_case_and_its_ways_agree(capsys):
    bench.main("--shape tiny --users 4 --history 3 --candidates 9 --sweep 2 4 --rounds 1".split())
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [case["case"] for case in cases] == ["score", "candidates", "candidates", "embed", "train",
                                              "train_all"]
    assert [case.get("candidates") for case in cases[:3]] == [None, 2, 4]
    assert cases.pop()["packed"] > 0
    for case in cases:
        assert KEYS <= set(case) and case["packed"] > 0 and case["max_abs_diff"] < 1e-5
        assert case["tokens_packed"] < case["tokens_unpacked"] and case["batched"] > 0 < case["matmul_share"]
        if case["packed_over_one"]:
            assert case["packed_over_one"] == case["packed"] / case["one_at_a_time"]


def test_operations_are_counted_by_hand():
    """Two layers of width 32: 4 x 32 x 32 weights for attention and 3 x 32 x 48 for the rest."""
    args = argparse.Namespace(shape="tiny", device="cpu", dtype="float32", max_tokens=None)
    scorer, _ = bench.build(args)
    rows = [bench.common.Row([1, 2], [[3], [4, 5]], [0, 1])]  # sees: 1 + 2 in the prefix, 3, 3 + 4
    layer, pairs = 4 * 32 * 32 + 3 * 32 * 48, 1 + 2 + 3 + 3 + 4
    assert bench.operations(scorer.model, rows) == 2 * 2 * layer * 5 + 2 * 4 * 32 * pairs
