"""The transfer matrix: command lines, statistics, tables, picture; from made-up scores and from a tiny model."""
import csv
import json
import random
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny

import common
import evaluate
import finetune
import transfer_matrix

NAMES = list(common.DEMO)
SOURCES = ["news-a", "shop", "news-b", "news-a+news-b", "news-a+books-a+shop"]
TARGETS = ["news-a", "books-a", "shop", "news-b"]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dataset(data, name, users=24):
    """A small prepared dataset in the standard format, of the words of tests/tiny.py."""
    rng, folder = random.Random(name), Path(data, name)
    words = rng.sample(tiny.WORDS[-16:], 8)
    items = {f"i{n}": " ".join(rng.sample(words, 2)) for n in range(30)}
    write_lines(folder / "items.jsonl", [{"id": key, "text": text} for key, text in items.items()])
    for split, size in {"train": users, "valid": 8, "test": users}.items():
        lines = []
        for n in range(size):
            ids = rng.sample(list(items), 11)
            lines.append({"user": f"{split}{n}", "history": ids[:3], "candidates": ids[3:], "labels": [1, 0] * 4})
        write_lines(folder / f"{split}.jsonl", lines)
    common.write_json(folder / "meta.json", {"format": common.FORMAT, "domain": common.DOMAINS[name]})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in NAMES:
        write_dataset(folder, name, users=40)
    return str(folder)


class Fakes:
    """Stand-ins for finetune.main and evaluate.main: they write what those would write, of made-up scores.

    skill(source, target): how far positives stand above negatives. broken: {(source, target): an error to raise}.
    """

    def __init__(self, monkeypatch, skill=lambda source, target: 1.0, **run):
        self.calls, self.skill, self.broken, self.run = [], skill, {}, run
        monkeypatch.setattr(finetune, "main", self.finetune)
        monkeypatch.setattr(evaluate, "main", self.evaluate)
        monkeypatch.setattr(common.evaluate_users, "__defaults__", (20, 0))  # draws of the cells' own intervals
        monkeypatch.setattr(transfer_matrix, "similarity", lambda args, matrix: {"pairs": [], "rank_correlation": None})

    def happen(self, *call):
        self.calls.append(call)
        if call in self.broken:
            raise self.broken[call]

    def finetune(self, argv):
        args = finetune.arguments(argv)
        self.happen("finetune", "+".join(args.train))
        run = {"train_chain": args.train, "valid_chain": args.valid, "steps": 30, "samples": 960, "seconds": 1.0,
               "unstable": False, "beats_base": True, "job": finetune.job_of(args), "model": "m", "type": args.type,
               "domains": {name: common.DOMAINS[name] for name in args.train}, "arguments": vars(args)}
        common.write_json(Path(args.out, "run.json"), {**run, **self.run})

    def evaluate(self, argv):
        args = evaluate.arguments(argv)
        source, target = Path(args.out).name, args.test[0]
        self.happen(source, target)
        users, items = common.read_users(args.data, target, "test", args.limit_users)
        rng, job = np.random.default_rng(common.digest(source, target)), evaluate.job_of(args, target)
        lines = [{"job": job}]
        for user in users:
            scores = rng.normal(size=8) + self.skill(source, target) * np.array(user["labels"])
            lines.append({"user": user["user"], "scores": scores.tolist()})
        write_lines(evaluate.scores_path(args.out, target), lines)
        cost = {"samples": 8, "seconds": 1.0, "tokens_scored": 1, "tokens_unpacked": 1}
        evaluate.finish(args, target, users, items, None, job, cost)


def run_matrix(data, out, *more, sources=SOURCES, targets=TARGETS):
    argv = ["--model", "m", "--sources", *sources, "--targets", *targets, "--out", str(out), "--data", str(data), *more]
    return common.run(transfer_matrix.main, argv)


def read_matrix(out):
    """The matrix in a folder and its cells, {source: {target: cell}}."""
    matrix = common.read_json(Path(out, "matrix.json"))
    return matrix, {row["source"]: row["cells"] for row in matrix["rows"]}


# --------------------------------------------------------------------------------------------------------- command lines


