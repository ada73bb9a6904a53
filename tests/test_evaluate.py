"""evaluate.py: what it writes, how it continues, what it refuses, the baselines, the controls."""
import json
import math
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


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_dataset(data, name, n_users, seed=0, n_candidates=4, train=True):
    """A prepared dataset of made-up users, written plainly. Returns its users."""
    rng = np.random.default_rng(seed)
    users = []
    for n in range(n_users):
        chosen = [f"i{i}" for i in rng.permutation(len(TITLES))]
        labels = [1, 0] + rng.integers(0, 2, n_candidates - 2).tolist()
        candidates, history = chosen[:n_candidates], chosen[n_candidates - 1:]  # one item is in both
        users.append({"user": f"u{n}", "history": history, "candidates": candidates, "labels": labels})
    folder = Path(data, name)
    write_jsonl(folder / "items.jsonl", [{"id": f"i{i}", "text": text} for i, text in enumerate(TITLES)])
    write_jsonl(folder / "test.jsonl", users)
    if train:
        write_jsonl(folder / "train.jsonl", users[:5])
    domain = common.DOMAINS.get(name, "book")
    (folder / "meta.json").write_text(json.dumps({"format": 1, "domain": domain}))
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
    return common.run_script(evaluate.main, ["--data", str(data), "--device", "cpu", *map(str, argv)])


def error_of(capsys, *argv):
    """The one line on standard error of a command line that must end with exit code 2."""
    capsys.readouterr()
    assert run(*argv) == 2
    *others, last = capsys.readouterr().err.strip().split("\n")
    assert last.startswith("error: ") and not [line for line in others if line.startswith(("error", "Traceback"))]
    return last


