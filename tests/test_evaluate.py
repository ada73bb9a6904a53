"""evaluate.py: what it writes, how it continues, what it refuses, the baselines, the controls."""
import hashlib
import json
import math
import os
import resource
import shutil
import signal
from itertools import compress
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import transformers

import common
import evaluate

TITLES = ["the red moon", "old river song", "storm king", "blue garden", "queen of night", "shadow", "light", "stone"]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_json(path, value):
    Path(path).write_text(json.dumps(value))


def write_dataset(data, name, n_users, seed=0, n_candidates=4):
    """A prepared dataset of made-up users, written plainly; five of them train, too. Returns its users."""
    rng = np.random.default_rng(seed)
    users = []
    for n in range(n_users):
        chosen = [f"i{i}" for i in rng.permutation(len(TITLES))]
        labels = [1, 0] + rng.integers(0, 2, n_candidates - 2).tolist()
        candidates, history = chosen[:n_candidates], chosen[n_candidates - 1:]  # one item is in both
        users.append({"user": f"u{n}", "history": history, "candidates": candidates, "labels": labels})
    folder = Path(data, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "items.jsonl", [{"id": f"i{i}", "text": text} for i, text in enumerate(TITLES)])
    write_jsonl(folder / "test.jsonl", users)
    write_jsonl(folder / "train.jsonl", users[:5])
    write_json(folder / "meta.json", {"format": 1, "domain": common.DOMAINS.get(name, "book")})
    return users


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny model."""
    return tiny.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def users(tmp_path, monkeypatch):
    """Each test runs in an empty folder but for data/mind with these users, too few for an interval: so it is quick."""
    monkeypatch.chdir(tmp_path)
    return write_dataset("data", "mind", 9)


def run(model, out, *flags):
    """Exit code of a command line; the dataset is mind, unless the flags say otherwise."""
    argv = ["--test", "mind", "--device", "cpu", "--model", model, "--out", out, *flags]
    return common.run_script(evaluate.main, list(map(str, argv)))


def finish(*command):
    """Run a command line that must end well."""
    assert run(*command) == 0


@pytest.fixture
def error_of(capsys):
    """A function: the last line on standard error of a command line that ends with exit code 2."""
    def error_of(*command):
        assert run(*command) == 2
        last = capsys.readouterr().err.strip().split("\n")[-1]
        assert last.startswith("error: ")
        return last
    return error_of


def run_apart(*command):
    """Exit code, or minus the signal, of a command line in a process of its own: a copy of this one."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run(*command)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result_in(folder, name="mind"):
    return json.loads(Path(folder, f"{name}.json").read_text())


def lines_in(folder, name="mind"):
    """The lines of a scores file after the first, which holds the job."""
    return read_jsonl(Path(folder, f"{name}.scores.jsonl"))[1:]


