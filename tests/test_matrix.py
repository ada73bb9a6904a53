"""The transfer matrix: command lines, statistics, tables, picture; from made-up result files and from a tiny model."""
import csv
import functools
import json
import random
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import common
import evaluate
import finetune
import tiny
import transfer_matrix

SOURCES = ["news-a", "shop", "news-a+news-b", "news-a+shop"]
TARGETS = ["news-a", "books-a", "shop"]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dataset(data, name, users=40):
    """A small prepared dataset, of the words of tests/tiny.py; each user has four positives and four negatives."""
    rng, folder = random.Random(name), Path(data, name)
    items = [f"i{n}" for n in range(30)]
    texts = [{"id": item, "text": " ".join(rng.sample(tiny.WORDS[-16:], 2))} for item in items]
    write_lines(folder / "items.jsonl", texts)
    for split, size in {"train": users, "valid": 8, "test": users}.items():
        rows = []
        for n in range(size):
            ids = rng.sample(items, 11)
            rows.append({"user": f"{split}{n}", "history": ids[:3], "candidates": ids[3:], "labels": [1, 0] * 4})
        write_lines(folder / f"{split}.jsonl", rows)
    common.write_json(folder / "meta.json", {"format": common.FORMAT, "domain": common.DOMAINS[name]})


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "evaluate_users", functools.partial(common.evaluate_users, draws=50))  # for speed
    for name in common.DEMO:
        write_dataset(tmp_path / "data", name)
    return str(tmp_path / "data")


def write_run(data, out, source, **facts):
    """A finished training without a model: what finetune.py leaves in its folder. facts: other entries of run.json."""
    names, folder = source.split("+"), Path(out, "runs", source)
    args = finetune.arguments(["--model", "m", "--data", data, "--train", *names, "--out", str(folder)])
    datasets = finetune.read_datasets(args)
    run = {"type": "prompt", "train_chain": names, "valid_chain": names, "unstable": False, "beats_base": True,
           "domains": {name: datasets[name].domain for name in names}, "job": finetune.job_of(args, datasets)}
    common.write_json(folder / "run.json", {**run, **facts})
    (folder / "adapter_model.safetensors").write_text(source)


def write_cell(data, out, source, target, skill):
    """Finished scores, positives by `skill` above negatives, and their result, as evaluate.py writes them."""
    args = evaluate.arguments(["--model", "m", "--data", data, "--test", target, "--out", f"{out}/cells/{source}"])
    if source != "zero-shot":
        args.adapter = f"{out}/runs/{source}"
    dataset = common.read_dataset(data, target)
    job, users = evaluate.job_of(args, dataset), dataset.splits["test"]
    rng, lines = np.random.default_rng(common.digest(source, target)), [{"job": job}]
    for user in users:
        scores = rng.normal(size=8) + skill * np.array(user["labels"])
        lines.append({"user": user["user"], "scores": scores.tolist(), "labels": user["labels"]})
    write_lines(evaluate.scores_path(args.out, target), lines)
    evaluate.write_result(args, dataset, users, None, job, {"samples_scored": 1, "seconds": 1})


def write_all(data, out, sources=SOURCES, targets=TARGETS, skills={}):
    """All runs and cells. skills: {source: skill}; by default 0 for zero-shot, else 1."""
    for source in ["zero-shot", *sources]:
        skill = skills.get(source, 1)
        if source == "zero-shot":
            skill = 0
        else:
            write_run(data, out, source)
        for target in targets:
            write_cell(data, out, source, target, skill)


def run_matrix(data, out, *more, sources=SOURCES, targets=TARGETS):
    argv = ["--model", "m", "--sources", *sources, "--targets", *targets, "--out", str(out), "--data", data]
    return common.run_script(transfer_matrix.main, [*argv, *more])


def read_matrix(out):
    """matrix.json, and its cells as {(source, target): cell}."""
    matrix = common.read_json(Path(out, "matrix.json"))
    return matrix, {(cell["source"], cell["target"]): cell for cell in matrix["cells"]}


def written(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("matrix.*")}

# -------------------------------------------------------------------------------------------------------- command lines


