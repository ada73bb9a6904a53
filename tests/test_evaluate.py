"""evaluate.py: what it writes, how it continues, what it refuses."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers

import common
import evaluate

ROOT = Path(__file__).parent.parent
TITLES = ["the red moon", "old river song", "storm king", "blue garden", "queen of night", "shadow", "light", "stone"]


def write_dataset(data, name, n_users, sha="0", n_candidates=4, train=True):
    """A prepared dataset of made-up users, written plainly."""
    folder = Path(data, name)
    folder.mkdir(parents=True, exist_ok=True)
    items = [{"id": f"i{i}", "text": text} for i, text in enumerate(TITLES)]
    rng = np.random.default_rng(0)
    users = []
    for n in range(n_users):
        chosen = [f"i{i}" for i in rng.permutation(len(TITLES))]
        labels = [1, 0] + rng.integers(0, 2, n_candidates - 2).tolist()
        candidates, history = chosen[:n_candidates], chosen[n_candidates - 1:]  # one item is in both
        users.append({"user": f"u{n}", "history": history, "candidates": candidates, "labels": labels})
    splits = {"test": users, **({"train": users[:5]} if train else {})}
    for split, rows in {"items": items, **splits}.items():
        Path(folder, f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {split: {"users": len(rows)} for split, rows in splits.items()}
    meta = {"format": 1, "dataset": name, "sha256": sha, "splits": sizes}
    Path(folder, "meta.json").write_text(json.dumps(meta))
    return users


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models by family."""
    return {family: tiny.build(family, tmp_path_factory.mktemp(family)) for family in ("llama", "bert", "bert-encoder")}


@pytest.fixture
def data(tmp_path):
    write_dataset(tmp_path / "data", "mind", 10)
    return tmp_path / "data"


def run(data, *argv):
    """Exit code of a command line in this process."""
    return common.run(evaluate.main, ["--data", str(data), "--device", "cpu", *map(str, argv)])


def error_of(capsys, *argv):
    """The one line on standard error of a command line that must end with exit code 2."""
    capsys.readouterr()
    assert run(*argv) == 2
    *rest, last = capsys.readouterr().err.strip().split("\n")
    assert last.startswith("error: ") and not [line for line in rest if line.startswith(("error", "Traceback"))]
    return last