def start(data, *argv, before="pass", **options):
    """A command line in a process of its own, with a statement run first."""
    code = f"import os, signal, sys, common, evaluate\n{before}\nsys.exit(common.run_script(evaluate.main))"
    return subprocess.run([sys.executable, "-c", code, "--data", data, "--device", "cpu", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, **options)


def scores_in(folder, name="mind"):
    """[scores] of the users of a scores file, whose first line holds the job."""
    job, *lines = read_jsonl(Path(folder, f"{name}.scores.jsonl"))
    assert list(job) == ["job", "users"] and job["users"] >= len(lines)
    return [line["scores"] for line in lines]


# ----------------------------------------------------------------------------------------------------------- the results


def test_results_hold_scores_metrics_cost_and_arguments(data, tmp_path, folders, capsys):
    assert run(data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path / "out") == 0
    assert "| mind " in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["mind.json", "mind.scores.jsonl"]
    result = json.loads(Path(tmp_path, "out", "mind.json").read_text())
    users = read_jsonl(data / "mind/test.jsonl")
    lines = read_jsonl(tmp_path / "out/mind.scores.jsonl")[1:]
    assert [line["user"] for line in lines] == [user["user"] for user in users]

    texts = {f"i{i}": text for i, text in enumerate(TITLES)}
    flags = ["--model", folders["llama"], "--test", "x", "--out", "y", "--device", "cpu"]
    scorer = common.load_scorer(evaluate.arguments(flags))
    one_by_one = []
    for user in users:
        for item in user["candidates"]:
            alone = {"user": "", "history": [texts[i] for i in user["history"]], "candidates": [texts[item]]}
            one_by_one.append(common.score_prompts(scorer, [alone])[0][0][0])
    scores = np.concatenate(scores_in(tmp_path / "out"))
    assert np.abs(scores - one_by_one).max() < 1e-5 and np.std(scores) > 0.05

    labels = np.concatenate([user["labels"] for user in users])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    assert (result["n_users"], result["n_samples"], result["n_positives"]) == (10, 40, labels.sum())
    for key in ("dataset", "split", "type", "model", "adapter", *common.METRIC_NAMES, "ci", "users_counted",
                "truncated", "seconds", "samples_per_s", "tokens_scored", "tokens_unpacked", "peak_memory_gb",
                "data_sha256", "seed", "arguments", "versions"):
        assert key in result
    assert "setting" not in result  # it is worked out where a table is printed
    assert (result["layout"], result["pooling"], result["commit"]) == ("packed", None, None)
    assert result["truncated"] == {"texts": 0, "histories": 0}
    assert result["tokens_scored"] < result["tokens_unpacked"]


def test_histories_that_were_cut_are_counted(data, tmp_path, folders, capsys):
    assert run(data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path, "--max-length", 55) == 0
    dropped = [line.get("dropped", 0) for line in read_jsonl(tmp_path / "mind.scores.jsonl")[1:]]
    result = json.loads((tmp_path / "mind.json").read_text())
    assert result["truncated"]["histories"] == sum(n > 0 for n in dropped) > 0
    assert "histories were cut to fit" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_all_datasets_and_a_limit_of_users(data, tmp_path, folders, capsys, kind):
    write_dataset(data, "pens", 7)
    assert run(data, "--model", folders["bert"], "--type", kind, "--test", "all", "--limit-users", 5,
               "--out", tmp_path / "out") == 0
    assert "not prepared, so not evaluated" in capsys.readouterr().err
    for name in ("mind", "pens"):
        assert json.loads(Path(tmp_path, "out", f"{name}.json").read_text())["n_users"] == 5
        assert len(set(np.concatenate(scores_in(tmp_path / "out", name)))) > 10


@pytest.mark.parametrize("scores, collapsed", [("random", True), ("labels", False)])
def test_collapse_is_said(tmp_path, capsys, monkeypatch, scores, collapsed):
    """Group AUC's interval holds 0.5 and is narrower than 0.1: as on the demo with its 250 users."""
    users = write_dataset(tmp_path / "data", "mind", 700, n_candidates=7)
    if scores == "labels":
        monkeypatch.setattr(evaluate, "baseline_scores", lambda args, name, batch, readers: [
            np.array(user["labels"], float) for user in batch])
    assert len(users) == 700 and run(tmp_path / "data", "--model", "random", "--test", "mind", "--out", tmp_path) == 0
    assert json.loads((tmp_path / "mind.json").read_text())["collapsed"] == collapsed
    assert ("cannot be told from chance (0.5)" in capsys.readouterr().err) == collapsed


# ---------------------------------------------------------------------------------------------- continuing, overwriting


def test_nothing_is_scored_twice_or_taken_for_something_else(data, tmp_path, folders, monkeypatch, capsys):
    command = [data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path / "out"]
    assert run(*command) == 0
    result, scores = tmp_path / "out" / "mind.json", tmp_path / "out" / "mind.scores.jsonl"
    before = result.read_bytes(), scores.read_bytes()
    monkeypatch.setattr(common, "load_scorer", None)
    assert run(*command) == 0 and (result.read_bytes(), scores.read_bytes()) == before
    assert "made with a different max_length" in error_of(capsys, *command, "--max-length", 99)
    assert "made with a different" in error_of(capsys, data, "--model", "random", *command[3:])
    write_dataset(data, "mind", 10, seed=1)
    assert "made with a different data_sha256" in error_of(capsys, *command)
    assert (result.read_bytes(), scores.read_bytes()) == before
    assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path / "out", "--overwrite") == 0
    assert json.loads(result.read_text())["model"] == "random" and scores.read_bytes() != before[1]