def test_dry_run_prints_one_runnable_line_for_each_missing_training_and_cell(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    assert run_matrix(data, tmp_path / "a b", "--dry-run", "--seed", "7", "--type", "embed", "--overwrite",
                      "--finetune-args=--lr 0.01", "--evaluate-args", "--limit-users 9") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line[1]).name for line in lines] == ["finetune.py"] * 5 + ["evaluate.py"] * 24 and not fakes.calls
    trainings = [finetune.arguments(line[2:]) for line in lines[:5]]
    cells = [evaluate.arguments(line[2:]) for line in lines[5:]]
    assert ["+".join(args.train) for args in trainings] == SOURCES
    for args in trainings + cells:
        assert (args.seed, args.type, args.data, args.overwrite, args.max_tokens) == (7, "embed", data, True, None)
    assert all(args.lr == 0.01 for args in trainings) and all(args.limit_users == 9 for args in cells)
    assert [args.adapter for args in cells[:4]] == [None] * 4 and cells[4].adapter == trainings[0].out
    assert cells[4].out == str(tmp_path / "a b" / "cells" / "news-a") and cells[4].test == ["news-a"]


def test_what_is_there_is_not_run_again(data, tmp_path, monkeypatch, capsys):
    fakes, small = Fakes(monkeypatch), {"sources": ["news-a", "shop"], "targets": ["shop"]}
    assert run_matrix(data, tmp_path, sources=["news-a"], targets=["shop"]) == 0
    assert len(fakes.calls) == 3
    capsys.readouterr()
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0
    missing = capsys.readouterr().out.splitlines()
    assert len(missing) == 2 and "/runs/shop" in missing[0] and "/cells/shop" in missing[1]
    assert run_matrix(data, tmp_path, **small) == 0
    assert [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")] == missing
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0 and not capsys.readouterr().out
    assert run_matrix(data, tmp_path, **small) == 0 and len(fakes.calls) == 5


def test_what_is_wrong_or_in_the_way_is_said_before_anything_runs(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)

    def error(*more, data=data, **small):
        capsys.readouterr()
        assert run_matrix(data, tmp_path / "out", *more, **small) == 2
        return capsys.readouterr().err
    assert "No closing quotation" in error("--finetune-args=--lr '1e-3")
    assert "--bogus" in error("--evaluate-args=--bogus") and "--bogus" in error("--finetune-args=--bogus", "--dry-run")
    shutil.copytree(data, tmp_path / "data")
    for split, name in (("test", "books-a"), ("valid", "news-b"), ("train", "shop")):
        (tmp_path / "data" / name / f"{split}.jsonl").unlink()
        assert f"{name} has no {split} split" in error(data=tmp_path / "data")
        shutil.copyfile(Path(data, name, f"{split}.jsonl"), tmp_path / "data" / name / f"{split}.jsonl")
    assert not fakes.calls and not (tmp_path / "out").exists()
    assert run_matrix(data, tmp_path / "out", sources=["shop"], targets=["shop"]) == 0
    calls = len(fakes.calls)
    assert "runs/shop was made with other lr" in error("--finetune-args=--lr 1", sources=["shop"], targets=["shop"])
    assert "made with other limit_users" in error("--evaluate-args=--limit-users 3", sources=["shop"], targets=["shop"])
    assert len(fakes.calls) == calls


def test_failures_leave_cells_empty_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("finetune", "shop"): common.UserError("the loss is nan"),
                    ("news-a", "books-a"): RuntimeError("out of memory")}
    assert run_matrix(data, tmp_path) == 1
    err = capsys.readouterr().err
    assert "error: the loss is nan" in err and "error: RuntimeError: out of memory" in err
    assert err.count("failed, left empty:") == 2 and ("shop", "news-a") not in fakes.calls
    matrix, cells = read_matrix(tmp_path)
    assert cells["shop"] == {"mean": {}} and "books-a" not in cells["news-a"] and cells["news-a"]["mean"] == {}
    assert len(cells["news-b"]) == len(cells["news-a+news-b"]) == 5
    assert matrix["failed"] == ["news-a on books-a", "training on shop"]
    assert "Failed: news-a on books-a, training on shop." in Path(tmp_path, "matrix.md").read_text()
    assert Path(tmp_path, "matrix.svg").read_text().count("stroke-dasharray") == 7  # two, and a row of five
    assert matrix["rra"]["1"]["shop"] == [None, None] and matrix["rra"]["1"]["news-b"][0] in (0, 1)  # on shop alone
    fakes.broken = {}
    assert run_matrix(data, tmp_path) == 0
    assert all(len(row) == 5 and row["mean"] for row in read_matrix(tmp_path)[1].values())