def start(data, *argv, before="pass", **options):
    """A command line in a process of its own, with a statement run first."""
    code = f"import os, signal, sys, common, evaluate\n{before}\nsys.exit(common.run(evaluate.main))"
    return subprocess.run([sys.executable, "-c", code, "--data", data, "--device", "cpu", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, **options)


def test_results_hold_scores_metrics_cost_and_arguments(data, tmp_path, folders, capsys):
    assert run(data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path / "out") == 0
    assert "| mind " in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["mind.json", "mind.scores.jsonl"]
    result = json.loads(Path(tmp_path, "out", "mind.json").read_text())
    lines = [json.loads(line) for line in Path(tmp_path, "out", "mind.scores.jsonl").read_text().splitlines()]
    users = [json.loads(line) for line in Path(data, "mind", "test.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines] == [user["user"] for user in users]
    texts = dict(zip((f"i{i}" for i in range(8)), TITLES))
    flags = ["--model", folders["llama"], "--test", "x", "--out", "y", "--device", "cpu"]
    scorer = common.load_scorer(evaluate.arguments(flags))
    one_by_one = [common.score_prompts(scorer, [([texts[i] for i in user["history"]], [texts[i]])])[0][0]
                  for user in users for i in user["candidates"]]
    scores = np.concatenate([line["scores"] for line in lines])
    assert np.abs(scores - one_by_one).max() < 1e-5 and np.std(scores) > 0.05
    labels = np.concatenate([user["labels"] for user in users])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    assert (result["n_users"], result["n_samples"], result["n_positives"]) == (10, 40, labels.sum())
    for key in ("dataset", "split", "setting", "type", "model", "adapter", *common.METRIC_NAMES, "ci", "users_counted",
                "truncated", "seconds", "samples_per_s", "tokens_scored", "tokens_unpacked", "peak_memory_gb",
                "data_sha256", "seed", "arguments", "versions"):
        assert key in result
    assert (result["setting"], result["truncated"]) == ("A", {"texts": 0, "histories": 0, "halved": 0})
    assert result["tokens_scored"] < result["tokens_unpacked"] and result["logloss"] > 0


def test_nothing_is_scored_twice_or_taken_for_something_else(data, tmp_path, folders, monkeypatch, capsys):
    command = [data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path / "out"]
    assert run(*command) == 0
    result, scores = tmp_path / "out" / "mind.json", tmp_path / "out" / "mind.scores.jsonl"
    before = result.read_bytes(), scores.read_bytes()
    monkeypatch.setattr(common, "load_scorer", None)
    assert run(*command) == 0 and (result.read_bytes(), scores.read_bytes()) == before
    assert "other arguments or data" in error_of(capsys, *command, "--max-length", 99)
    assert "other arguments or data" in error_of(capsys, data, "--model", "random", *command[3:])
    write_dataset(data, "mind", 10, sha="1")
    assert "other arguments or data" in error_of(capsys, *command)
    write_dataset(data, "mind", 10)
    write_dataset(data, "pens", 4)
    assert run(data, "--model", "random", "--test", "mind", "pens", "--out", tmp_path / "two") == 0
    assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path / "two") == 0  # now evaluated alone
    assert json.loads((tmp_path / "two" / "mind.json").read_text())["setting"] == "A"
    result.unlink()  # scores that nothing vouches for
    assert "nothing says how" in error_of(capsys, *command) and scores.read_bytes() == before[1]
    assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path / "out", "--overwrite") == 0
    assert json.loads(result.read_text())["model"] == "random" and scores.read_bytes() != before[1]


def test_what_is_in_the_way_of_a_later_dataset_shows_before_the_first_is_scored(data, tmp_path, capsys):
    write_dataset(data, "pens", 4)
    assert run(data, "--model", "random", "--test", "pens", "--out", tmp_path / "out") == 0
    command = [data, "--model", "overlap", "--test", "mind", "pens", "--out", tmp_path / "out"]
    assert "pens.json" in error_of(capsys, *command)
    assert not Path(tmp_path, "out", "mind.json").exists()


@pytest.mark.parametrize("kill", ["os.kill(os.getpid(), signal.SIGKILL)", "signal.raise_signal(signal.SIGINT)"])
def test_a_killed_or_interrupted_run_continues(data, tmp_path, folders, kill, monkeypatch, capsys):
    command = ["--model", folders["llama"], "--test", "mind", "--out"]
    assert run(data, *command, tmp_path / "whole") == 0
    third = f"""signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
evaluate.CHUNK, score, calls = 2, common.score_prompts, []
def dying(scorer, users):
    calls.append(1)
    if len(calls) == 5:  # 2 calls check the packing
        {kill}
    return score(scorer, users)
common.score_prompts = dying"""
    ended = start(data, *command, tmp_path / "out", before=third)
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["mind.part.json", "mind.scores.jsonl.part"]
    if "SIGINT" in kill:
        assert ended.returncode == 130 and "Traceback" not in ended.stderr and "interrupted" in ended.stderr
    else:
        assert ended.returncode == -signal.SIGKILL
    part = out / "mind.scores.jsonl.part"
    assert len(part.read_bytes().splitlines()) == 4
    with open(part, "ab") as file:
        file.write(b'{"user": "u4", "scores": [0.25, 1')  # torn
    assert "mind.part.json was made with other" in error_of(capsys, data, *command, out, "--seed", 1)
    assert run(data, *command, out) == 0 and "continuing after 4 users" in capsys.readouterr().err
    assert sorted(os.listdir(out)) == ["mind.json", "mind.scores.jsonl"]
    got, want = ([json.loads(line) for line in Path(folder, "mind.scores.jsonl").read_text().splitlines()]
                 for folder in (out, tmp_path / "whole"))
    assert [line["user"] for line in got] == [line["user"] for line in want]
    assert np.abs(np.array([line["scores"] for line in got]) - [line["scores"] for line in want]).max() < 1e-5
    assert json.loads((out / "mind.json").read_text())["users_resumed"] == 4


def test_a_run_killed_between_scores_and_result_computes_the_metrics_only(data, tmp_path, monkeypatch):
    command = [data, "--model", "overlap", "--test", "mind", "--out", tmp_path]
    write_json = common.write_json
    monkeypatch.setattr(common, "write_json",
                        lambda path, value: write_json(path, value) if "part" in path.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*command)
    assert sorted(os.listdir(tmp_path)) == ["data", "mind.part.json", "mind.scores.jsonl"]
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "baseline", None)
    assert run(*command) == 0 and json.loads(Path(tmp_path, "mind.json").read_text())["users_resumed"] == 10