def scores_in(folder, name="mind"):
    return [line["scores"] for line in lines_in(folder, name)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

# ---------------------------------------------------------------------------------------------------------- the results


def test_scores_are_written_user_by_user(users, llama):
    finish(llama, "out")
    scorer = common.load_scorer(evaluate.arguments(["--model", llama, "--test", "-", "--out", "-", "--device", "cpu"]))
    items = {f"i{i}": text for i, text in enumerate(TITLES)}
    for user, line in zip(users, lines_in("out"), strict=True):
        [scores], _ = common.score_prompts(scorer, [common.with_texts(user, items)])
        assert line["user"] == user["user"] and line["scores"] == pytest.approx(scores, abs=1e-5)


def test_a_result_holds_metrics_counts_and_cost(llama):
    finish(llama, "out")
    assert sorted(os.listdir("out")) == ["mind.json", "mind.scores.jsonl"]
    scores = np.concatenate(scores_in("out"))
    labels = np.concatenate([line["labels"] for line in lines_in("out")])
    result = result_in("out")
    assert result["auc"] == pytest.approx(common.auc(scores, labels))
    assert (result["n_users"], result["n_samples"], result["n_positives"]) == (9, 36, labels.sum())
    assert result["truncated"] == {"texts": 0, "histories": 0}
    assert result["tokens_scored"] < result["tokens_unshared"]


def test_histories_that_were_cut_are_counted(llama):
    finish(llama, "out", "--max-length", 62)
    n_cut = sum("dropped" in line for line in lines_in("out"))
    assert result_in("out")["truncated"]["histories"] == n_cut > 0


def test_all_prepared_datasets_and_a_limit_of_users():
    """One of them is none of the benchmark's."""
    write_dataset("data", "mine", 7)
    write_dataset("data", ".hm.new", 7)  # as prepare_data.py, killed, leaves one
    finish(tiny.build("bert", "bert"), "out", "--test", "all", "--limit-users", 5)
    assert len(os.listdir("out")) == 4
    for name in ("mind", "mine"):
        assert result_in("out", name)["n_users"] == 5
        assert len(np.unique(scores_in("out", name))) > 10


@pytest.mark.parametrize("n_users", [700, 10])
def test_collapse_to_chance_is_said(capsys, n_users):
    """Group AUC's interval holds 0.5 and is narrower than 0.1."""
    write_dataset("data", "mind", n_users, n_candidates=7)
    finish("random", "out")
    assert result_in("out")["collapsed"] == (n_users == 700)
    assert ("chance" in capsys.readouterr().err) == (n_users == 700)


@pytest.mark.parametrize("n_users", [9, 10])
def test_nine_users_give_no_interval_ten_do(capsys, n_users):
    write_dataset("data", "mind", n_users)
    finish("random", "a")
    finish("itemknn", "b", "--against", "a")
    rows = [line for line in capsys.readouterr().out.split("\n") if line.startswith("| mind")]
    assert ["[" in row for row in rows] == [n_users == 10] * 3  # the two results and the difference
    for interval in result_in("a")["ci"].values():
        assert (interval is not None) == (n_users == 10)


def test_tables_say_how_many_of_the_users_count(capsys):
    users = write_dataset("data", "mind", 30)
    for user in users[14:]:
        user["labels"] = [1, 1, 1, 1]  # no AUC of their own
    write_jsonl("data/mind/test.jsonl", users)
    finish("random", "a")
    finish("itemknn", "b", "--against", "a")
    assert capsys.readouterr().out.count(" 14 of 30 ") == 3


# ---------------------------------------------------------------------------------------------- continuing, overwriting


def test_nothing_is_scored_twice_or_taken_for_something_else(llama, monkeypatch, error_of):
    finish(llama, "out")
    before = contents("out")
    monkeypatch.setattr(common, "load_scorer", None)
    finish(llama, "out")
    assert "max_length" in error_of(llama, "out", "--max-length", 99)
    assert "model" in error_of("random", "out")
    write_dataset("data", "mind", 10, seed=1)
    assert "data_sha256" in error_of(llama, "out")
    assert contents("out") == before
    finish("random", "out", "--overwrite")
    assert result_in("out")["model"] == "random"


def test_overwrite_removes_nothing_before_there_is_something_in_its_place(error_of):
    finish("random", "out")
    before = contents("out")
    assert "no/such/model" in error_of("no/such/model", "out", "--overwrite")
    assert contents("out") == before


@pytest.mark.parametrize("file", ["mind.json", "mind.scores.jsonl"])
@pytest.mark.parametrize("content", ['{"x": 1}', "[]", '{"job": 3}', '{"job": {"ty', ""])
def test_a_file_of_another_program_is_left_alone(error_of, file, content):
    Path(file).write_text(content)
    assert file in error_of("random", ".")
    assert Path(file).read_text() == content
    finish("random", ".", "--overwrite")
    assert len(scores_in(".")) == 9


def test_what_is_in_the_way_of_a_later_dataset_shows_before_the_first_is_scored(error_of):
    write_dataset("data", "pens", 4)
    finish("random", "out", "--test", "pens")
    assert "out/pens" in error_of("popularity", "out", "--test", "mind", "pens")
    assert not Path("out/mind.scores.jsonl").exists()


@pytest.mark.parametrize("kill, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_or_interrupted_run_continues_after_its_last_whole_line(llama, monkeypatch, error_of, kill, code):
    two_at_once = ["--max-tokens", 512]
    finish(llama, "whole", *two_at_once)
    score = common.score_prompts

    def die_at_the_third_call(scorer, users):
        if users[0]["user"] == "u4":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
            signal.raise_signal(kill)
        return score(scorer, users)
    with monkeypatch.context() as patch:
        patch.setattr(common, "score_prompts", die_at_the_third_call)
        assert run_apart(llama, "out", *two_at_once) == code
    assert os.listdir("out") == ["mind.scores.jsonl"] and len(lines_in("out")) == 4
    with open("out/mind.scores.jsonl", "ab") as file:
        file.write(b'{"user": "u4", "scores": [0.25, 1\xff')  # torn
    assert "seed" in error_of(llama, "out", "--seed", 1)
    finish(llama, "out", *two_at_once)
    assert contents("out")["mind.scores.jsonl"] == contents("whole")["mind.scores.jsonl"]
    assert result_in("out")["auc"] == result_in("whole")["auc"]


@pytest.mark.parametrize("order", [[0, 1, 0, 1], [1, 0], 2 * [0, 1, 2, 3, 4]])
def test_a_scores_file_into_which_two_runs_wrote_is_refused(capsys, order):
    finish("random", "out")
    Path("out/mind.json").unlink()
    job, *lines = read_jsonl("out/mind.scores.jsonl")
    mixed = [lines[i] for i in order]
    write_jsonl("out/mind.scores.jsonl", [job, *mixed])
    assert run("random", "out") == 1
    assert "mind.scores.jsonl" in capsys.readouterr().err and lines_in("out") == mixed
    finish("random", "out", "--overwrite")
    assert lines_in("out") == lines


def test_at_a_file_size_limit_a_run_ends_and_continues():
    write_dataset("data", "mind", 400)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    code = run_apart("random", "out")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert code == 2
    finish("random", "out")
    finish("random", "whole")
    assert scores_in("out") == scores_in("whole")


def test_an_older_result_is_kept_aside_where_its_replacement_fails():
    write_dataset("data", "mind", 10)  # without "first"
    finish("random", "out")
    before = Path("out/mind.json").read_bytes()
    assert run("first-seen", "out", "--overwrite") == 1
    assert not Path("out/mind.json").exists() and Path("out/mind.json.old").read_bytes() == before


def test_the_next_dataset_is_scored_where_one_fails(llama, monkeypatch, capsys):
    write_dataset("data", "pens", 4)
    score = common.scores_of

    def nan_for_a_user_of_mind(scorer, users, embeddings):
        scores, cost = score(scorer, users, embeddings)
        if users[0]["user"] == "u4":  # pens has no such user
            scores[0][2] = math.nan
        return scores, cost
    with monkeypatch.context() as patch:
        patch.setattr(common, "scores_of", nan_for_a_user_of_mind)
        assert run(llama, "out", "--test", "mind", "pens") == 1
    captured = capsys.readouterr()
    assert "u4" in captured.err and "float32" in captured.err
    assert "| pens " in captured.out and "| mind " not in captured.out
    assert not Path("out/mind.json").exists()
    finish(llama, "out", "--test", "mind", "pens")


def test_the_hash_is_that_of_the_data_that_were_read(monkeypatch):
    """The second dataset changes while the first is scored."""
    write_dataset("data", "pens", 4)
    content = b""
    for name in ("items", "train", "test"):
        content += Path(f"data/pens/{name}.jsonl").read_bytes()
    score = evaluate.baseline_scores

    def change_and_score(*args):
        write_dataset("data", "pens", 6, seed=1)
        return score(*args)
    monkeypatch.setattr(evaluate, "baseline_scores", change_and_score)
    finish("random", "out", "--test", "mind", "pens")
    assert result_in("out", "pens")["data_sha256"] == hashlib.sha256(content).hexdigest()

# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("model, flags, named", [
    ("random", ["--test", "movielens"], "prepare_data.py movielens --raw"),
    ("random", ["--split", "valid"], "valid.jsonl"),
    ("any", ["--adapter", "nothing"], "nothing")])