def test_interrupt_stops_the_matrix(data, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("finetune", "news-b"): KeyboardInterrupt()}
    with pytest.raises(SystemExit, match="130"):
        run_matrix(data, tmp_path)
    assert fakes.calls[-1] == ("finetune", "news-b") and not Path(tmp_path, "matrix.json").exists()


@pytest.mark.parametrize("change, message", [
    (["--model", "itemknn"], "fine-tuned"), (["--k", "0"], "--k"), (["--metric", "logloss"], "--metric"),
    (["--sources", "news-c"], "unknown dataset 'news-c'"), (["--sources", "news-a+"], "unknown dataset ''"),
    (["--targets", "news-c"], "unknown dataset 'news-c'")])
def test_wrong_arguments_are_one_line(change, message, data, tmp_path, capsys):
    assert run_matrix(data, tmp_path, *change) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- numbers


def test_rows_columns_settings_and_numbers(data, tmp_path, monkeypatch):
    def skill(source, target):
        if source == "zero-shot":
            return 0
        return 3 if target in source else -1 if source == "shop" else 0.3
    Fakes(monkeypatch, skill)
    assert run_matrix(data, tmp_path, "--metric", "group_auc") == 0
    matrix, cells = read_matrix(tmp_path)
    assert matrix["targets"] == TARGETS
    letters = {source: [row[target]["setting"] for target in TARGETS] for source, row in cells.items()}
    assert letters == {"zero-shot": ["A/B"] * 4, "news-a": list("CFFD"), "shop": list("FFCF"), "news-b": list("DFFC"),
                       "news-a+news-b": list("EFFE"), "news-a+books-a+shop": list("HHHG")}
    for source, row in cells.items():
        for target in TARGETS:
            result = common.read_json(tmp_path / "cells" / source / f"{target}.json")
            assert (row[target]["value"], row[target]["ci"]) == (result["group_auc"], result["ci"]["group_auc"])
            gain = row[target]["value"] - cells["zero-shot"][target]["value"]
            assert row[target]["gain"] == (None if source == "zero-shot" else pytest.approx(gain))
        assert row["mean"]["value"] == pytest.approx(np.mean([row[target]["value"] for target in TARGETS]))
    assert cells["shop"]["shop"]["mark"] == "better" and cells["shop"]["news-a"]["mark"] == "worse"


def test_marks_notes_and_spreadsheet(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else -1 if source == "shop" else 1)
    assert run_matrix(data, tmp_path) == 0
    matrix, cells = read_matrix(tmp_path)
    marks = [row[target]["mark"] for source, row in cells.items() for target in TARGETS if source != "zero-shot"]
    better, worse = marks.count("better"), marks.count("worse")
    assert matrix["marks"] == {"compared": 20, "better": better, "worse": worse, "by_chance": 1.0}
    assert better >= 14 and worse >= 3
    written = (tmp_path / "matrix.md").read_text()
    assert f"Of 20 cells {better} are ▲ and {worse} ▼; if nothing differed, chance alone would mark 1.0 (5%)." in written
    assert "not the luck of a training run" in written and "says nothing of harm" in written
    rows = list(csv.DictReader((tmp_path / "matrix.csv").open()))
    assert len(rows) == 6 * 4
    for row in rows:
        cell = cells[row["source"]][row["target"]]
        assert float(row["auc"]) == cell["value"] and float(row["high"]) == cell["ci"][1]
        assert row["gain_low"] == ("" if cell["gain"] is None else str(cell["gain_ci"][0]))