def test_a_file_size_limit_is_one_line_and_the_run_continues(tmp_path):
    users = write_dataset(tmp_path / "data", "mind", 400)
    command = ["--model", "random", "--test", "mind", "--out", tmp_path / "out"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    ended = start(tmp_path / "data", *command, before=limit)
    assert ended.returncode == 2 and "File too large" in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stderr.strip().split("\n")[-1].startswith("error: ")
    assert run(tmp_path / "data", *command) == 0
    lines = [json.loads(line) for line in Path(tmp_path, "out", "mind.scores.jsonl").read_text().splitlines()]
    for user, line in zip(users, lines, strict=True):
        scores = [common.digest(2025, "mind", user["user"], "random", item) / 2**64 for item in user["candidates"]]
        assert line == {"user": user["user"], "scores": scores}


def test_errors_that_the_user_can_mend(data, tmp_path, folders, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = ["--out", tmp_path / "out"]

    def error(*argv):
        return error_of(capsys, data, *argv, *out)
    assert "run: python prepare_data.py movielens --raw" in error("--model", "random", "--test", "movielens")
    assert "prepare_data.py demo" in error("--model", "random", "--test", "shop")
    unknown = error("--model", "random", "--test", "movies")
    assert "'movies'" in unknown and all(name in unknown for name in [*common.DATASETS, *common.DEMO])
    assert "no valid split" in error("--model", "random", "--test", "mind", "--split", "valid")
    assert "no/such/model cannot be loaded" in error("--model", "no/such/model", "--test", "mind")
    assert "cannot be loaded" in error("--model", tmp_path / "nothing", "--test", "mind")
    assert "has no LM head" in error("--model", folders["bert-encoder"], "--test", "mind")
    llama = ["--model", folders["llama"], "--test", "mind"]
    assert "run.json is missing" in error(*llama, "--adapter", tmp_path / "nothing")
    (tmp_path / "prompt.json").write_text('{"itme": "{text}"}')
    assert "keys out of item" in error(*llama, "--prompt", tmp_path / "prompt.json")
    assert "no.json is missing" in error(*llama, "--prompt", tmp_path / "no.json")
    assert "--bogus" in error("--model", "random", "--test", "mind", "--bogus", 1)
    assert "'0' is not a whole number of at least 1" in error("--model", "random", "--test", "mind", "--limit-users", 0)
    assert "below 2**31" in error("--model", "random", "--test", "mind", "--seed", 10**20)
    assert "no dataset" in error_of(capsys, tmp_path, "--model", "random", "--test", "all", *out)
    (tmp_path / "file").write_text("")
    assert "file' is a file; it takes a folder" in error("--model", "random", "--test", "mind", "--out", tmp_path / "file")
    if not torch.cuda.is_available():
        assert "torch sees no CUDA GPU" in error(*llama, "--device", "cuda:1")
    assert "file" in error_of(capsys, data, "--model", "random", "--test", "mind", "--out", tmp_path / "file" / "out")
    assert not list((tmp_path / "out").glob("*.json"))


def test_broken_data_is_one_line(data, tmp_path, capsys):
    command = [data, "--model", "overlap", "--test", "mind", "--out"]
    user = {"user": "u0", "history": ["i0"], "candidates": ["i1"]}
    for labels in ({}, {"labels": [1, 0]}, {"labels": [], "candidates": []}):
        Path(data, "mind", "test.jsonl").write_text(json.dumps({**user, **labels}))
        assert "test.jsonl, line 1: a user has candidates, " in error_of(capsys, *command, tmp_path / "u")
    Path(data, "mind", "test.jsonl").write_text(json.dumps({**user, "history": ["nope"], "labels": [1]}))
    assert "user 'u0' has item 'nope', which items.jsonl lacks" in error_of(capsys, *command, tmp_path / "i")
    Path(data, "mind", "test.jsonl").write_text('{"user": "u0", "hist\n')
    assert "test.jsonl, line 1" in error_of(capsys, *command, tmp_path / "a")
    Path(data, "mind", "test.jsonl").write_text("")
    assert "is empty" in error_of(capsys, *command, tmp_path / "b")
    Path(data, "mind", "meta.json").write_text('{"format": 0}')
    assert "format 0" in error_of(capsys, *command, tmp_path / "c")


def test_nan_scores_are_an_error(data, tmp_path, folders, capsys):
    network = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        network.model.norm.weight.fill_(float("nan"))
    network.save_pretrained(tmp_path / "broken")
    tiny.byte_level().save_pretrained(tmp_path / "broken")
    for kind in ("prompt", "embed"):
        assert "40 of 40 scores are NaN" in error_of(capsys, data, "--model", tmp_path / "broken", "--test", "mind",
                                                     "--type", kind, "--out", tmp_path / kind)
        assert sorted(os.listdir(tmp_path / kind)) == ["mind.part.json", "mind.scores.jsonl.part"]
        assert not Path(tmp_path, kind, "mind.scores.jsonl.part").read_text()


def test_an_adapter_is_scored_with_its_own_base_model_only(data, tmp_path, folders, capsys):
    network = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]),
                                  peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    network.save_pretrained(tmp_path / "run")
    record = {"model": folders["llama"], "type": "prompt", "train_chain": ["pens"], "valid_chain": ["mind"],
              "arguments": {"prompt": {**common.PROMPT, "join": ";"}}}
    Path(tmp_path, "run", "run.json").write_text(json.dumps({**record, "finished": False}))
    command = [data, "--test", "mind", "--adapter", tmp_path / "run", "--out", tmp_path / "out", "--model"]
    assert "unfinished" in error_of(capsys, *command, folders["llama"])
    Path(tmp_path, "run", "run.json").write_text(json.dumps({**record, "finished": True}))
    assert "is an adapter for --model" in error_of(capsys, *command, folders["bert"])
    assert "is an adapter for --model" in error_of(capsys, *command, folders["llama"], "--type", "embed")
    assert run(*command, folders["llama"]) == 0
    result = json.loads(Path(tmp_path, "out", "mind.json").read_text())
    said = capsys.readouterr().err
    assert result["setting"] == "D" and "chose this checkpoint" in said and "another --prompt" in said
    assert run(data, "--test", "mind", "--model", folders["llama"], "--out", tmp_path / "base") == 0
    tuned, base = (Path(tmp_path, folder, "mind.scores.jsonl").read_text() for folder in ("out", "base"))
    assert tuned != base