def test_overwrite_removes_nothing_before_there_is_something_in_its_place(data, tmp_path, folders, capsys):
    command = [data, "--test", "mind", "--out", tmp_path / "out", "--model"]
    assert run(*command, folders["llama"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "cannot be used" in error_of(capsys, *command, "misspelt/model", "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_foreign_scores_file_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "mind.scores.jsonl").write_text('{"user": "u0", "scores": [1]}\n')
    assert "was not made by this script" in error_of(capsys, data, "--model", "random", "--test", "mind", "--out", tmp_path)
    assert "scores" in (tmp_path / "mind.scores.jsonl").read_text()


def test_what_is_in_the_way_of_a_later_dataset_shows_before_the_first_is_scored(data, tmp_path, capsys):
    write_dataset(data, "pens", 4)
    assert run(data, "--model", "random", "--test", "pens", "--out", tmp_path / "out") == 0
    command = [data, "--model", "popularity", "--test", "mind", "pens", "--out", tmp_path / "out"]
    assert "out/pens was made with a different model" in error_of(capsys, *command)
    assert not Path(tmp_path, "out", "mind.json").exists()


@pytest.mark.parametrize("kill", ["os.kill(os.getpid(), signal.SIGKILL)", "signal.raise_signal(signal.SIGINT)"])
def test_a_killed_or_interrupted_run_continues_after_its_last_whole_line(data, tmp_path, folders, kill, capsys):
    command = ["--model", folders["llama"], "--test", "mind", "--max-tokens", 512, "--out"]  # two users per call
    assert run(data, *command, tmp_path / "whole") == 0
    third = f"""signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
score, calls = common.score_prompts, []
def dying(scorer, users):
    calls.append(1)
    if len(calls) == 3:
        {kill}
    return score(scorer, users)
common.score_prompts = dying"""
    ended = start(data, *command, tmp_path / "out", before=third)
    assert os.listdir(tmp_path / "out") == ["mind.scores.jsonl"]
    if "SIGINT" in kill:
        assert ended.returncode == 130 and "Traceback" not in ended.stderr and "interrupted" in ended.stderr
    else:
        assert ended.returncode == -signal.SIGKILL
    scores = tmp_path / "out/mind.scores.jsonl"
    assert len(scores.read_bytes().splitlines()) == 1 + 4
    with open(scores, "ab") as file:
        file.write(b'{"user": "u4", "scores": [0.25, 1\xff')  # torn
    assert "made with a different seed" in error_of(capsys, data, *command, tmp_path / "out", "--seed", 1)
    assert run(data, *command, tmp_path / "out") == 0
    assert scores.read_bytes() == (tmp_path / "whole/mind.scores.jsonl").read_bytes()
    results = [json.loads((tmp_path / folder / "mind.json").read_text()) for folder in ("out", "whole")]
    for key in [*common.METRIC_NAMES, "ci", "n_users", "truncated"]:
        assert results[0][key] == results[1][key]


def test_a_run_killed_between_scores_and_result_computes_the_metrics_only(data, tmp_path, monkeypatch):
    command = [data, "--model", "itemknn", "--test", "mind", "--out", tmp_path / "out"]
    monkeypatch.setattr(common, "write_json", None)
    with pytest.raises(TypeError):
        run(*command)
    assert os.listdir(tmp_path / "out") == ["mind.scores.jsonl"]
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "baseline_scores", None)
    assert run(*command) == 0 and (tmp_path / "out/mind.json").exists()


def test_a_file_size_limit_is_one_line_and_the_run_continues(tmp_path):
    users = write_dataset(tmp_path / "data", "mind", 400)
    command = ["--model", "random", "--test", "mind", "--out", tmp_path / "out"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    ended = start(tmp_path / "data", *command, before=limit)
    assert ended.returncode == 2 and "File too large" in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stderr.strip().split("\n")[-1].startswith("error: ")
    assert run(tmp_path / "data", *command) == 0
    for user, scores in zip(users, scores_in(tmp_path / "out"), strict=True):
        assert scores == [common.digest(2025, "mind", user["user"], "random", item) / 2**64
                          for item in user["candidates"]]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_output_that_cannot_show_a_sign_shows_a_question_mark():
    code = "import common; common.run_script(lambda argv: print('\\u25b2'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, b"?", b"")


def test_errors_that_the_user_can_fix(data, tmp_path, folders, capsys):
    out = ["--out", tmp_path / "out"]

    def error(*argv):
        return error_of(capsys, data, *argv, *out)
    assert "run: python prepare_data.py movielens --raw" in error("--model", "random", "--test", "movielens")
    assert "prepare_data.py demo" in error("--model", "random", "--test", "shop")
    unknown = error("--model", "random", "--test", "movies")
    assert "'movies'" in unknown and all(name in unknown for name in [*common.DATASETS, *common.DEMO])
    assert "no valid split" in error("--model", "random", "--test", "mind", "--split", "valid")
    assert "no/such/model cannot be used" in error("--model", "no/such/model", "--test", "mind")
    assert "has no LM head" in error("--model", folders["bert-encoder"], "--test", "mind")
    llama = ["--model", folders["llama"], "--test", "mind"]
    assert "run.json is missing" in error(*llama, "--adapter", tmp_path / "nothing")
    (tmp_path / "prompt.json").write_text('{"itme": "{text}"}')
    assert "the keys are item" in error(*llama, "--prompt", tmp_path / "prompt.json")
    assert "no.json: No such file" in error(*llama, "--prompt", tmp_path / "no.json")
    assert "--bogus" in error("--model", "random", "--test", "mind", "--bogus", 1)
    assert "'0' is not a whole number of at least 1" in error("--model", "random", "--test", "mind", "--limit-users", 0)
    assert "it takes no --adapter" in error("--model", "random", "--test", "mind", "--adapter", tmp_path)
    assert "no dataset" in error_of(capsys, tmp_path, "--model", "random", "--test", "all", *out)
    (tmp_path / "file").write_text("")
    assert "a folder is needed" in error("--model", "random", "--test", "mind", "--out", tmp_path / "file")
    assert "'mind/' is not a dataset's name" in error("--model", "random", "--test", "mind/")
    assert "torch sees no CUDA GPU" in error(*llama, "--device", "cuda:1")
    assert "file" in error_of(capsys, data, "--model", "random", "--test", "mind", "--out", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


GOOD = {"user": "u0", "history": ["i0"], "candidates": ["i1", "i2"], "labels": [1, 0]}


@pytest.mark.parametrize("change, says", [
    ({"labels": ["1", 0]}, 'a label is 0 or 1, not "1"'), ({"labels": [1.0, 0]}, "not 1.0"),
    ({"labels": [None, 0]}, "not null"), ({"labels": [300, 0]}, "not 300"), ({"labels": [True, 0]}, "not true"),
    ({"labels": {"i1": 1}}, '"labels" must hold one label per candidate'), ({"labels": [1]}, "one label per candidate"),
    ({"candidates": [], "labels": []}, "at least one"), ({"history": None}, '"history" must be a list'),
    ({"history": [3]}, "3, which is no item id of items.jsonl"), ({"history": ["nope"]}, "'nope', which is no item id"),
    ({"candidates": ["i1", "x"]}, "'x', which is no item id"), ({"user": 3}, '"user" must be a string')])
def test_a_users_line_that_is_wrong_is_named_before_any_scoring(data, tmp_path, capsys, monkeypatch, change, says):
    write_jsonl(data / "mind/test.jsonl", [GOOD, {**GOOD, **change}])
    monkeypatch.setattr(evaluate, "baseline_scores", None)
    error = error_of(capsys, data, "--model", "itemknn", "--test", "mind", "--out", tmp_path / "out")
    assert "test.jsonl, line 2: " in error and says in error


@pytest.mark.parametrize("file, text, says", [
    ("test.jsonl", '{"user": "u0", "hist\n', "test.jsonl, line 1: not JSON"), ("test.jsonl", "[1]\n", "not a JSON object"),
    ("test.jsonl", "", "is empty"), ("items.jsonl", '{"id": "i0"}\n', "items.jsonl, line 1: an item is"),
    ("items.jsonl", '{"id": "i0", "text": 42}\n', "both strings"),
    ("items.jsonl", '{"id": "i0", "text": "half \\ud83d"}\n', "line 1: the text holds half a surrogate pair"),
    ("items.jsonl", '{"id": "a", "text": ""}\n{"id": "a", "text": ""}\n', "line 2: the id 'a' is there twice"),
    ("meta.json", "[]", "prepare it again"), ("meta.json", '{"format": 0}', "prepare it again"),
    ("meta.json", '{"format": 1}', "domain"), ("meta.json", "{", "is not JSON"),
    ("meta.json", "[" * 100_000, "is not JSON"), ("test.jsonl", "[" * 100_000, "test.jsonl, line 1: not JSON")])
def test_a_broken_file_is_one_line(data, tmp_path, capsys, file, text, says):
    (data / "mind" / file).write_text(text)
    assert says in error_of(capsys, data, "--model", "random", "--test", "mind", "--out", tmp_path / "out")


def test_a_dataset_of_ones_own_needs_four_files_and_no_code(data, tmp_path, capsys):
    write_dataset(data, "mine", 6)
    assert run(data, "--model", "itemknn", "--test", "mine", "all", "--out", tmp_path) == 2  # all stands alone
    assert run(data, "--model", "itemknn", "--test", "mine", "--out", tmp_path) == 0
    assert "| mine " in capsys.readouterr().out


def test_nan_scores_are_an_error(data, tmp_path, folders, capsys):
    network = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        network.model.norm.weight.fill_(float("nan"))
    network.save_pretrained(tmp_path / "broken")
    tiny.byte_level().save_pretrained(tmp_path / "broken")
    for kind in ("prompt", "embed"):
        error = error_of(capsys, data, "--model", tmp_path / "broken", "--test", "mind", "--type", kind,
                         "--out", tmp_path / kind)
        assert "NaN" in error or "LM head" in error
        assert not (tmp_path / kind).exists()


def test_an_adapter_is_scored_with_its_own_base_model_only(data, tmp_path, folders, capsys):
    network = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]),
                                  peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    network.save_pretrained(tmp_path / "run")
    job = {"model": common.model_identity(folders["llama"]), "prompt": {**common.PROMPT, "join": " "},
           "chat_template": False, "pooling": "auto", "max_length": 1024}
    record = {"model": folders["llama"], "type": "prompt", "train_chain": ["pens"], "valid_chain": ["mind"],
              "domains": {"pens": "news"}, "job": job}
    command = [data, "--test", "mind", "--adapter", tmp_path / "run", "--out", tmp_path / "out", "--model"]
    assert "no finished run" in error_of(capsys, *command, folders["llama"])
    Path(tmp_path, "run", "run.json").write_text(json.dumps(record))
    assert "is an adapter for --model" in error_of(capsys, *command, folders["bert"])
    assert "is an adapter for --model" in error_of(capsys, *command, folders["llama"], "--type", "embed")
    assert run(*command, folders["llama"]) == 0
    captured = capsys.readouterr()
    assert "| mind    | D  " in captured.out
    assert "chose this checkpoint" in captured.err and "another --prompt" in captured.err
    Path(tmp_path, "prompt.json").write_text('{"join": " "}')  # the wording that the adapter was trained with
    inside = [*command[:-3], "--prompt", tmp_path / "prompt.json", "--out", tmp_path / "run/results", "--model"]
    assert run(*inside, folders["llama"]) == 0 and "another --prompt" not in capsys.readouterr().err
    assert run(*inside, folders["llama"]) == 0  # results inside the run's folder do not make it another adapter
    assert "finished already" in capsys.readouterr().err
    assert run(data, "--test", "mind", "--model", folders["llama"], "--out", tmp_path / "base") == 0
    assert scores_in(tmp_path / "out") != scores_in(tmp_path / "base")
    shutil.copyfile(data / "mind/test.jsonl", data / "mind/valid.jsonl")
    valid = [data, "--test", "mind", "--split", "valid", "--adapter", tmp_path / "run", "--out", tmp_path / "valid"]
    assert run(*valid, "--model", folders["llama"]) == 0
    assert "chose this checkpoint" in capsys.readouterr().err
    Path(tmp_path, "run", "run.json").write_text(json.dumps({**record, "train_chain": ["mind"]}))
    assert run(*valid, "--model", folders["llama"]) == 0
    assert "so the valid split is not unseen" in capsys.readouterr().err


@pytest.mark.parametrize("file, old, new", [
    ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'),
    ("tokenizer_config.json", '{', '{"chat_template": "{{ messages[0].content }}",')])
def test_a_model_whose_files_have_changed_is_another_one(data, tmp_path, folders, capsys, file, old, new):
    shutil.copytree(folders["llama"], tmp_path / "model")
    command = [data, "--model", tmp_path / "model", "--test", "mind", "--out", tmp_path / "out"]
    assert run(*command) == 0
    content = (tmp_path / "model" / file).read_text()
    assert old in content
    (tmp_path / "model" / file).write_text(content.replace(old, new, 1))
    assert "made with a different model" in error_of(capsys, *command)


# ----------------------------------------------------------------------------------------------- baselines and controls


def chosen_by(users, own, with_positives):
    """[items that each user but `own` chose]."""
    baskets = []
    for user in users:
        liked = [item for item, label in zip(user["candidates"], user["labels"]) if label and with_positives]
        if user["user"] != own:
            baskets.append({*user["history"], *liked})
    return baskets


def plain_itemknn(baskets, history, candidate):
    score = 0.0
    for item in history:
        both = sum(item in basket and candidate in basket for basket in baskets)
        if both:
            score += both / math.sqrt(sum(item in b for b in baskets) * sum(candidate in b for b in baskets))
    return score


@pytest.mark.parametrize("case", ["train", "itself", "others"])
def test_popularity_and_itemknn_by_hand(tmp_path, case):
    """Counted in the training split, or, without one and for that split itself, in the scored users' histories."""
    users = write_dataset(tmp_path / "data", "mind", 10, train=case != "others")
    scored = users[:5] if case == "itself" else users
    more = ["--split", "train"] if case == "itself" else []
    found = {}
    for model in ("popularity", "itemknn"):
        assert run(tmp_path / "data", "--model", model, "--test", "mind", "--out", tmp_path / model, *more) == 0
        found[model] = scores_in(tmp_path / model)
    for i, user in enumerate(scored):
        baskets = chosen_by(users[:5] if case == "train" else scored, user["user"], with_positives=case == "train")
        assert found["popularity"][i] == [sum(item in basket for basket in baskets) for item in user["candidates"]]
        want = [plain_itemknn(baskets, user["history"], item) for item in user["candidates"]]
        assert found["itemknn"][i] == pytest.approx(want)
    assert np.std(np.concatenate(found["itemknn"])) > 0.1


def test_itemknn_does_not_meet_the_user_whose_history_is_shown(tmp_path):
    """With --history other and no training split: that user's candidates would stand beside that history."""
    users = write_dataset(tmp_path / "data", "mind", 10, train=False)
    command = ["--model", "itemknn", "--test", "mind", "--history", "other", "--out", tmp_path / "out"]
    assert run(tmp_path / "data", *command) == 0
    for user, other, scores in zip(users, [*users[1:], users[0]], scores_in(tmp_path / "out")):
        baskets = [set(one["history"]) for one in users if one["user"] not in (user["user"], other["user"])]
        history = [item for item in other["history"] if item not in user["candidates"]]
        assert scores == pytest.approx([plain_itemknn(baskets, history, item) for item in user["candidates"]])


def test_random_depends_on_seed_dataset_user_and_item_and_is_uniform(data, tmp_path):
    users = write_dataset(data, "mind", 1500)
    for seed in (1, 2):
        assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path / str(seed), "--seed", seed) == 0
    one, two = np.concatenate(scores_in(tmp_path / "1")), np.concatenate(scores_in(tmp_path / "2"))
    assert len(set(one) | set(two)) == 2 * 4 * len(users)
    assert 0 <= one.min() and one.max() < 1 and abs(one.mean() - 0.5) < 0.015


def test_history_other_is_that_of_the_next_user_without_the_own_candidates(data, tmp_path, folders):
    users = read_jsonl(data / "mind/test.jsonl")
    assert run(data, "--model", folders["llama"], "--test", "mind", "--out", tmp_path / "o", "--history", "other") == 0
    swapped = []
    for i, user in enumerate(users):
        others = users[(i + 1) % len(users)]["history"]
        swapped.append({**user, "history": [item for item in others if item not in user["candidates"]]})
    assert any(len(user["history"]) < 5 for user in swapped)
    write_jsonl(data / "pens/test.jsonl", swapped)
    for name in ("items.jsonl", "meta.json"):
        shutil.copyfile(data / "mind" / name, data / "pens" / name)
    assert run(data, "--model", folders["llama"], "--test", "pens", "--out", tmp_path / "p") == 0
    got, want = np.concatenate(scores_in(tmp_path / "o")), np.concatenate(scores_in(tmp_path / "p", "pens"))
    assert np.abs(got - want).max() < 1e-5


def test_paired_differences_by_hand(tmp_path, capsys):
    users = write_dataset(tmp_path / "data", "mind", 40)
    for model, more in (("random", []), ("itemknn", ["--against", tmp_path / "random"])):
        assert run(tmp_path / "data", "--model", model, "--test", "mind", "--out", tmp_path / model, *more) == 0
    printed = capsys.readouterr().out.split("difference from")[1]
    labels = [np.array(user["labels"]) for user in users]
    ours, theirs = scores_in(tmp_path / "itemknn"), scores_in(tmp_path / "random")
    per_user = [common.auc(np.array(a), y) - common.auc(np.array(b), y) for a, b, y in zip(ours, theirs, labels)]
    rng = np.random.default_rng(2025)
    draws = [np.mean(np.take(per_user, rng.integers(40, size=40))) for _ in range(1000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert f"{np.mean(per_user):+.3f} [{low:+.3f}, {high:+.3f}]" in printed


def test_against_other_users_is_refused(data, tmp_path, capsys):
    command = [data, "--model", "random", "--test", "mind", "--out"]
    assert run(*command, tmp_path / "a") == 0
    assert run(*command, tmp_path / "b", "--limit-users", 5) == 0
    against = ["--against", tmp_path / "b"]
    assert "limit_users differs" in error_of(capsys, *command, tmp_path / "a", *against)
    write_dataset(data, "mind", 10, seed=1)
    assert "data_sha256 differs" in error_of(capsys, *command, tmp_path / "c", "--limit-users", 5, *against)
    assert "holds no result of mind" in error_of(capsys, *command, tmp_path / "d", "--against", tmp_path / "x")
    assert "same folder" in error_of(capsys, *command, tmp_path / "b", *against)
    assert not (tmp_path / "c").exists()


def test_a_result_beside_the_scores_of_another_job_is_refused(data, tmp_path, capsys):
    for model in ("random", "popularity"):
        assert run(data, "--model", model, "--test", "mind", "--out", tmp_path / model) == 0
    shutil.copyfile(tmp_path / "random/mind.json", tmp_path / "popularity/mind.json")
    command = [data, "--model", "popularity", "--test", "mind", "--out", tmp_path / "popularity"]
    assert "gone or edited" in error_of(capsys, *command)


@pytest.mark.parametrize("content", ['{"x": 1}', "[]", '{"job": {"ty'])
def test_a_result_of_another_program_beside_our_scores_is_refused(data, tmp_path, capsys, content):
    assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path) == 0
    (tmp_path / "mind.json").write_text(content)
    assert "was not made by this script" in error_of(capsys, data, "--model", "random", "--test", "mind", "--out", tmp_path)
    assert (tmp_path / "mind.json").read_text() == content
    assert run(data, "--model", "random", "--test", "mind", "--out", tmp_path, "--overwrite") == 0


def test_a_scores_file_that_was_cut_short_is_refused(data, tmp_path):
    path = tmp_path / "scores.jsonl"
    line = {"user": "u0", "scores": [0, 1, 2, 3], "labels": [0, 0, 1, 0], "dropped": 2}
    write_jsonl(path, [{"job": {}, "users": 3}, line, line])
    with pytest.raises(common.UserError, match="holds 2 of 3 users; --overwrite scores it again"):
        evaluate.read_scores(path)
    write_jsonl(path, [{"job": {}, "users": 2}, line, line])
    scored, cut = evaluate.read_scores(path)
    assert len(scored) == 2 and cut == 2 and scored[0][0].tolist() == [0, 1, 2, 3] and scored[0][1].sum() == 1


def test_a_folder_that_is_being_written_is_no_dataset(tmp_path, capsys):
    """prepare_data.py writes into .NAME.new; killed there, it leaves a split without meta.json."""
    write_dataset(tmp_path / "data", "mind", 3)
    write_dataset(tmp_path / "data", ".pens.new", 3)
    write_dataset(tmp_path / "data", "mine", 3)
    (tmp_path / "data/mine/meta.json").unlink()  # not a dataset yet
    assert common.prepared(tmp_path / "data", "test") == ["mind"]


def test_a_result_whose_scores_are_gone_is_not_replaced(tmp_path, capsys):
    write_dataset(tmp_path / "data", "mind", 3)
    flags = ["--model", "random", "--test", "mind", "--out", tmp_path / "out"]
    assert run(tmp_path / "data", *flags) == 0
    (tmp_path / "out/mind.scores.jsonl").unlink()
    before = (tmp_path / "out/mind.json").read_text()
    assert run(tmp_path / "data", *flags) == 2
    assert "was not made by this script" in capsys.readouterr().err
    assert (tmp_path / "out/mind.json").read_text() == before
    assert run(tmp_path / "data", *flags, "--overwrite") == 0 and len(scores_in(tmp_path / "out")) == 3


@pytest.mark.parametrize("content", ["[]\n", '{"job": 3}\n', '{"job": {"ty', None])
def test_against_what_evaluate_has_not_written_is_one_line(tmp_path, capsys, content):
    write_dataset(tmp_path / "data", "mind", 3)
    assert run(tmp_path / "data", "--model", "random", "--test", "mind", "--out", tmp_path / "a") == 0
    if content:
        (tmp_path / "a/mind.scores.jsonl").write_text(content)
    else:
        (tmp_path / "a/mind.scores.jsonl").unlink()
    flags = ["--model", "popularity", "--test", "mind", "--out", tmp_path / "b", "--against", tmp_path / "a"]
    assert run(tmp_path / "data", *flags) == 2
    assert "holds no scores of evaluate.py for mind" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_another_history_needs_another_user(tmp_path, capsys):
    write_dataset(tmp_path / "data", "mind", 1)
    flags = ["--model", "itemknn", "--test", "mind", "--out", tmp_path / "out", "--history", "other"]
    assert run(tmp_path / "data", *flags) == 2
    assert "there is only one" in capsys.readouterr().err