def test_a_beginners_mistake_is_one_line(error_of, model, flags, named):
    assert named in error_of(model, "out", *flags)
    assert not Path("out").exists()


USER = {"user": "u0", "history": ["i0"], "candidates": ["i1", "i2"], "labels": [1, 0]}


@pytest.mark.parametrize("change", [
    {"labels": ["1", 0]}, {"labels": [2, 0]}, {"labels": [1]}, {"candidates": [], "labels": []}, {"history": None},
    {"history": [3]}, {"candidates": ["i1", "no such item"]}, {"user": "u0"}, {"candidates": ["i1", "i1"]}])
def test_a_users_line_that_is_wrong_is_named(error_of, change):
    """So is a user who is there twice, or a candidate of one user."""
    write_jsonl("data/mind/test.jsonl", [USER, {**USER, "user": "u1", **change}])
    assert "mind/test.jsonl, line 2" in error_of("itemknn", "out")


def test_official_samples_may_repeat_a_candidate():
    write_jsonl("data/mind/test.jsonl", [{**USER, "candidates": ["i1", "i1"]}])
    write_json("data/mind/meta.json", {"format": 1, "domain": "news", "job": {"from_recbench": True}})
    finish("random", "out")


@pytest.mark.parametrize("file, text, named", [
    ("test.jsonl", '{"user": "u0", "hist\n', "test.jsonl, line 1"),
    ("test.jsonl", "[" * 100_000, "test.jsonl, line 1"), ("test.jsonl", "", "test.jsonl"),
    ("items.jsonl", '{"id": "i0", "text": 42}\n', "items.jsonl, line 1"),
    ("items.jsonl", '{"id": "a", "text": ""}\n{"id": "a", "text": ""}\n', "items.jsonl, line 2"),
    ("meta.json", '{"format": 1}', "meta.json")])