@pytest.mark.parametrize("file, old, new", [
    ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'),
    ("tokenizer_config.json", '{', '{"chat_template": "{{ messages[0].content }}",')])
def test_a_model_whose_files_have_changed_is_another_one(data, tmp_path, folders, capsys, file, old, new):
    shutil.copytree(folders["llama"], tmp_path / "model")
    command = [data, "--model", tmp_path / "model", "--test", "mind", "--out", tmp_path / "out"]
    assert run(*command) == 0
    text = (tmp_path / "model" / file).read_text()
    assert old in text
    (tmp_path / "model" / file).write_text(text.replace(old, new, 1))
    assert "other arguments or data" in error_of(capsys, *command)


def test_popularity_counts_training_users_or_else_the_other_histories(data, tmp_path):
    users = write_dataset(data, "mind", 10)
    assert run(data, "--model", "popularity", "--test", "mind", "--out", tmp_path / "train") == 0
    assert run(data, "--model", "popularity", "--test", "mind", "--split", "train", "--out", tmp_path / "itself") == 0
    write_dataset(data, "pens", 10, train=False)
    assert run(data, "--model", "popularity", "--test", "pens", "--out", tmp_path / "others") == 0
    for folder, name in (("train", "mind"), ("itself", "mind"), ("others", "pens")):
        lines = Path(tmp_path, folder, f"{name}.scores.jsonl").read_text().splitlines()
        scored = users[:5] if folder == "itself" else users
        for user, line in zip(scored, lines, strict=True):
            if folder == "train":
                liked = [u["history"] + [i for i, l in zip(u["candidates"], u["labels"]) if l] for u in users[:5]]
            else:
                liked = [u["history"] for u in scored if u is not user]
            assert json.loads(line)["scores"] == [sum(some.count(i) for some in liked) for i in user["candidates"]]


