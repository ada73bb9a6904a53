"""The transfer matrix: command lines, statistics, tables, picture; from canned results and from a tiny model."""
import csv
import json
import random
import re
import shlex
import shutil
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import common
import evaluate
import finetune
import tiny
import transfer_matrix

NAMES, finetune_main = list(common.DEMO), finetune.main


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dataset(data, name, users=24):
    """A small prepared dataset in the standard format, of the words of tests/tiny.py."""
    rng, folder = random.Random(name), Path(data, name)
    folder.mkdir(parents=True)
    words = rng.sample(tiny.WORDS[-16:], 8)
    items = {f"i{n}": " ".join(rng.sample(words, 2)) for n in range(30)}
    write_lines(folder / "items.jsonl", [{"id": key, "text": text} for key, text in items.items()])
    splits = {}
    for split, size in {"train": users, "valid": 8, "test": users}.items():
        drawn = [rng.sample(list(items), 11) for _ in range(size)]
        write_lines(folder / f"{split}.jsonl", [
            {"user": f"{split}{n}", "history": ids[:3], "candidates": ids[3:], "labels": [1, 0] * 4}
            for n, ids in enumerate(drawn)])
        splits[split] = {"users": size, "samples": 8 * size, "positives": 4 * size}
    common.write_json(folder / "meta.json", {"format": common.FORMAT, "sha256": f"sha of {name}", "splits": splits,
                                             "domain": common.dataset(name).domain})


def write_cell(out, source, target, data, skill):
    """What evaluate.py would write of a cell, from made-up scores: skill is how far positives stand above negatives."""
    rng, folder = np.random.default_rng(common.digest(source, target)), Path(out, "cells", source)
    folder.mkdir(parents=True, exist_ok=True)
    users = list(common.read_users(data, target, "test"))
    labels = np.concatenate([user["labels"] for user in users])
    scores = rng.normal(size=len(labels)) + skill * labels
    write_lines(folder / f"{target}.scores.jsonl", [
        {"user": user["user"], "scores": part.tolist()} for user, part in zip(users, np.split(scores, len(users)))])
    result = common.evaluate_scores(scores, labels, np.repeat(np.arange(len(users)), 8), draws=100)
    common.write_json(folder / f"{target}.json", {
        **result, "split": "test", "n_users": len(users), "n_samples": len(labels), "collapsed": skill == 0,
        "data_sha256": "x"})


def write_run(out, source, **more):
    """What finetune.py would write of a training."""
    curve = [{"step": 10, "mean": 0.6}, {"step": 20, "mean": 0.7}]
    common.write_json(Path(out, "runs", source, "run.json"), {
        "train_chain": source.split("+"), "valid_chain": source.split("+"), "steps": 30, "samples": 960, "best": curve[1],
        "curve": curve, "unstable": False, "finished": True, **more})


class Fakes:
    """Stand-ins for finetune.main and evaluate.main that write canned results and list what they were given."""

    def __init__(self, monkeypatch, skill=lambda source, target: 1.0):
        self.calls, self.skill, self.broken = [], skill, {}
        monkeypatch.setattr(finetune, "main", self.finetune)
        monkeypatch.setattr(evaluate, "main", self.evaluate)
        monkeypatch.setattr(transfer_matrix, "likeness", lambda args, names: {
            f"{a} {b}": {"cosine": 0.9, "overlap": len(a + b) / 100} for a in names for b in names if a != b})

    def happen(self, *piece):
        self.calls.append(piece)
        if error := self.broken.get(piece):
            raise error

    def finetune(self, argv):
        args = finetune.arguments(argv)
        self.happen("finetune", Path(args.out).name)
        write_run(Path(args.out).parent.parent, "+".join(args.train))
        print("a long report")

    def evaluate(self, argv):
        args = evaluate.arguments(argv)
        source, target = Path(args.out).name, args.test[0]
        self.happen(source, target)
        write_cell(Path(args.out).parent.parent, source, target, args.data, self.skill(source, target))
        print("a long report")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in NAMES:
        write_dataset(folder, name, users=40)
    return str(folder)


SOURCES = ["news-a", "shop", "news-b", "news-a+news-b", "news-a+books-a+shop"]
TARGETS = ["news-a", "books-a", "shop", "news-b"]


def run_matrix(data, out, *more, sources=SOURCES, targets=TARGETS):
    argv = ["--model", "m", "--sources", *sources, "--targets", *targets, "--out", str(out), "--data", data, *more]
    return common.run(transfer_matrix.main, argv)