def test_a_broken_file_is_named(error_of, file, text, named):
    Path("data/mind", file).write_text(text)
    assert named in error_of("random", "out")


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def run_json(llama):
    """The folder run, with an adapter of random weights, as finetune.py leaves it; its run.json."""
    network = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(network, config).save_pretrained("run")
    job = {"model": common.model_identity(llama), "prompt": common.PROMPT, "chat_template": False, "pooling": "auto",
           "max_length": 1024}
    value = {"model": llama, "type": "prompt", "train_chain": ["pens"], "valid_chain": ["pens"],
             "domains": {"pens": "news"}, "beats_base": True, "job": job}
    write_json("run/run.json", value)
    return value


@pytest.mark.parametrize("change, flags, said", [
    ({"valid_chain": ["mind"]}, [], "(--valid)"),
    ({"train_chain": ["mind"]}, ["--split", "train"], "train split"),
    ({"beats_base": False}, [], "never beat"),
    ({}, ["--max-length", 500], "--max-length")])
def test_what_weakens_an_adapters_result_is_said(llama, run_json, capsys, change, flags, said):
    finish(llama, "a", "--adapter", "run")
    assert said not in capsys.readouterr().err
    write_json("run/run.json", {**run_json, **change})
    finish(llama, "b", "--adapter", "run", *flags)
    assert said in capsys.readouterr().err


def test_an_adapter_is_scored_with_its_own_model_and_type_only(llama, run_json, capsys, error_of):
    finish(llama, "base")
    finish(llama, "out", "--adapter", "run")
    tables = capsys.readouterr().out
    assert "| A/B " in tables and "| D " in tables and scores_in("out") != scores_in("base")
    assert "run is" in error_of(tiny.build("bert", "bert"), "new", "--adapter", "run")
    assert "--type embed" in error_of(llama, "new", "--adapter", "run", "--type", "embed")
    Path("run/run.json").unlink()
    assert "run.json" in error_of(llama, "new", "--adapter", "run")
    assert "merge" in error_of("run", "new")

# ----------------------------------------------------------------------------------------------- baselines and controls


def count(baskets, *items):
    """How many baskets hold all these items."""
    return sum(basket.issuperset(items) for basket in baskets)


def plain_itemknn(baskets, history, candidate):
    score = 0.0
    for item in history:
        both = count(baskets, item, candidate)
        if both:
            score += both / math.sqrt(count(baskets, item) * count(baskets, candidate))
    return score


def history_of(user, other):
    """The history that --history other shows for a user: the other's without the user's candidates."""
    return [item for item in other["history"] if item not in user["candidates"]]


@pytest.mark.parametrize("case", ["train", "itself", "other"])
def test_popularity_and_itemknn_by_hand(users, case):
    """Counted in the training split or, for that split itself and where there is none, in the scored users' histories.

    The choices of the scored user do not count, nor those of the one whose history is shown.
    """
    flags, readers = [], users[:5]
    if case == "itself":
        flags, users = ["--split", "train"], readers
    if case == "other":
        flags, readers = ["--history", "other"], users
        Path("data/mind/train.jsonl").unlink()
    finish("popularity", "popularity", *flags)
    finish("itemknn", "itemknn", *flags)
    for i, user in enumerate(users):
        other, history = user, user["history"]
        if case == "other":
            other = users[(i + 1) % 9]
            history = history_of(user, other)
        baskets = []
        for reader in readers:
            positives = compress(reader["candidates"], reader["labels"]) if case == "train" else []
            if reader not in (user, other):
                baskets.append({*reader["history"], *positives})
        assert scores_in("popularity")[i] == [count(baskets, item) for item in user["candidates"]]
        wanted = [plain_itemknn(baskets, history, item) for item in user["candidates"]]
        assert scores_in("itemknn")[i] == pytest.approx(wanted)
    assert np.std(scores_in("itemknn")) > 0.1


def test_random_depends_on_seed_dataset_user_and_item_and_is_uniform():
    write_dataset("data", "mind", 100)
    write_dataset("data", "pens", 100)
    finish("random", "a", "--test", "mind", "pens")
    finish("random", "b", "--seed", 1)
    scores = [scores_in("a"), scores_in("a", "pens"), scores_in("b")]
    assert np.unique(scores).size == 1200
    assert np.histogram(scores, 4, (0, 1))[0] / 1200 == pytest.approx(0.25, abs=0.05)