def test_differences_are_paired_over_users(data, tmp_path, monkeypatch):
    """The interval of the gain is that of resampled users, by hand; draws are those of one seed per target."""
    Fakes(monkeypatch, lambda source, target: 0.2 if source == "zero-shot" else 0.5)
    assert run_matrix(data, tmp_path, "--metric", "group_auc", sources=["shop"], targets=["news-a"]) == 0
    labels, per_user = np.array([1, 0] * 4), []
    for source in ("shop", "zero-shot"):
        lines = [json.loads(line) for line in (tmp_path / "cells" / source / "news-a.scores.jsonl").open()][1:]
        per_user.append([common.auc(np.array(line["scores"]), labels) for line in lines])
    gains = np.subtract(*per_user)
    rng = np.random.default_rng(common.digest(2025, "news-a"))
    draws = [gains[rng.integers(40, size=40)].mean() for _ in range(1000)]
    cell = read_matrix(tmp_path)[1]["shop"]["news-a"]
    assert cell["gain"] == pytest.approx(gains.mean()) and cell["gain_ci"] == pytest.approx(common.interval(np.array(draws)))


def test_rra_of_its_own_numbers_with_intervals(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: len(source) / 10)
    assert run_matrix(data, tmp_path, "--k", "1", "2") == 0
    matrix, cells = read_matrix(tmp_path)
    assert matrix["rra"].keys() == {"1", "2"} and matrix["rra"]["2"].keys() == {"news-a", "news-b", "shop"}
    for k in (1, 2):
        terms = []
        for target in ("news-b", "books-a", "shop"):
            value = cells["news-a"][target]["value"]
            above = sum(cells[other][target]["value"] > value for other in ("news-b", "shop") if other != target)
            terms.append(1 / (above + 1) if above < k else 0)
        value, (low, high) = matrix["rra"][str(k)]["news-a"]
        assert value == pytest.approx(np.mean(terms)) and 0 <= low <= value <= high <= 1 and low < high


def test_h_minus_g(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 2.0 if target in source else 0.5)
    sources = ["news-a+books-a", "news-b+books-a", "shop"]
    assert run_matrix(data, tmp_path, sources=sources) == 0
    matrix, cells = read_matrix(tmp_path)
    joint = matrix["joint_gain"]
    assert joint["targets"] == ["news-a", "news-b"]  # books-a has no G, shop no H
    gains = [cells["news-a+books-a"]["news-a"]["value"] - cells["news-b+books-a"]["news-a"]["value"],
             cells["news-b+books-a"]["news-b"]["value"] - cells["news-a+books-a"]["news-b"]["value"]]
    assert joint["value"] == pytest.approx(np.mean(gains)) and 0 < joint["ci"][0] < joint["value"] < joint["ci"][1]
    assert "mean over news-a, news-b: +0." in (tmp_path / "matrix.md").read_text()
    assert run_matrix(data, tmp_path / "none", sources=["shop"]) == 0
    assert "no target has cells of both" in (tmp_path / "none/matrix.md").read_text()


def test_warnings_about_trainings(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0.0, unstable=True, beats_base=False, valid_chain=["books-b"])
    assert run_matrix(data, tmp_path, sources=["shop"], targets=["news-a"]) == 0
    written = (tmp_path / "matrix.md").read_text()
    for warning in ("Unstable training: shop.", "Validated on other sets: shop.",
                    "Never better than the base model on validation users: shop."):
        assert warning in written