def read_matrix(out):
    """The matrix in a folder and its cells, {source: {target: cell}}."""
    matrix = common.read_json(Path(out, "matrix.json"))
    return matrix, {row["source"]: row["cells"] for row in matrix["rows"]}


def test_dry_run_prints_one_runnable_line_for_each_missing_piece(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    assert run_matrix(data, tmp_path / "a b", "--dry-run", "--seed", "7", "--type", "embed", "--overwrite",
                      "--finetune-args=--lr 0.01", "--evaluate-args", "--limit-users 9") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line[1]).name for line in lines] == ["finetune.py"] * 5 + ["evaluate.py"] * 24 and not fakes.calls
    trainings = [finetune.arguments(line[2:]) for line in lines[:5]]
    cells = [evaluate.arguments(line[2:]) for line in lines[5:]]
    assert [args.train for args in trainings] == [
        ["news-a"], ["news-b"], ["shop"], ["news-a", "news-b"], ["news-a", "books-a", "shop"]]
    for args in trainings + cells:
        assert (args.seed, args.type, args.data, args.overwrite, args.max_tokens) == (7, "embed", data, True, None)
    assert all(args.lr == 0.01 for args in trainings) and all(args.limit_users == 9 for args in cells)
    assert [args.adapter for args in cells[:4]] == [None] * 4 and cells[4].adapter == trainings[0].out
    assert cells[4].out == str(tmp_path / "a b" / "cells" / "news-a") and cells[4].test == ["news-a"]


def test_what_is_there_is_not_run_again(data, tmp_path, monkeypatch, capsys):
    fakes, small = Fakes(monkeypatch), {"sources": ["news-a", "shop"], "targets": ["shop"]}
    write_run(tmp_path, "shop")
    write_run(tmp_path, "news-a", finished=False)  # killed in the middle
    write_cell(tmp_path, "zero-shot", "shop", data, 0)
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0
    training, first, second = capsys.readouterr().out.splitlines()
    assert "/runs/news-a " in training + " " and "/cells/news-a " in first + " " and "/cells/shop " in second + " "
    assert run_matrix(data, tmp_path, **small) == 0
    out = capsys.readouterr().out
    assert [line[2:] for line in out.splitlines() if line.startswith("$ ")] == [training, first, second]
    assert out.count("a long report") == 3
    assert len(fakes.calls) == 2 + 5  # all are asked, by --dry-run those that are there, so that stale ones are refused
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0 and not capsys.readouterr().out


def test_what_is_in_the_way_is_said_before_anything_runs(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)

    def error(*more, data=data, **small):
        assert run_matrix(data, tmp_path, *more, **small) == 2 and not fakes.calls
        return capsys.readouterr().err
    assert "No closing quotation" in error("--finetune-args=--lr '1e-3")
    shutil.copytree(data, tmp_path / "data")
    for split, name in (("test", "books-a"), ("valid", "news-b"), ("train", "shop")):
        (tmp_path / "data" / name / f"{split}.jsonl").unlink()
        assert f"{name} has no {split} split" in error(data=str(tmp_path / "data"))
        (tmp_path / "data" / name / f"{split}.jsonl").touch()
    for more in ([], ["--dry-run"]):
        assert "--bogus" in error("--evaluate-args=--bogus", *more)
    write_run(tmp_path, "shop")
    monkeypatch.setattr(finetune, "main", finetune_main)
    assert "runs/shop/run.json was made" in error("--dry-run", sources=["shop"])  # by write_run, not by these arguments


def test_a_matrix_follows_its_scores(data, tmp_path, monkeypatch, capsys):
    Fakes(monkeypatch)
    small = {"sources": ["shop"], "targets": ["news-a"]}
    assert run_matrix(data, tmp_path, **small) == 0
    before = read_matrix(tmp_path)[1]["shop"]["news-a"]
    monkeypatch.setattr(finetune, "main", lambda argv: None)  # as they do when their files are there
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    scores = tmp_path / "cells/shop/news-a.scores.jsonl"
    scores.write_bytes(Path(tmp_path, "cells/zero-shot/news-a.scores.jsonl").read_bytes())
    assert run_matrix(data, tmp_path, **small) == 0
    assert read_matrix(tmp_path)[1]["shop"]["news-a"]["gain_ci"] == [0, 0] != before["gain_ci"]
    scores.unlink()
    assert run_matrix(data, tmp_path, **small) == 2
    assert "is missing; give evaluate.py --overwrite" in capsys.readouterr().err