def test_dry_run_prints_runnable_lines_row_by_row(data, tmp_path, capsys):
    out = tmp_path / "a b"
    both = ["--seed", "7", "--type", "embed", "--overwrite"]
    assert run_matrix(data, out, "--dry-run", *both, "--finetune-args=--lr 0.01", "--evaluate-args", "--limit-users 9",
                      sources=[*SOURCES, "shop"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert not out.exists() and len(lines) == 9 and all(Path(line[1]).exists() for line in lines)
    trainings = [finetune.arguments(line[2:]) for line in lines if line[1].endswith("finetune.py")]
    rows = [evaluate.arguments(line[2:]) for line in lines if line[1].endswith("evaluate.py")]
    for args in trainings + rows:
        assert (args.model, args.data, args.seed, args.type, args.overwrite) == ("m", data, 7, "embed", True)
    for args, source in zip(trainings, SOURCES):
        assert (args.train, args.lr, args.out) == (source.split("+"), 0.01, f"{out}/runs/{source}")
    for args, source in zip(rows, ["zero-shot", *SOURCES]):
        assert (args.test, args.limit_users, args.out) == (TARGETS, 9, f"{out}/cells/{source}")
    assert [args.adapter for args in rows] == [None, *(args.out for args in trainings)]


def test_what_is_wrong_is_said_before_anything_runs(data, tmp_path, capsys):
    out = tmp_path / "out"

    def error(*more, **small):
        try:
            code = run_matrix(data, out, *more, **small)
        except SystemExit as stop:  # argparse
            code = stop.code
        assert code == 2 and not out.exists()
        captured = capsys.readouterr()
        assert "$ " not in captured.out
        return captured.err
    assert "--bogus" in error("--bogus") and "--bogus" in error("--evaluate-args=--bogus", "--dry-run")
    assert "--targets" in error(targets=[])
    assert "news-c" in error(sources=["news-a+news-c"]) and "all" in error(targets=["all"])
    for split, name in (("test", "books-a"), ("valid", "news-b"), ("train", "shop")):
        path = Path(data, name, f"{split}.jsonl")
        path.rename(tmp_path / "kept")
        assert f"{name} has no {split} users" in error()
        (tmp_path / "kept").rename(path)

# ------------------------------------------------------------------------------------------------------------- failures


def test_failed_and_refused_rows_are_empty_and_the_others_go_on(data, tmp_path, capsys):
    sources = ["news-a", "news-b", "books-a", "books-b", "shop"]
    write_all(data, tmp_path, sources, ["shop"])
    (tmp_path / "runs/news-a/run.json").unlink()  # to be trained, but there is no model m
    (tmp_path / "runs/news-b/adapter_model.safetensors").write_text("another")  # its cells are of an older one
    common.write_json(tmp_path / "runs/books-a/run.json", {"job": {"lr": 5}})  # another job
    result = tmp_path / "cells/books-b/shop.json"
    common.write_json(result, {"job": common.read_json(result)["job"]})  # an exception of evaluate.py
    assert run_matrix(data, tmp_path, sources=sources, targets=["shop"]) == 1
    captured = capsys.readouterr()
    assert "lr" in captured.err and "Traceback" in captured.err and "news-b/shop.json" in captured.err
    assert "cells/news-a" not in captured.out  # a failed training is not tested
    matrix, cells = read_matrix(tmp_path)
    assert matrix["failed"] == dict.fromkeys(sources[:4], 2)
    assert [source for source, _ in cells if cells[source, "shop"]["value"]] == ["zero-shot", "shop"]
    assert list(matrix["runs"]) == list(matrix["rra"]) == ["shop"] and cells["shop", "shop"]["mark"] == "better"
    assert re.findall(r"- (\S+) failed", (tmp_path / "matrix.md").read_text()) == sources[:4]
    assert (tmp_path / "matrix.svg").read_text().count(">empty<") == 4


def test_interrupt_stops_the_matrix(data, tmp_path, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "main", interrupted)
    assert run_matrix(data, tmp_path) == 130 and not written(tmp_path)

# ------------------------------------------------------------------------------------------------------------- analysis


def test_settings_values_gains_and_marks(data, tmp_path):
    write_all(data, tmp_path, skills={"shop": -1})
    assert run_matrix(data, tmp_path, "--metric", "group_auc") == 0
    matrix, cells = read_matrix(tmp_path)
    letters = [" ".join(cells[source, target]["setting"] for target in TARGETS) for source in ["zero-shot", *SOURCES]]
    assert letters == ["A/B A/B A/B", "C F F", "F F C", "E F F", "H G H"]
    for (source, target), cell in cells.items():
        result = common.read_json(tmp_path / "cells" / source / f"{target}.json")
        assert (cell["value"], cell["ci"]) == (result["group_auc"], result["ci"]["group_auc"])
        mark = {"zero-shot": "", "shop": "worse"}.get(source, "better")
        assert cell["mark"] == mark and (cell["gain"] is None) == (mark == "")
        if mark:
            assert cell["gain"]["value"] == pytest.approx(cell["value"] - cells["zero-shot", target]["value"])
    text = (tmp_path / "matrix.md").read_text()
    assert "Of 12 cells 9 are better" in text and "3 worse" in text and " 0.3 of each" in text
    assert re.search(r"\| news-a +\| C 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] better +\|", text)
    with open(tmp_path / "matrix.csv") as lines:
        rows = list(csv.DictReader(lines))
    row, gain = rows[6], cells["shop", "news-a"]["gain"]
    assert [row[key] for key in ("source", "target", "setting", "mark")] == ["shop", "news-a", "F", "worse"]
    assert [float(row[key]) for key in ("gain", "gain_low", "gain_high")] == [gain["value"], *gain["ci"]]


def test_gains_are_paired_over_users(data, tmp_path):
    """Against a bootstrap written out: the same users are drawn for both models, with a seed per target."""
    targets = ["news-a", "shop"]
    write_all(data, tmp_path, ["shop"], targets)
    assert run_matrix(data, tmp_path, "--metric", "group_auc", sources=["shop"], targets=targets) == 0
    for target in targets:
        base, trained = [evaluate.read_scores(tmp_path / "cells" / source / f"{target}.scores.jsonl")
                         for source in ("zero-shot", "shop")]
        differences = np.array([common.auc(*ours) - common.auc(*theirs) for ours, theirs in zip(trained, base)])
        rng = np.random.default_rng(common.digest(2025, target))
        means = [differences[rng.integers(40, size=40)].mean() for _ in range(1000)]
        gain = read_matrix(tmp_path)[1]["shop", target]["gain"]
        assert gain["value"] == pytest.approx(differences.mean())
        assert gain["ci"] == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_few_users_have_no_interval_and_no_mark(data, tmp_path):
    write_dataset(data, "shop", users=9)
    path = Path(data, "books-b/test.jsonl")
    users = [json.loads(line) for line in path.read_text().splitlines()]
    for user in users[:26]:
        user["labels"] = [1] * 8  # of one class: no AUC of its own
    write_lines(path, users)
    targets = ["news-a", "books-b", "shop"]
    write_all(data, tmp_path, ["news-a", "shop"], targets, {"news-a": 3})
    assert run_matrix(data, tmp_path, "--metric", "group_auc", sources=["news-a", "shop"], targets=targets) == 0
    matrix, cells = read_matrix(tmp_path)
    few, enough = cells["news-a", "shop"], cells["news-a", "books-b"]
    assert few["ci"] is None and few["gain"]["value"] > 0.2 and few["gain"]["ci"] is None and few["mark"] == ""
    assert (enough["users_counted"], enough["n_users"], enough["mark"]) == (14, 40, "better")
    assert matrix["rra"]["news-a"]["1"] == {"value": 1, "ci": None}  # where a column has no draws, there are no ranks
    text = (tmp_path / "matrix.md").read_text()
    assert "14 of 40 users" in text and "Of 4 cells" in text


def test_rank_averages_with_intervals():
    table = {"zero-shot": [9, 9, 9], "mind": [7, 5, 5], "goodreads": [6, 7, 5], "cds": [4, 6, 8], "mind+cds": [9, 9, 9]}
    draws = {}
    for source, values in table.items():
        for target, value in zip(("mind", "goodreads", "cds"), values):
            draws[source, target] = np.full(1001, float(value))
    draws["goodreads", "mind"][1:101] = 3  # in a tenth of the draws it is second on mind
    rra = transfer_matrix.rank_averages([1], draws)
    assert list(rra) == ["mind", "goodreads", "cds"]
    # on cds mind and goodreads tie, so each is first half of the time
    assert rra["mind"]["1"] == {"value": 0.25, "ci": [0.25, 0.25]}
    assert rra["goodreads"]["1"] == {"value": 0.75, "ci": [0.25, 0.75]}
    assert rra["cds"]["1"] == {"value": 0.5, "ci": [0.5, 1.0]}
    draws["goodreads", "mind"][1:101] = np.nan  # undefined draws are left out
    assert transfer_matrix.rank_averages([1], draws)["cds"]["1"]["ci"] == [0.5, 0.5]
    del draws["mind", "cds"]  # a target with an empty cell is left out
    assert transfer_matrix.rank_averages([1], draws)["goodreads"]["1"]["value"] == 1


def test_a_chain_of_trainings_and_its_warnings(data, tmp_path):
    write_all(data, tmp_path, ["news-a"])
    write_run(data, tmp_path, "news-a", train_chain=["mine", "news-a"], domains={"mine": "sport", "news-a": "news"},
              unstable=True, beats_base=False, valid_chain=["news-a", "shop"])
    path = tmp_path / "cells/zero-shot/shop.json"
    common.write_json(path, {**common.read_json(path), "collapsed": True})
    assert run_matrix(data, tmp_path, sources=["news-a"]) == 0
    cells = read_matrix(tmp_path)[1]
    assert [cells["news-a", target]["setting"] for target in TARGETS] == ["H", "G", "G"]
    text = (tmp_path / "matrix.md").read_text()
    assert "news-a was unstable" in text and "news-a never beat its start" in text
    assert re.findall(r"labels of (\S+) chose", text) == ["shop"]
    assert re.findall(r"collapse on (\S+):", text) == ["shop"]

# ------------------------------------------------------------------------------------------------- comparison, picture


def made_up_matrix(targets, rows, metric="auc", **changes):
    """A matrix of values, rows: {source: (a value per target)}, with gains over 0.5 and no intervals."""
    cells = []
    domains = {name: common.DOMAINS.get(name, "own") for name in [*targets, *"+".join(rows).split("+")]}
    for source, values in rows.items():
        train = source.split("+") if source != "zero-shot" else []
        for target, value in zip(targets, values):
            cell = {"source": source, "target": target, "value": value, "gain": None, "mark": "", "n_users": 9,
                    "users_counted": 9, "collapsed": False, "data_sha256": "0", "split": "test", "history": "own"}
            cell["setting"] = common.setting_of(train, target, domains)
            cells.append({**cell, **changes})
    return {"model": "m", "type": "prompt", "metric": metric, "targets": targets, "cells": cells, "domains": domains,
            "runs": {}, "failed": {}}


def test_compare_models_by_setting(tmp_path, capsys):
    def write(name, rows, **changes):
        common.write_json(tmp_path / name / "matrix.json", made_up_matrix(["news-a", "books-a"], rows, **changes))

    def compare(*names):
        folders = [str(tmp_path / name) for name in names]
        assert common.run_script(transfer_matrix.main, ["--compare", *folders]) == 0
        return [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    write("small", {"zero-shot": (0.50, 0.52), "shop": (0.40, 0.50), "news-b": (0.7, 0.6), "news-a+shop": (0.70, 0.60)})
    write("large", {"zero-shot": (0.60, 0.62), "shop": (0.50, 0.50), "news-b": (0.8, 0.8), "news-a+shop": (0.90, None)})
    head, _, *rows = compare("small", "large")
    # G on books-a is empty in one of them
    assert head[1:] == ["A/B (targets: 2)", "D (targets: 1)", "F (targets: 2)", "H (targets: 1)"]
    # F on books-a is first the mean of shop and news-b: (0.40 + 0.55) / 2, (0.50 + 0.65) / 2
    assert rows[0] == [f"m, prompt ({tmp_path}/small)", "0.510", "0.700", "0.475", "0.700"]
    assert rows[1] == [f"m, prompt ({tmp_path}/large)", "0.610", "0.800", "0.575", "0.900"]
    for change in ({"data_sha256": "1"}, {"history": "other"}, {"metric": "mrr"}):
        write("other", {"zero-shot": (0.5, 0.5)}, **change)
        assert "0 cells" in compare("small", "other")[0][0]


def test_svg_is_valid_and_nothing_overlaps_or_sticks_out():
    odd = ['"a" & <b>', "an-own-dataset-with-a-long-name", "another_own_dataset_with_a_long_name", "x" * 40]
    sources, targets = ["+".join(common.DATASETS), "+".join(odd[1:]), odd[0]], [*odd, *common.DATASETS]
    values = np.random.default_rng(0).random((4, 19))
    matrix = made_up_matrix(targets, dict(zip(["zero-shot", *sources], values)))
    matrix["model"] = "/a/folder/" + "deep/" * 30
    for cell in matrix["cells"][19:]:
        cell["gain"], cell["mark"] = {"value": cell["value"] - 0.5, "ci": None}, "better"
    root = ElementTree.fromstring(transfer_matrix.draw_svg(matrix))
    lines, texts, left_column = {}, [], []  # {y: [left and right edges]}
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = [float(element.get(key)) for key in ("x", "y", "font-size")]
        wide = 0.62 * size * len(element.text)
        left = x - {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")] * wide
        assert 0 <= left and left + wide <= float(root.get("width")) and size < y <= float(root.get("height"))
        lines.setdefault(y, []).append((left, left + wide))
        texts.append(element.text)
        if element.get("text-anchor") == "end":
            left_column.append(y)
    assert (np.diff(left_column) >= size).all()
    for edges in lines.values():
        assert (np.diff(np.ravel(sorted(edges))) >= 0).all()
    for name in [*targets, *sources]:
        assert name.replace(" ", "") in "".join(texts).replace(" ", "")
    _, *grounds = root.iter("{http://www.w3.org/2000/svg}rect")
    for cell, ground in zip(matrix["cells"], grounds):
        assert f"{cell['setting']} {cell['mark']}".strip() in texts and f"{cell['value']:.3f}" in texts
        if cell["gain"]:
            assert f"{cell['value'] - 0.5:+.3f}" in texts
            assert ground.get("fill") == (transfer_matrix.BLUE if cell["value"] > 0.5 else transfer_matrix.ORANGE)

# ------------------------------------------------------------------------------------------------------------ for real


def test_a_tiny_model_from_training_to_picture(data, tmp_path):
    out = tmp_path / "out"
    small = {"sources": ["shop", "news-a+shop"], "targets": ["shop", "books-a"]}
    more = ["--model", tiny.build("llama", tmp_path / "model"), "--device", "cpu", "--evaluate-args=--limit-users 30",
            "--finetune-args=--epochs 1 --lora-r 4"]
    assert run_matrix(data, out, *more, **small) == 0
    first = written(out)
    assert sorted(first) == ["matrix.csv", "matrix.json", "matrix.md", "matrix.svg"]
    matrix, cells = read_matrix(out)
    assert cells["shop", "books-a"]["n_users"] == 30 and matrix["runs"]["shop"]["samples"] == 320

    path = out / "cells/zero-shot/books-a.scores.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"test7"', b'"somebody"'))  # scores of other users: this cell fails
    (out / "cells/zero-shot/books-a.json").unlink()
    assert run_matrix(data, out, *more, **small) == 1
    matrix, cells = read_matrix(out)
    assert matrix["failed"] == {"zero-shot": 1}
    assert [key for key in cells if cells[key]["value"] is None] == [("zero-shot", "books-a")]
    assert [key for key in cells if cells[key]["gain"]] == [("shop", "shop"), ("news-a+shop", "shop")]
    path.write_bytes(kept)
    adapter = out / "runs/shop/adapter_model.safetensors"
    trained = adapter.stat().st_mtime_ns
    assert run_matrix(data, out, *more, **small) == 0 and written(out) == first
    assert adapter.stat().st_mtime_ns == trained
