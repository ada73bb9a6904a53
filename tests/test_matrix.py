"""The transfer matrix: command lines, statistics, tables, picture; from made-up results and from a tiny model."""
import csv
import json
import random
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import evaluate
import finetune
import tiny
import transfer_matrix

NAMES = list(common.DEMO)
SOURCES = ["news-a", "news-b", "shop", "news-a+news-b", "news-a+books-a+shop"]
TARGETS = ["news-a", "news-b", "books-a", "shop"]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dataset(data, name, users):
    """A small prepared dataset, of the words of tests/tiny.py."""
    rng, folder = random.Random(name), Path(data, name)
    words = rng.sample(tiny.WORDS[-16:], 8)
    items = {f"i{n}": " ".join(rng.sample(words, 2)) for n in range(30)}
    write_lines(folder / "items.jsonl", [{"id": key, "text": text} for key, text in items.items()])
    for split, size in {"train": users, "valid": 8, "test": users}.items():
        rows = []
        for n in range(size):
            ids = rng.sample(list(items), 11)
            rows.append({"user": f"{split}{n}", "history": ids[:3], "candidates": ids[3:], "labels": [1, 0] * 4})
        write_lines(folder / f"{split}.jsonl", rows)
    common.write_json(folder / "meta.json", {"format": common.FORMAT, "domain": common.DOMAINS[name]})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in NAMES:
        write_dataset(folder, name, users=40)
    return str(folder)


class Fakes:
    """Stand-ins for finetune.main and evaluate.main: made-up results in the scripts' own files; lists their calls.

    skill(source, target): how far positives stand above negatives. broken: {(source, target): error to raise}.
    """

    def __init__(self, monkeypatch, skill=lambda source, target: 1.0):
        self.calls, self.skill, self.broken, self.run_facts = [], skill, {}, {}
        monkeypatch.setattr(finetune, "main", self.finetune)
        monkeypatch.setattr(evaluate, "main", self.evaluate)
        monkeypatch.setattr(transfer_matrix, "DRAWS", 100)

    def call(self, source, target):
        self.calls.append((source, target))
        if (source, target) in self.broken:
            raise self.broken[source, target]
        print("a long report")

    def finetune(self, argv):
        args = finetune.arguments(argv)
        self.call(Path(args.out).name, None)
        run = {"train": args.train, "train_chain": args.train, "valid_chain": args.valid, "unstable": False,
               "domains": {name: common.DOMAINS[name] for name in args.train}, "beats_base": True, "steps": 30}
        common.write_json(Path(args.out, "run.json"), {**run, "job": finetune.job_of(args), **self.run_facts})

    def evaluate(self, argv):
        args = evaluate.arguments(argv)
        source, target = Path(args.out).name, args.test[0]
        self.call(source, target)
        rng = np.random.default_rng(common.digest(source, target))
        users, _ = common.read_users(args.data, target, args.split, args.limit_users)
        job = evaluate.job_of(args, target)
        lines, scored = [{"job": job, "users": len(users)}], []
        for user in users:
            labels = np.array(user["labels"])
            scores = rng.normal(size=len(labels)) + self.skill(source, target) * labels
            lines.append({"user": user["user"], "scores": scores.tolist(), "labels": user["labels"]})
            scored.append((scores, labels))
        write_lines(evaluate.scores_path(args.out, target), lines)
        result = {**common.evaluate_users(scored, draws=20), "collapsed": self.skill(source, target) == 0,
                  "n_users": len(users), "n_samples": 8 * len(users), "data_sha256": job["data_sha256"],
                  "split": args.split, "job": job, "arguments": vars(args)}
        common.write_json(evaluate.result_path(args.out, target), result)


def run_matrix(data, out, *more, sources=SOURCES, targets=TARGETS):
    argv = ["--model", "m", "--sources", *sources, "--targets", *targets, "--out", str(out), "--data", data]
    return common.run_script(transfer_matrix.main, [*argv, "--device", "cpu", *more])


def read_matrix(out):
    """matrix.json, and its cells as {source: {target: cell}}."""
    matrix, cells = common.read_json(Path(out, "matrix.json")), {}
    for cell in matrix["cells"]:
        cells.setdefault(cell["source"], {})[cell["target"]] = cell
    return matrix, cells


def commands_in(output):
    return [line[2:] for line in output.splitlines() if line.startswith("$ ")]