def test_failures_leave_cells_empty_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("finetune", "shop"): common.UserError("the loss is nan"),
                    ("news-a", "books-a"): RuntimeError("out of memory")}
    assert run_matrix(data, tmp_path) == 1
    err = capsys.readouterr().err
    assert "error: the loss is nan" in err and "error: RuntimeError: out of memory" in err
    assert err.count("failed, left empty:") == 2 and ("shop", "news-a") not in fakes.calls
    matrix, cells = read_matrix(tmp_path)
    assert not any(cells["shop"].values()) and cells["news-a"]["books-a"] == cells["news-a"]["mean"] == {}
    assert all(cells["news-b"].values()) and all(cells["news-a+news-b"].values())
    assert matrix["failed"] == ["news-a on books-a", "training on shop", "shop on news-a", "shop on news-b",
                                "shop on books-a", "shop on shop"]
    assert "Failed: news-a on books-a, training on shop," in Path(tmp_path, "matrix.md").read_text()
    assert Path(tmp_path, "matrix.svg").read_text().count(">empty<") == 7  # two, and a row of five
    assert matrix["rra"]["1"].keys() == {"news-a", "news-b"}
    assert "not ranked in RRA@K, where others move up: shop." in Path(tmp_path, "matrix.md").read_text()
    fakes.broken = {}
    assert run_matrix(data, tmp_path) == 0
    assert all(cell for row in read_matrix(tmp_path)[1].values() for cell in row.values())


def test_interrupt_stops_the_matrix(data, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("finetune", "news-b"): KeyboardInterrupt()}
    with pytest.raises(SystemExit, match="130"):
        run_matrix(data, tmp_path)
    assert fakes.calls[-1] == ("finetune", "news-b") and not Path(tmp_path, "matrix.json").exists()


@pytest.mark.parametrize("change, message", [
    (["--model", "overlap"], "fine-tuned"), (["--k", "0"], "--k"), (["--metric", "logloss"], "--metric"),
    (["--sources", "news-c"], "unknown dataset 'news-c'"), (["--sources", "news-a+"], "unknown dataset ''")])
def test_wrong_arguments_are_one_line(change, message, data, tmp_path, capsys):
    assert run_matrix(data, tmp_path, *change) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_rows_columns_settings_and_numbers(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else 3 if target in source else
          -1 if source == "shop" else 0.3)
    assert run_matrix(data, tmp_path, "--metric", "group_auc") == 0
    matrix, cells = read_matrix(tmp_path)
    assert matrix["targets"] == ["news-a", "news-b", "books-a", "shop"]  # grouped by domain
    letters = {source: "".join(row[t]["setting"] for t in matrix["targets"]) for source, row in cells.items()}
    assert letters == {"zero-shot": "BBBB", "news-a": "CDFF", "news-b": "DCFF", "shop": "FFFC",
                       "news-a+news-b": "EEGG", "news-a+books-a+shop": "HGHH"}
    for source, row in cells.items():
        for target in matrix["targets"]:
            result = common.read_json(tmp_path / "cells" / source / f"{target}.json")
            assert (row[target]["value"], row[target]["value_ci"]) == (result["group_auc"], result["ci"]["group_auc"])
            gain = row[target]["value"] - cells["zero-shot"][target]["value"]
            assert row[target]["gain"] == (None if source == "zero-shot" else pytest.approx(gain))
        value = lambda *targets: pytest.approx(np.mean([row[t]["value"] for t in targets]))
        assert row["mean"]["value"] == value(*matrix["targets"])
        assert row["mean of news"]["value"] == value("news-a", "news-b")
        unseen = [t for t in matrix["targets"] if t not in source.split("+")]
        assert row["mean of unseen"]["value"] == value(*unseen)
    assert cells["shop"]["shop"]["mark"] == "better" and cells["shop"]["news-a"]["mark"] == "worse"