def test_embedding_scores_all_datasets_and_a_limit_of_users(data, tmp_path, folders, capsys):
    write_dataset(data, "pens", 7)
    assert run(data, "--model", folders["bert-encoder"], "--type", "embed", "--test", "all", "--limit-users", 5,
               "--out", tmp_path / "out") == 0
    assert "not prepared, so not evaluated" in capsys.readouterr().err
    for name in ("mind", "pens"):
        result = json.loads(Path(tmp_path, "out", f"{name}.json").read_text())
        assert (result["n_users"], result["setting"], result["logloss"]) == (5, "B", None)
        scores = [s for line in Path(tmp_path, "out", f"{name}.scores.jsonl").read_text().splitlines()
                  for s in json.loads(line)["scores"]]
        assert len(set(scores)) > 10 and max(map(abs, scores)) <= 1 + 1e-9


def test_scores_that_do_not_fit_the_split_are_refused(data, tmp_path):
    for lines in (9, 11):
        path = tmp_path / "scores.jsonl"
        path.write_text("".join(json.dumps({"user": f"u{n}", "scores": [0, 1, 2, 3]}) + "\n" for n in range(lines)))
        with pytest.raises(common.UserError, match="does not fit"):
            evaluate.read_scores(path, data, "mind", "test")
    path.write_text("".join(json.dumps({"user": f"u{n}", "scores": [0, 1, 2, 3]}) + "\n" for n in range(10)))
    scores, labels, users = evaluate.read_scores(path, data, "mind", "test")
    assert (len(scores), labels.sum() > 10, users[-1]) == (40, True, 9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "llama"])
def test_memory_does_not_grow_with_the_test_set(tmp_path, folders, kind):
    peak = {}
    report = """import re  # VmHWM: ru_maxrss would begin at that of the parent process
rss = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
summarize = evaluate.summarize
def told(*args, **options):
    before, result = rss(), summarize(*args, **options)
    print("peak", before, rss())
    return result
evaluate.summarize = told"""
    for n in (1000, 50000):
        write_dataset(tmp_path / str(n), "mind", n, n_candidates=2)
        ended = start(tmp_path / str(n), "--model", folders.get(kind, kind), "--test", "mind", "--out",
                      tmp_path / f"{n}.out", before=report, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.returncode == 0, ended.stderr
        peak[n] = [float(x) for x in ended.stdout.split("peak", 1)[1].split()[:2]]
    samples = 2 * 49000
    (small, with_metrics), (large, with_more) = peak.values()
    print(f"{kind}: MB after scoring {small:.0f} and {large:.0f}; with metrics {with_metrics:.0f} and {with_more:.0f}: "
          f"{(with_more - with_metrics) * 2**20 / samples:.0f} bytes a sample")
    assert large < small + 20  # MB, for 50 times the users
    assert with_more < with_metrics + 20 + samples * 1000 / 2**20