def test_first_seen_is_the_time_of_an_items_first_event(users, capsys):
    assert run("first-seen", "out") == 1  # without times
    assert capsys.readouterr().err.count("error: mind: ") == 1
    rows = [{"id": f"i{i}", "text": text, "first": 7.5 * i - 9} for i, text in enumerate(TITLES)]
    write_jsonl("data/mind/items.jsonl", rows)
    finish("first-seen", "out")
    for user, scores in zip(users, scores_in("out"), strict=True):
        assert scores == [7.5 * int(item[1:]) - 9 for item in user["candidates"]]


@pytest.mark.parametrize("history", ["other", "none"])
def test_scores_with_another_history(users, llama, history):
    """As of a dataset that is written with these histories."""
    shutil.copytree("data/mind", "data/pens")
    changed = []
    for user, other in zip(users, [*users[1:], users[0]]):
        changed.append({**user, "history": history_of(user, other) if history == "other" else []})
    write_jsonl("data/pens/test.jsonl", changed)
    finish(llama, "out", "--history", history)
    finish(llama, "own", "--test", "mind", "pens")
    scores = np.array(scores_in("out"))
    assert np.abs(scores - scores_in("own", "pens")).max() < 1e-5
    assert np.abs(scores - scores_in("own")).max() > 1e-3


def test_without_a_history_itemknn_knows_nothing():
    finish("itemknn", "out", "--history", "none")
    assert not np.any(scores_in("out"))


def test_what_a_dataset_gives_away_is_counted_and_said(capsys):
    write_dataset("data", "mind", 4)
    write_jsonl("data/mind/items.jsonl", [{"id": f"i{i}", "text": text} for i, text in enumerate("aabc")])  # i0 is i1
    leaking, other_label = USER, {**USER, "user": "u1", "labels": [0, 1]}
    clean = {**USER, "user": "u2", "history": ["i3"]}
    write_jsonl("data/mind/train.jsonl", [other_label, clean])
    write_jsonl("data/mind/test.jsonl", [leaking, other_label, clean])
    finish("random", "out")
    counts = {"candidates_in_history": 2, "positives_in_history": 1, "users_in_train": 2}
    assert result_in("out")["given_away"] == counts
    said = capsys.readouterr().err
    assert "mind: 2 candidates" in said and "mind: 2 test users" in said

# --------------------------------------------------------------------------------------------------- paired differences


def test_paired_differences_by_hand(capsys):
    users = write_dataset("data", "mind", 40)
    finish("random", "a")
    finish("itemknn", "b", "--against", "a")
    per_user = []
    for ours, theirs, user in zip(scores_in("b"), scores_in("a"), users):
        labels = np.array(user["labels"])
        per_user.append(common.auc(np.array(ours), labels) - common.auc(np.array(theirs), labels))
    rng = np.random.default_rng(2025)
    draws = [np.mean(np.take(per_user, rng.integers(40, size=40))) for _ in range(1000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    printed = capsys.readouterr().out.split("difference from")[1]
    assert f"{np.mean(per_user):+.3f} [{low:+.3f}, {high:+.3f}]" in printed and "equal" not in printed


def test_equal_scores_are_said(capsys):
    finish("popularity", "a")
    finish("popularity", "b", "--history", "none", "--against", "a")
    assert "equal on mind" in capsys.readouterr().out


def test_a_difference_to_other_users_or_data_is_refused(error_of):
    finish("random", "a", "--limit-users", 5)
    assert "a/mind.json" in error_of("itemknn", "b", "--against", "a")
    five = ["itemknn", "b", "--limit-users", 5, "--against"]
    assert "nothing" in error_of(*five, "nothing")
    assert "--out" in error_of(*five, "b")
    job, *lines = read_jsonl("a/mind.scores.jsonl")
    write_jsonl("a/mind.scores.jsonl", [job, *reversed(lines)])
    assert "a/mind.json" in error_of(*five, "a")
    write_jsonl("a/mind.scores.jsonl", [job, *lines])
    finish(*five, "a")
    write_dataset("data", "mind", 10, seed=1)
    assert "a/mind.json" in error_of(*five, "a", "--overwrite")


@pytest.mark.parametrize("content", ["[1]\n", '{"job": {}}\n{"us\n'])
def test_a_difference_to_damaged_scores_is_one_line(error_of, content):
    finish("random", "a")
    Path("a/mind.scores.jsonl").write_text(content)
    assert "a/mind.scores.jsonl" in error_of("popularity", "b", "--against", "a")