def test_marks_notes_and_spreadsheet(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else -1 if source == "shop" else 1)
    assert run_matrix(data, tmp_path) == 0
    matrix, cells = read_matrix(tmp_path)
    marks = [row[t]["mark"] for source, row in cells.items() for t in TARGETS if source != "zero-shot"]
    better, worse = marks.count("better"), marks.count("worse")
    assert matrix["marks"] == {"compared": 20, "better": better, "worse": worse, "by_chance": 1.0}
    assert better >= 14 and worse >= 3
    text = (tmp_path / "matrix.md").read_text()
    assert f"Of 20 cells {better} are ▲, {worse} ▼; if nothing differed, chance would mark 1.0 (5%)." in text
    assert "not the luck of a training run" in text
    assert "Zero-shot collapse, scores as good as chance: news-a, news-b, books-a, shop." in text
    assert re.search(r"\| shop +(\| [\d.]+ +){3}\| 30 +\| 960 +\|", text)
    with open(tmp_path / "matrix.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 6 * 7 and not any(None in row or None in row.values() for row in rows)
    row, cell = next(r for r in rows if (r["source"], r["target"]) == ("shop", "news-a")), cells["shop"]["news-a"]
    assert (row["setting"], row["mark"], row["steps"], row["domain"]) == ("F", "worse", "30", "news")
    assert [float(row[key]) for key in ("auc", "low", "high", "gain", "gain_low", "gain_high")] == [
        cell["value"], *cell["value_ci"], cell["gain"], *cell["gain_ci"]]


def test_warnings_about_trainings(data, tmp_path, monkeypatch):
    Fakes(monkeypatch)
    monkeypatch.setattr(finetune, "main", lambda argv: write_run(
        tmp_path, "news-a", unstable=True, valid_chain=["shop"], train_chain=["news-b", "news-a"]))
    assert run_matrix(data, tmp_path, sources=["news-a"]) == 0
    assert read_matrix(tmp_path)[1]["news-a"]["news-a"]["setting"] == "E"  # the chain of trainings counts
    text = (tmp_path / "matrix.md").read_text()
    assert "Unstable training, validation fell by over 0.05: news-a." in text
    assert "Validated on other sets: news-a." in text


def test_differences_are_paired_over_users():
    """Against a bootstrap written out: the same users are drawn for both models."""
    rng = np.random.default_rng(1)
    users, labels = np.repeat(np.arange(30), 6), np.tile([1, 0, 0, 1, 0, 1], 30)
    base = rng.normal(size=180) + 2.0 * labels * rng.random(30)[users]  # users differ much, models little
    other = base + 0.3 * labels + 0.1 * rng.normal(size=180)
    def sample(scores):
        draws = common.bootstrap(scores, labels, users, ["group_auc"], seed=5)["group_auc"]
        return common.metric("group_auc", scores, labels, users), draws
    cell = transfer_matrix.estimate([sample(other)], [sample(base)])

    own = lambda scores: np.array([common.auc(scores[users == u], labels[users == u]) for u in range(30)])
    difference = own(other) - own(base)
    picks = np.random.default_rng(9).integers(30, size=(4000, 30))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    assert cell["gain"] == pytest.approx(difference.mean()) and cell["mark"] == "better"
    assert cell["gain_ci"] == pytest.approx([low, high], abs=0.15 * (high - low))
    assert high - low < 0.6 * np.ptp(cell["value_ci"])  # what pairing is for
    same = transfer_matrix.estimate([sample(base)], [sample(base)])
    assert (same["gain"], same["gain_ci"], same["mark"]) == (0, [0, 0], "")
    assert transfer_matrix.estimate([sample(base)], [sample(other)])["mark"] == "worse"
    unsure = transfer_matrix.estimate([(0.6, np.linspace(0.4, 0.8, 101))], [(0.5, np.full(101, 0.5))])
    assert unsure["gain"] == pytest.approx(0.1) and unsure["mark"] == ""


def test_mean_over_targets_has_its_own_interval():
    """Independent targets: the interval of their mean is narrower by the root of their number."""
    rng = np.random.default_rng(0)
    cells = [(0.5, 0.5 + 0.1 * rng.normal(size=20000)) for _ in range(4)]
    entry = transfer_matrix.estimate(cells, [])
    assert np.ptp(entry["value_ci"]) == pytest.approx(2 * 1.96 * 0.1 / 2, rel=0.03) and entry["gain"] is None
    assert transfer_matrix.estimate([cells[0], None], []) == transfer_matrix.estimate([], []) == {}
    assert transfer_matrix.estimate(cells[:2], [cells[0], None])["gain_ci"] is None


def test_draws_are_paired_within_a_column_and_independent_between(data, tmp_path):
    args = transfer_matrix.arguments(["--model", "m", "--sources", "shop", "--targets", "shop", "--out", "x",
                                      "--data", data])
    def draw(target):
        path = tmp_path / "cells" / "s" / f"{target}.json"
        return transfer_matrix.draw(args, target, common.read_json(path), path)
    for target in ("news-a", "news-b"):
        write_cell(tmp_path, "s", target, data, 1)
    before, between = draw("news-a"), draw("news-b")
    path = tmp_path / "cells" / "s" / "news-a.scores.jsonl"  # other scores of the same users, little changed
    write_lines(path, [{**line, "scores": [score + 0.1 * i for i, score in enumerate(line["scores"])]}
                       for line in list(common.read_lines(path))])
    assert np.corrcoef(before, draw("news-a"))[0, 1] > 0.8 and abs(np.corrcoef(before, between)[0, 1]) < 0.12


def test_reciprocal_rank_average_by_hand():
    """The README's worked example. On mind, goodreads is first and cds second. On goodreads, cds is first, mind second.
    On cds, mind and goodreads tie, so each is first half of the time: (1 + 0) / 2 at K = 1, (1 + 1/2) / 2 beyond."""
    table = {"mind":      {"mind": 0.70, "goodreads": 0.60, "cds": 0.58},
             "goodreads": {"mind": 0.60, "goodreads": 0.72, "cds": 0.58},
             "cds":       {"mind": 0.55, "goodreads": 0.62, "cds": 0.69}}
    rra = common.reciprocal_rank_average
    assert rra(table, 1) == {"mind": (0 + 0.5) / 2, "goodreads": (1 + 0.5) / 2, "cds": (0 + 1) / 2}
    assert rra(table, 3) == {"mind": (0.5 + 0.75) / 2, "goodreads": (1 + 0.75) / 2, "cds": (0.5 + 1) / 2}


def test_matrix_gives_rra_of_its_own_numbers(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: len(source) / 10)
    assert run_matrix(data, tmp_path, "--k", "1", "2") == 0
    matrix, cells = read_matrix(tmp_path)
    assert matrix["rra"].keys() == {"1", "2"} and matrix["rra"]["2"].keys() == {"news-a", "news-b", "shop"}
    for k in (1, 2):
        terms = []
        for t in ("news-b", "books-a", "shop"):
            better = sum(cells[s][t]["value"] > cells["news-a"][t]["value"] for s in ("news-b", "shop") if s != t)
            terms.append(1 / (better + 1) if better < k else 0)
        assert matrix["rra"][str(k)]["news-a"] == pytest.approx(np.mean(terms))


def test_rank_correlation_by_hand():
    rho = transfer_matrix.rank_correlation
    assert rho([(1, 5), (2, 6), (3, 7)]) == pytest.approx(1) and rho([(1, 7), (2, 6), (30, 5)]) == pytest.approx(-1)
    intelligence = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]  # Wikipedia's example
    television = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert rho(list(zip(intelligence, television))) == pytest.approx(-29 / 165)
    assert rho([(1, 1), (2, 2), (2, 3), (4, 4)]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4
    assert rho([(1, 1), (1, 2), (1, 3)]) is None and rho([(1, 1), (2, 2)]) is None and rho([]) is None


def test_foresight_pairs_single_sources_with_other_targets(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else len(source + target) / 5)
    assert run_matrix(data, tmp_path) == 0
    matrix, cells = read_matrix(tmp_path)
    pairs = matrix["foresight"]["pairs"]
    assert sorted((p["source"], p["target"]) for p in pairs) == sorted(
        (s, t) for s in ("news-a", "news-b", "shop") for t in TARGETS if s != t)
    for pair in pairs:
        assert pair["gain"] == cells[pair["source"]][pair["target"]]["gain"]
        assert pair["overlap"] == len(pair["source"] + pair["target"]) / 100
    rho = transfer_matrix.rank_correlation([(p["overlap"], p["gain"]) for p in pairs])
    assert matrix["foresight"]["cosine"] is None and matrix["foresight"]["overlap"] == rho
    assert f"9 pairs of source and target: cosine of mean item embeddings undefined, vocabulary overlap {rho:+.2f}" in (
        tmp_path / "matrix.md").read_text()
    monkeypatch.setattr(transfer_matrix, "likeness", None)  # kept, so not called again, though the table is another one
    assert run_matrix(data, tmp_path, "--metric", "mrr") == 0
    assert len(read_matrix(tmp_path)[0]["foresight"]["pairs"]) == 9


def test_likeness_that_fails_leaves_the_matrix(data, tmp_path, monkeypatch):
    Fakes(monkeypatch)
    def fail(args, names):
        raise common.UserError("no such model")
    monkeypatch.setattr(transfer_matrix, "likeness", fail)
    assert run_matrix(data, tmp_path) == 1
    matrix, cells = read_matrix(tmp_path)
    assert matrix["failed"] == ["likeness of the datasets (no such model)"] and matrix["foresight"] is None
    assert all(all(row.values()) for row in cells.values()) and Path(tmp_path, "matrix.svg").exists()


NASTY = 'a "<b>&\'\x07 '


def test_svg_is_valid_whatever_the_names(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else 1 if target in source else -1)
    assert run_matrix(data, tmp_path) == 0
    matrix = read_matrix(tmp_path)[0]
    nasty = json.loads(json.dumps({**matrix, "model": NASTY}).replace('"shop', '"' + json.dumps(NASTY)[1:-1]))
    for this in (matrix, nasty):
        root = ElementTree.fromstring(transfer_matrix.draw_svg(this))
        elements = [element for element in root.iter() if element.tag.endswith("text")]
        texts = [element.text or "" for element in elements]
        assert {"tested on", "trained on", "mean", "news", "book"} <= set(texts)
        assert texts.count("C") == texts.count("H") == 3
        cells = [row["cells"][t] for row in this["rows"] for t in [*this["targets"], "mean"]]
        assert {f"{cell['value']:.3f}" for cell in cells} <= set(texts)
        for sign, mark in ("▲", "better"), ("▼", "worse"):
            assert texts.count(sign) == sum(cell["mark"] == mark for cell in cells) > 0
        *_, width, height = map(float, root.get("viewBox").split())
        for element in elements:
            if element.text != "trained on":  # turned
                assert 0 <= float(element.get("x")) <= width and 0 <= float(element.get("y")) <= height
    assert NASTY.replace("\x07", "?").strip() in " ".join(texts)


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def test_numbers_can_be_read_on_every_colour():
    for shade in np.linspace(-1, 1, 81):
        cell = {"value": 0.5, "value_ci": [0, 1], "gain": shade, "gain_ci": [0, 1], "mark": "better"}
        svg = "".join(transfer_matrix.draw_cell(0, 0, cell, 1.0))
        ground, *inks = re.findall('fill="(#[0-9a-f]{6})"', svg)
        dark, light = sorted((luminance(ground), luminance(inks[0])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5 and len(set(inks)) == 1, (shade, ground, inks)
    blue, orange = (transfer_matrix.colour(shade) for shade in (0.7, -0.7))
    assert int(blue[5:], 16) > int(blue[1:3], 16) and int(orange[1:3], 16) > int(orange[5:], 16)


def canned_matrix(folder, values, metric="auc", model="m", sha256="0"):
    """A matrix.json with nothing but numbers, {source: (on news-a, on books-a)}; returns the folder."""
    def cell(source, target, value):
        train = [] if source == "zero-shot" else source.split("+")
        return {"value": value, "setting": common.setting_of(train, target), "data_sha256": sha256,
                "n_users": 9} if value else {}
    rows = [{"source": source, "cells": {t: cell(source, t, v) for t, v in zip(("news-a", "books-a"), row)}}
            for source, row in values.items()]
    common.write_json(Path(folder, "matrix.json"), {"model": model, "type": "prompt", "metric": metric, "rows": rows,
                                                    "targets": ["news-a", "books-a"]})
    return str(folder)


def test_compare_models_by_setting(tmp_path, capsys):
    small = canned_matrix(tmp_path / "s", {
        "zero-shot": (0.50, 0.52), "shop": (0.40, 0.50), "books-b": (0.60, 0.70), "books-a+shop": (0.55, 0.80),
        "news-a+shop": (0.70, 0.60)})
    large = canned_matrix(tmp_path / "l", model="large", values={
        "zero-shot": (0.60, 0.62), "shop": (0.50, None), "books-b": (0.60, 0.80), "books-a+shop": (0.65, 0.90),
        "news-a+shop": (0.90, None)})
    compare = lambda *folders: common.run(transfer_matrix.main, ["--compare", *folders])
    assert compare(small, large) == 0
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["auc", "B (2)", "D (1)", "F (1)", "G (1)", "H (2)", "H - G (1)"]  # G on books-a lacks in one
    assert lines[2] == [f"m, prompt ({small})", "0.510", "0.700", "0.500", "0.550", "0.750", "+0.150"]
    assert lines[3] == [f"large, prompt ({large})", "0.610", "0.800", "0.550", "0.650", "0.900", "+0.250"]
    fewer = canned_matrix(tmp_path / "f", {"zero-shot": (0.60, 0.62), "books-b": (0.65, 0.75)})  # without shop (F)
    assert compare(small, fewer) == 0
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["auc", "B (2)", "D (1)", "F (1)", "H - G (0)"]
    assert [line[1:4] for line in lines[2:4]] == [["0.510", "0.700", "0.600"], ["0.610", "0.750", "0.650"]]
    elsewhere = canned_matrix(tmp_path / "e", {"zero-shot": (0.5, 0.5)}, sha256="1")
    assert compare(small, elsewhere) == 2 and "different users of news-a" in capsys.readouterr().err
    other = canned_matrix(tmp_path / "o", {"zero-shot": (0.5, 0.5)}, metric="mrr")
    assert compare(small, other) == 2 and "different metrics: auc, mrr" in capsys.readouterr().err
    assert compare(str(tmp_path)) == 2 and compare(other) == 0


def test_a_tiny_model_from_training_to_picture(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["--model", tiny.build("llama", tmp_path / "model"), "--sources", "shop", "news-a+shop", "--targets", "shop",
            "books-a", "--out", str(out), "--data", data, "--device", "cpu", "--finetune-args=--epochs 1 --lora-r 4",
            "--evaluate-args=--limit-users 30"]
    assert common.run(transfer_matrix.main, argv) == 0
    first = {path.name: path.read_bytes() for path in out.glob("matrix.*")}
    matrix, cells = read_matrix(out)
    assert sorted(first) == ["matrix.csv", "matrix.json", "matrix.md", "matrix.svg"]
    assert cells["shop"]["books-a"]["n_users"] == 30 and matrix["rows"][1]["training"]["samples"] == 320
    assert -1 < matrix["foresight"]["pairs"][0]["cosine"] < 1
    capsys.readouterr()

    monkeypatch.setattr(common, "load_scorer", lambda args: pytest.fail("a model was loaded"))
    started = time.perf_counter()
    assert common.run(transfer_matrix.main, argv) == 0 and "$ " not in capsys.readouterr().out
    for name in ("matrix.csv", "matrix.md", "matrix.svg"):
        (out / name).unlink()
    for folder in ("cells", "runs"):
        (out / folder).rename(tmp_path / folder)
    transfer_matrix.redraw(out)  # from matrix.json alone
    assert time.perf_counter() - started < 10
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first

    for folder in ("cells", "runs"):
        (tmp_path / folder).rename(out / folder)
    assert common.run(transfer_matrix.main, [*argv, "--seed", "1"]) == 2  # other arguments: nothing is run or replaced
    err = capsys.readouterr().err
    assert "zero-shot/shop.json was made with other arguments" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first


def test_likeness_of_datasets(tmp_path):
    texts = {"news-a": ["red MOON storm", "old storm"], "books-a": ["Red moon", "moon: night"],
             "news-b": ["red MOON storm", "old storm"]}
    for name, items in texts.items():
        write_dataset(tmp_path, name)
        write_lines(tmp_path / name / "items.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(items)])
    argv = ["--model", tiny.build("llama", tmp_path / "model"), "--sources", "news-a", "--targets", "news-a",
            "--out", "x", "--data", str(tmp_path), "--device", "cpu"]
    alike = transfer_matrix.likeness(transfer_matrix.arguments(argv), list(texts))
    assert len(alike) == 6 and alike["news-a books-a"] == alike["books-a news-a"]
    assert alike["news-a news-b"] == {"cosine": pytest.approx(1), "overlap": 1}
    assert alike["news-a books-a"]["overlap"] == 2 / 5  # red and moon of red, moon, storm, old, night
    scorer = common.load_scorer(transfer_matrix.arguments([*argv, "--type", "embed"]))
    embed = lambda text: common.embed(scorer, scorer.encode([text]))[0].detach().double().numpy()
    mean = lambda name: np.mean([embed(text) for text in texts[name]], 0)
    a, b = mean("news-a"), mean("books-a")
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert alike["news-a books-a"]["cosine"] == pytest.approx(expected, abs=1e-5) and expected < 0.999