def test_rank_correlation_by_hand():
    def rho(a, b):
        return transfer_matrix.rank_correlation(np.array(a, float), np.array(b, float))
    assert rho([1, 2, 3], [5, 6, 7]) == pytest.approx(1) and rho([1, 2, 30], [7, 6, 5]) == pytest.approx(-1)
    intelligence = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]  # Wikipedia's example
    television = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert rho(intelligence, television) == pytest.approx(-29 / 165)
    assert rho([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4
    assert rho([1, 1, 1], [1, 2, 3]) is None and rho([1, 2], [1, 2]) is None and rho([], []) is None


# --------------------------------------------------------------------------------------------------------------- picture

NASTY = 'a "<b>&\'\x07 '


def test_svg_is_valid_whatever_the_names(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else 1 if target in source else -1)
    assert run_matrix(data, tmp_path) == 0
    matrix = read_matrix(tmp_path)[0]
    nasty = json.loads(json.dumps({**matrix, "model": NASTY}).replace('"shop', '"' + json.dumps(NASTY)[1:-1]))
    for one in (matrix, nasty):
        root = ElementTree.fromstring(transfer_matrix.draw_svg(one))
        elements = [element for element in root.iter() if element.tag.endswith("text")]
        texts = [element.text or "" for element in elements]
        assert {"mean", "news", "book"} <= set(texts)
        assert texts.count("C") == texts.count("H") == 3
        cells = [cell for row in one["rows"] for cell in row["cells"].values()]
        assert {f"{cell['value']:.3f}" for cell in cells} <= set(texts)
        for sign, mark in (("▲", "better"), ("▼", "worse")):
            assert texts.count(sign) == sum(cell["mark"] == mark for cell in cells) > 0
        for element in elements:
            assert 0 <= float(element.get("x")) <= float(root.get("width"))
            assert 0 <= float(element.get("y")) <= float(root.get("height"))
    assert NASTY.replace("\x07", "?").strip() in " ".join(texts)


# --------------------------------------------------------------------------------------------------------------- compare


def compared(folders, capsys):
    """Exit code and the table's rows of --compare."""
    capsys.readouterr()
    code = common.run(transfer_matrix.main, ["--compare", *map(str, folders)])
    out = capsys.readouterr().out
    return code, [[word.strip() for word in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]


def test_compare_models_by_setting(data, tmp_path, monkeypatch, capsys):
    means = {}
    for name, strength in (("small", 0.5), ("large", 2.0)):
        Fakes(monkeypatch, lambda source, target: strength)
        assert run_matrix(data, tmp_path / name) == 0
        cells = read_matrix(tmp_path / name)[1]
        means[name] = np.mean([cell["value"] for row in cells.values() for t, cell in row.items()
                               if t != "mean" and cell["setting"] == "F"])
    code, rows = compared([tmp_path / "small", tmp_path / "large"], capsys)
    assert code == 0 and rows[0] == ["auc", "A/B", "C", "D", "E", "F", "G", "H", "H - G"]
    for name, row in zip(means, rows[2:]):
        assert row[0] == f"m, prompt ({tmp_path / name})" and row[5] == f"{means[name]:.3f} (9)"
    assert means["large"] > means["small"] + 0.1


def test_matrices_of_other_metrics_or_users_are_not_compared(data, tmp_path, monkeypatch, capsys):
    Fakes(monkeypatch)
    small = {"sources": ["shop"], "targets": ["shop"]}
    assert run_matrix(data, tmp_path / "auc", **small) == run_matrix(data, tmp_path / "mrr", "--metric", "mrr", **small) == 0
    assert run_matrix(data, tmp_path / "few", "--evaluate-args=--limit-users 9", **small) == 0
    for other in ("mrr", "few"):
        code, _ = compared([tmp_path / "auc", tmp_path / other], capsys)
        assert code == 2


# -------------------------------------------------------------------------------------------------------- with a model


def test_a_tiny_model_from_training_to_picture(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["--model", tiny.build("llama", tmp_path / "model"), "--sources", "shop", "news-a+shop", "--targets", "shop",
            "books-a", "news-b", "news-a", "--out", str(out), "--data", data, "--device", "cpu",
            "--finetune-args=--epochs 1 --lora-r 4 --lr 0.01", "--evaluate-args=--limit-users 30"]
    assert common.run(transfer_matrix.main, argv) == 0
    first = {path.name: path.read_bytes() for path in out.glob("matrix.*")}
    matrix, cells = read_matrix(out)
    assert sorted(first) == ["matrix.csv", "matrix.json", "matrix.md", "matrix.svg"]
    assert cells["shop"]["books-a"]["n_users"] == 30 and matrix["rows"][1]["training"]["samples"] == 320
    pairs = matrix["similarity"]["pairs"]
    assert {(pair["source"], pair["target"]) for pair in pairs} == {("shop", t) for t in ("books-a", "news-b", "news-a")}
    assert all(-1 < pair["cosine"] < 1 for pair in pairs) and -1 <= matrix["similarity"]["rank_correlation"] <= 1
    capsys.readouterr()
    monkeypatch.setattr(finetune, "main", None)
    monkeypatch.setattr(evaluate, "main", None)
    assert common.run(transfer_matrix.main, argv) == 0 and "$ " not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first
    assert common.run(transfer_matrix.main, [*argv, "--seed", "1"]) == 2  # other arguments: nothing is run or replaced
    assert "made with other seed" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first