# -------------------------------------------------------------------------------------------------------- command lines


def test_dry_run_prints_one_runnable_line_for_each_missing_training_and_cell(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    assert run_matrix(data, tmp_path / "a b", "--dry-run", "--seed", "7", "--type", "embed", "--overwrite",
                      "--finetune-args=--lr 0.01", "--evaluate-args", "--limit-users 9") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert not fakes.calls and not list(tmp_path.iterdir())
    trainings = [finetune.arguments(line[2:]) for line in lines if line[1].endswith("finetune.py")]
    cells = [evaluate.arguments(line[2:]) for line in lines if line[1].endswith("evaluate.py")]
    assert len(lines) == 29 and len(trainings) == 5 and len(cells) == 24
    assert ["+".join(args.train) for args in trainings] == SOURCES
    for args in trainings + cells:
        assert (args.seed, args.type, args.data, args.overwrite, args.max_tokens) == (7, "embed", data, True, None)
    assert all(args.lr == 0.01 for args in trainings) and all(args.limit_users == 9 for args in cells)
    assert [args.adapter for args in cells[:4]] == [None] * 4 and cells[4].adapter == trainings[0].out
    assert cells[4].out == str(tmp_path / "a b" / "cells" / "news-a") and cells[4].test == ["news-a"]


def test_what_is_finished_is_not_run_again(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    small = {"sources": ["news-a", "shop", "shop"], "targets": ["shop", "shop"]}
    assert run_matrix(data, tmp_path, **small) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.glob("matrix.*")}
    assert sorted(first) == ["matrix.csv", "matrix.json", "matrix.md", "matrix.svg"]
    assert len(commands_in(capsys.readouterr().out)) == len(fakes.calls) == 5
    assert len(read_matrix(tmp_path)[0]["cells"]) == 3

    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0 and not capsys.readouterr().out
    assert run_matrix(data, tmp_path, **small) == 0 and not commands_in(capsys.readouterr().out)
    assert len(fakes.calls) == 5 and {path.name: path.read_bytes() for path in tmp_path.glob("matrix.*")} == first

    (tmp_path / "cells/zero-shot/shop.json").unlink()  # as if killed while it was scored
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0
    missing = capsys.readouterr().out.splitlines()
    assert run_matrix(data, tmp_path, **small) == 0 and commands_in(capsys.readouterr().out) == missing
    assert fakes.calls[5:] == [("zero-shot", "shop")]
    assert run_matrix(data, tmp_path, "--overwrite", **small) == 0 and len(fakes.calls) == 11


def test_a_source_that_is_trained_again_is_tested_again(data, tmp_path, monkeypatch, capsys):
    """--overwrite, killed while it trained: the old adapter and its cells still stand there."""
    fakes = Fakes(monkeypatch)
    small = {"sources": ["news-a", "shop"], "targets": ["shop"]}
    assert run_matrix(data, tmp_path, **small) == 0
    (tmp_path / "runs/shop/run.json").unlink()
    before = len(fakes.calls)
    capsys.readouterr()
    assert run_matrix(data, tmp_path, "--dry-run", **small) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    def train(argv):
        fakes.finetune(argv)
        (tmp_path / "runs/shop/adapter_model.safetensors").write_text("new weights")
        assert (tmp_path / "cells/shop/shop.json").exists()
    monkeypatch.setattr(finetune, "main", train)
    assert run_matrix(data, tmp_path, **small) == 0
    assert fakes.calls[before:] == [("shop", None), ("shop", "shop")]


def test_what_is_wrong_or_in_the_way_is_one_line_before_anything_runs(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)

    def error(*more, data=data, **small):
        before = len(fakes.calls)
        assert run_matrix(data, tmp_path / "out", *more, **small) == 2 and len(fakes.calls) == before
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err
    assert "--finetune-args" in error("--finetune-args=--lr '1e-3")
    for more in ([], ["--dry-run"]):
        assert "--bogus" in error("--evaluate-args=--bogus", *more)
        assert "nowhere holds no finished run" in error("--finetune-args=--init-adapter nowhere", *more)
        assert "--lr" in error("--finetune-args=--lr 0", *more)
    assert "--adapter" in error("--evaluate-args=--adapter=x") and "--train" in error("--finetune-args=--train shop")
    assert "take no --against" in error("--evaluate-args=--against there")
    assert "take no --type" in error("--finetune-args=--type embed")
    assert "fine-tuned" in error("--model", "itemknn") and "--k" in error("--k", "0")
    assert "--metric" in error("--metric", "logloss")
    assert "unknown dataset 'news-c'" in error(sources=["news-a+news-c"])
    assert "unknown dataset ''" in error(sources=["news-a+"])
    assert "zero-shot is always the first row" in error(sources=["zero-shot", "news-a"])
    assert "unknown dataset 'all'" in error(targets=["all"])
    shutil.copytree(data, tmp_path / "data")
    for split, name in (("test", "books-a"), ("valid", "news-b"), ("train", "shop")):
        path = tmp_path / "data" / name / f"{split}.jsonl"
        path.rename(tmp_path / "kept")
        assert f"{name} has no {split} split" in error(data=str(tmp_path / "data"))
        (tmp_path / "kept").rename(path)
    (tmp_path / "data/shop/meta.json").unlink()
    assert "shop is not prepared" in error(data=str(tmp_path / "data"))

    assert run_matrix(data, tmp_path / "out", sources=["shop"], targets=["shop"]) == 0
    capsys.readouterr()
    assert "made with a different seed" in error("--seed", "1", sources=["shop"], targets=["shop"])
    assert "runs/shop was made with a different lr" in error("--finetune-args=--lr 0.5", sources=["shop"], targets=["shop"])


def test_an_own_dataset_whose_training_fails_leaves_its_row_empty(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(tmp_path / "data/news-a", tmp_path / "data/mine")
    (tmp_path / "data/mine/meta.json").write_text('{"format": 1, "domain": "mine"}')
    Fakes(monkeypatch).broken = {("mine", None): common.UserError("no")}
    out = tmp_path / "out"
    assert run_matrix(str(tmp_path / "data"), out, sources=["mine", "shop"], targets=["shop"]) == 1
    matrix, cells = read_matrix(out)
    assert cells["mine"]["shop"]["value"] is None and cells["shop"]["shop"]["value"] > 0.5
    assert matrix["arguments"]["targets"] == ["shop"]


def test_failures_leave_cells_empty_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("shop", None): common.UserError("the loss is nan"),
                    ("news-a", "books-a"): RuntimeError("out of\nmemory")}
    assert run_matrix(data, tmp_path) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: RuntimeError: out of memory", "error: the loss is nan"]
    assert ("shop", "news-a") not in fakes.calls and ("news-a+news-b", "shop") in fakes.calls
    matrix, cells = read_matrix(tmp_path)
    empty = [(c["source"], c["target"]) for c in matrix["cells"] if c["value"] is None]
    assert empty == [("news-a", "books-a"), *(("shop", target) for target in TARGETS)]
    assert matrix["failed"] == [["news-a", "books-a"], ["shop", None], *(["shop", target] for target in TARGETS)]
    assert "Failed: news-a on books-a." in captured.out and "Failed: training on shop, which RRA@K" in captured.out
    assert Path(tmp_path, "matrix.svg").read_text().count(">empty<") == 5
    assert list(matrix["rra"]) == ["news-a", "news-b"]  # shop has no cell, so it is not ranked
    fakes.broken = {}
    assert run_matrix(data, tmp_path) == 0
    assert None not in [cell["value"] for cell in read_matrix(tmp_path)[0]["cells"]]


def test_interrupt_stops_the_matrix(data, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch)
    fakes.broken = {("news-b", None): KeyboardInterrupt()}
    with pytest.raises(SystemExit, match="130"):
        run_matrix(data, tmp_path)
    assert fakes.calls[-1] == ("news-b", None) and not Path(tmp_path, "matrix.json").exists()

# ------------------------------------------------------------------------------------------------------------- analysis


def test_settings_values_gains_and_marks(data, tmp_path, monkeypatch):
    def skill(source, target):
        if source == "zero-shot":
            return 0
        if target in source:
            return 3
        return -1 if source == "shop" else 0.3
    Fakes(monkeypatch, skill)
    assert run_matrix(data, tmp_path, "--metric", "group_auc") == 0
    matrix, cells = read_matrix(tmp_path)
    letters = {source: " ".join(row[t]["setting"] for t in TARGETS) for source, row in cells.items()}
    assert letters == {"zero-shot": "A/B A/B A/B A/B", "news-a": "C D F F", "news-b": "D C F F", "shop": "F F F C",
                       "news-a+news-b": "E E F F", "news-a+books-a+shop": "H G H H"}
    for cell in matrix["cells"]:
        result = common.read_json(tmp_path / "cells" / cell["source"] / f"{cell['target']}.json")
        assert (cell["value"], cell["ci"]) == (result["group_auc"], result["ci"]["group_auc"])
        if cell["source"] == "zero-shot":
            assert cell["gain"] is None and cell["mark"] == ""
            continue
        low, high = cell["gain"]["ci"]
        assert low <= cell["gain"]["value"] <= high
        assert cell["gain"]["value"] == pytest.approx(cell["value"] - cells["zero-shot"][cell["target"]]["value"])
        assert cell["mark"] == ("better" if low > 0 else "worse" if high < 0 else "")
    assert cells["shop"]["shop"]["mark"] == "better" and cells["shop"]["news-a"]["mark"] == "worse"

    marks = [cell["mark"] for cell in matrix["cells"]]
    text = (tmp_path / "matrix.md").read_text()
    better, worse = marks.count("better"), marks.count("worse")
    assert f"Of 20 cells {better} are better than zero-shot (▲) and {worse} worse" in text
    assert "about 0.5 better and 0.5 worse are expected by chance" in text
    assert "not the luck of a training run" in text and "says nothing of harm" in text
    assert text.count("Zero-shot collapse on") == 4
    with open(tmp_path / "matrix.csv") as lines:
        head, *rows = csv.reader(lines)
    assert head[3] == "value" and len(rows) == 24 and {len(row) for row in rows} == {len(head)}
    cell, row = cells["shop"]["news-a"], next(row for row in rows if row[:2] == ["shop", "news-a"])
    assert row[2] == "F" and row[-2:] == ["worse", "40"]
    assert list(map(float, row[3:9])) == [cell["value"], *cell["ci"], cell["gain"]["value"], *cell["gain"]["ci"]]


def test_a_chain_of_trainings_and_its_warnings(data, tmp_path, monkeypatch):
    fakes = Fakes(monkeypatch)
    fakes.run_facts = {"train_chain": ["mine", "news-a"], "domains": {"mine": "sport", "news-a": "news"},
                       "unstable": True, "beats_base": False, "valid_chain": ["news-a", "news-b"]}
    assert run_matrix(data, tmp_path, sources=["news-a"]) == 0
    cells = read_matrix(tmp_path)[1]["news-a"]
    assert [cells[target]["setting"] for target in TARGETS] == ["H", "G", "G", "G"]
    text = (tmp_path / "matrix.md").read_text()
    assert "news-a was unstable" in text and "news-a never beat its start" in text
    assert "validation labels of news-b chose the checkpoint" in text and text.count("chose the checkpoint") == 1


def test_gains_are_paired_over_users(data, tmp_path, monkeypatch):
    """Against a bootstrap written out: the same users are drawn for both models."""
    Fakes(monkeypatch)
    monkeypatch.setattr(transfer_matrix, "DRAWS", 2000)
    small = {"sources": ["shop"], "targets": ["news-a"]}
    assert run_matrix(data, tmp_path, "--metric", "group_auc", **small) == 0
    rng, users = np.random.default_rng(1), common.read_users(data, "news-a", "test")[0]
    paths = [evaluate.scores_path(tmp_path / "cells" / source, "news-a") for source in ("zero-shot", "shop")]
    difference = []  # of each user: users differ much, models little
    files = [[next(common.read_lines(path))[1]] for path in paths]
    for user in users:
        labels = np.array(user["labels"])
        base = rng.normal(size=8) + 2 * rng.random() * labels
        other = base + 0.3 * labels + 0.1 * rng.normal(size=8)
        difference.append(common.auc(other, labels) - common.auc(base, labels))
        for file, scores in zip(files, (base, other)):
            file.append({"user": user["user"], "scores": scores.tolist(), "labels": user["labels"]})
    for path, file in zip(paths, files):
        write_lines(path, file)
    assert run_matrix(data, tmp_path, "--metric", "group_auc", **small) == 0
    cell = read_matrix(tmp_path)[1]["shop"]["news-a"]
    picks = np.random.default_rng(9).integers(40, size=(4000, 40))
    low, high = np.quantile(np.array(difference)[picks].mean(axis=1), [0.025, 0.975])
    assert cell["gain"]["ci"] == pytest.approx([low, high], abs=0.15 * (high - low))

    write_lines(paths[1], [files[1][0], *files[0][1:]])  # the same scores: no difference in any draw
    assert run_matrix(data, tmp_path, "--metric", "group_auc", **small) == 0
    cell = read_matrix(tmp_path)[1]["shop"]["news-a"]
    assert cell["gain"]["ci"] == [0, 0] and cell["mark"] == ""
    write_lines(paths[1], files[1][:-1])
    assert run_matrix(data, tmp_path, **small) == 2  # a user is missing


def test_rank_averages_with_intervals():
    args = transfer_matrix.arguments(["--model", "m", "--sources", "mind", "goodreads", "cds", "mind+cds", "--targets",
                                      "mind", "goodreads", "cds", "--out", "x", "--k", "1", "3"])
    table = {"zero-shot": [0.9, 0.9, 0.9], "mind": [0.70, 0.60, 0.58], "goodreads": [0.60, 0.72, 0.58],
             "cds": [0.55, 0.62, 0.69], "mind+cds": [0.9, 0.9, 0.9]}
    samples = {}
    for source, values in table.items():
        for target, value in zip(args.targets, values):
            samples[source, target] = np.full(1001, value)
    samples["goodreads", "mind"][1:101] = 0.5  # in a tenth of the draws it is second on mind
    rra = transfer_matrix.rank_averages(args, samples)
    assert list(rra) == ["mind", "goodreads", "cds"]
    # on cds mind and goodreads tie, so each is first half of the time
    assert rra["mind"]["1"] == {"value": 0.25, "ci": [0.25, 0.25]}
    assert rra["goodreads"]["1"] == {"value": 0.75, "ci": [0.25, 0.75]}
    assert rra["cds"]["1"] == {"value": 0.5, "ci": [0.5, 1.0]} and rra["cds"]["3"]["value"] == 0.75
    samples["goodreads", "mind"][1:101] = np.nan  # undefined draws are left out
    rra = transfer_matrix.rank_averages(args, samples)
    assert rra["goodreads"]["1"]["ci"] == [0.75, 0.75] and rra["cds"]["1"]["ci"] == [0.5, 0.5]
    del samples["mind", "cds"]  # a target with an empty cell is left out
    assert transfer_matrix.rank_averages(args, samples)["goodreads"]["1"]["value"] == 1


def test_joint_gain_is_h_minus_g_over_the_same_users():
    rng = np.random.default_rng(0)
    users = np.r_[0, rng.normal(size=1000)]  # what all models share
    samples = {("h", "x"): 0.7 + users, ("g1", "x"): 0.5 + users, ("g2", "x"): 0.6 + users, ("h", "y"): 0.7 + users}
    cells = [{"source": source, "target": target, "setting": source[0].upper()} for source, target in samples]
    cells.append({"source": "g1", "target": "y", "setting": "G"})  # failed: an empty cell
    gain = transfer_matrix.joint_gain(cells, samples)
    assert list(gain) == ["x"] and gain["x"]["value"] == pytest.approx(0.15)
    assert gain["x"]["ci"] == pytest.approx([0.15, 0.15])  # a difference in every draw alike


def test_joint_gain_is_said_or_said_to_be_missing(data, tmp_path, monkeypatch):
    Fakes(monkeypatch)
    assert run_matrix(data, tmp_path, sources=["shop"]) == 0
    assert "no target has cells of both" in (tmp_path / "matrix.md").read_text()
    assert run_matrix(data, tmp_path, sources=["news-a+shop", "books-a+shop"]) == 0
    assert list(read_matrix(tmp_path)[0]["joint_gain"]) == ["news-a", "books-a"]
    assert re.search(r"H - G on books-a, .*: [+-]0\.\d{3} \[", (tmp_path / "matrix.md").read_text())


def test_similarity_and_its_rank_correlation(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else len(source + target) / 5)
    model = tiny.build("llama", tmp_path / "model")
    assert run_matrix(data, tmp_path / "out", "--model", model) == 0
    matrix, cells = read_matrix(tmp_path / "out")
    pairs = [cell for cell in matrix["cells"] if "similarity" in cell]
    assert [(cell["source"], cell["target"]) for cell in pairs] == [
        (source, target) for source in ("news-a", "news-b", "shop") for target in TARGETS if source != target]
    means = []
    scorer = common.load_scorer(transfer_matrix.arguments(["--model", model, "--sources", "x", "--targets", "x", "--out", "x",
                                                           "--type", "embed", "--device", "cpu"]))
    for name in ("news-a", "books-a"):
        texts = list(common.read_items(data, name).values())
        with torch.inference_mode():
            vectors = [common.embed(scorer, common.encode_items(scorer, [text]))[0].numpy() for text in texts]
        means.append(np.mean(vectors, axis=0))
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert cells["news-a"]["books-a"]["similarity"] == pytest.approx(cosine, abs=1e-5)
    rho = transfer_matrix.rank_correlation(np.array([cell["similarity"] for cell in pairs]),
                                           np.array([cell["gain"]["value"] for cell in pairs]))
    assert matrix["similarity"] == {"pairs": 9, "rank_correlation": rho}
    assert f"9 pairs of single source and other target: {rho:+.2f}." in (tmp_path / "out/matrix.md").read_text()


def test_similarity_that_fails_leaves_the_matrix(data, tmp_path, monkeypatch, capsys):
    Fakes(monkeypatch)  # --model m is not there
    assert run_matrix(data, tmp_path / "out") == 0
    assert "no similarity of the datasets: model m cannot be used" in capsys.readouterr().err
    assert "over 0 pairs of single source and other target: undefined." in (tmp_path / "out/matrix.md").read_text()


def test_rank_correlation_by_hand():
    def rho(*pairs):
        return transfer_matrix.rank_correlation(*np.array(pairs, float).reshape(-1, 2).T)
    assert rho((1, 5), (2, 6), (3, 7)) == pytest.approx(1) and rho((1, 7), (2, 6), (30, 5)) == pytest.approx(-1)
    intelligence = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]  # Wikipedia's example
    television = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert rho(*zip(intelligence, television)) == pytest.approx(-29 / 165)
    assert rho((1, 1), (2, 2), (2, 3), (4, 4)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4
    assert rho((1, 1), (1, 2), (1, 3)) is None and rho((1, 1), (2, 2)) is None and rho() is None

# -------------------------------------------------------------------------------------------------- picture, comparison


def test_svg_is_valid_whatever_the_names(data, tmp_path, monkeypatch):
    Fakes(monkeypatch, lambda source, target: 0 if source == "zero-shot" else 1 if target in source else -1)
    assert run_matrix(data, tmp_path) == 0
    matrix = read_matrix(tmp_path)[0]
    name = 'a "<b>&\' '
    nasty = json.loads(json.dumps({**matrix, "model": name}).replace('"shop', '"' + json.dumps(name)[1:-1]))
    for this in (matrix, nasty):
        root = ElementTree.fromstring(transfer_matrix.draw_svg(this))
        elements = [element for element in root.iter() if element.tag.endswith("text")]
        texts = [element.text or "" for element in elements]
        assert texts.count("C") == texts.count("H") == 3 and "news" in texts
        assert {f"{cell['value']:.3f}" for cell in this["cells"]} <= set(texts)
        for sign, mark in ("▲", "better"), ("▼", "worse"):
            assert texts.count(sign) == sum(cell["mark"] == mark for cell in this["cells"]) > 0
        width, height = float(root.get("width")), float(root.get("height"))
        for element in elements:
            assert 0 <= float(element.get("x")) <= width and 0 <= float(element.get("y")) <= height
    assert name.strip() in " ".join(texts)


def luminance(red, green, blue):
    """Relative luminance of a colour (WCAG 2)."""
    parts = np.array([red, green, blue]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_numbers_can_be_read_on_every_colour():
    for gain in np.linspace(-1, 1, 81):
        cell = {"setting": "C", "value": 0.5, "gain": {"value": gain, "ci": [0, 1]}, "mark": "better"}
        svg = "".join(transfer_matrix.draw_cell(0, 0, cell, 1.0))
        ground = [int(part) for part in re.search(r"rgb\((\d+),(\d+),(\d+)\)", svg).groups()]
        inks = set(re.findall('fill="#([0-9a-f]{6})"', svg))
        assert len(inks) == 1
        dark, light = sorted([luminance(*ground), luminance(*bytes.fromhex(inks.pop()))])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (gain, ground)
        assert gain == 0 or (ground[2] > ground[0]) == (gain > 0)  # blue better, orange worse


def write_matrix(folder, values, metric="auc", model="m", data_sha256="0", history="own"):
    """A matrix.json with nothing but values, {source: (on news-a, on books-a)}. Returns the folder."""
    cells = []
    for source, row in values.items():
        train = [] if source == "zero-shot" else source.split("+")
        for target, value in zip(("news-a", "books-a"), row):
            cells.append({"source": source, "target": target, "setting": common.setting_of(train, target),
                          "value": value, "data_sha256": data_sha256, "n_users": 9, "split": "test",
                          "history": history})
    common.write_json(folder / "matrix.json", {"model": model, "type": "prompt", "metric": metric, "cells": cells})
    return str(folder)


def test_compare_models_by_setting(tmp_path, capsys):
    small = write_matrix(tmp_path / "s", {
        "zero-shot": (0.50, 0.52), "shop": (0.40, 0.50), "news-b": (0.7, 0.6), "news-a+shop": (0.70, 0.60)})
    large = write_matrix(tmp_path / "l", model="large", values={
        "zero-shot": (0.60, 0.62), "shop": (0.50, None), "news-b": (0.8, 0.8), "news-a+shop": (0.90, None)})

    def compare(*folders):
        code = common.run_script(transfer_matrix.main, ["--compare", *folders])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return code, captured.err, [[word.strip() for word in line.split("|")[1:-1]] for line in lines]
    code, _, lines = compare(small, large)
    assert code == 0
    assert lines[0] == ["auc", "A/B (2)", "D (1)", "F (2)", "H (1)"]  # G on books-a is empty in one
    # F: shop and news-b are means of their own target first: (0.40 + 0.60) / 2 and (0.50 + 0.80) / 2
    assert lines[2] == [f"m, prompt ({small})", "0.510", "0.700", "0.500", "0.700"]
    assert lines[3] == [f"large, prompt ({large})", "0.610", "0.800", "0.650", "0.900"]
    code, err, _ = compare(small, write_matrix(tmp_path / "e", {"zero-shot": (0.5, 0.5)}, data_sha256="1"))
    assert code == 2 and "share no cell" in err
    code, err, _ = compare(small, write_matrix(tmp_path / "h", {"zero-shot": (0.5, 0.5)}, history="other"))
    assert code == 2 and "share no cell" in err
    code, err, _ = compare(small, write_matrix(tmp_path / "o", {"zero-shot": (0.5, 0.5)}, metric="mrr"))
    assert code == 2 and "share no cell: their metrics" in err and err.count("\n") == 1
    assert compare(str(tmp_path))[0] == 2
    for content in ("{}", "[1]"):
        (tmp_path / "matrix.json").write_text(content)
        code, err, _ = compare(small, str(tmp_path))
        assert code == 2 and "was not made by transfer_matrix.py" in err

# ------------------------------------------------------------------------------------------------------------ for real


def test_a_tiny_model_from_training_to_picture(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["--model", tiny.build("llama", tmp_path / "model"), "--sources", "shop", "news-a+shop", "--targets", "shop",
            "books-a", "--out", str(out), "--data", data, "--device", "cpu", "--finetune-args=--epochs 1 --lora-r 4",
            "--evaluate-args=--limit-users 30"]
    assert common.run_script(transfer_matrix.main, argv) == 0
    first = {path.name: path.read_bytes() for path in out.glob("matrix.*")}
    matrix, cells = read_matrix(out)
    assert cells["shop"]["books-a"]["n_users"] == 30 and matrix["runs"]["shop"]["samples"] == 320
    assert [cells["news-a+shop"][target]["setting"] for target in ("shop", "books-a")] == ["H", "G"]

    capsys.readouterr()
    monkeypatch.setattr(finetune, "main", None)
    monkeypatch.setattr(evaluate, "main", None)
    assert common.run_script(transfer_matrix.main, argv) == 0 and not commands_in(capsys.readouterr().out)
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first
    assert common.run_script(transfer_matrix.main, [*argv, "--seed", "1"]) == 2  # nothing is run or replaced
    assert {path.name: path.read_bytes() for path in out.glob("matrix.*")} == first
