"""finetune.py: loss and gradients, batches, killed runs, several processes, validation, adapters, what is refused."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import common
import evaluate
import finetune

ROOT = Path(__file__).parent.parent
GOOD, BAD = ["red", "moon", "river", "light"], ["king", "storm", "road", "night"]  # what everybody likes, and does not
QUICK = ["--lr", 1e-3, "--lora-r", 4]
LEARNING = ["--lr", 1e-2, "--lora-r", 4, "--epochs", 1, "--eval-every", 1, "--patience", 9]  # soon beats the base model
SHORT = ["--train", "pens", *LEARNING]  # three steps
DROPOUT = ["--train", "mind", "pens", *QUICK, "--lora-dropout", 0.3, "--epochs", 2, "--eval-every", 5]  # 16 steps
RUN_FILES = ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"]
SIZES = [13, 4, 7, 10, 2, 23, 6]


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_dataset(data, name, sizes, seed=0, ending=""):
    """A prepared dataset. sizes: {split: [number of candidates per user]}; ending: what every item text ends in."""
    folder = Path(data, name)
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(name)])
    titles = [f"{first} {second}" for first in ("the", "old", "new", "blue") for second in GOOD + BAD]
    write_lines(folder / "items.jsonl", [{"id": f"i{i}", "text": title + ending} for i, title in enumerate(titles)])
    for split, numbers in sizes.items():
        users = []
        for number in numbers:
            history = rng.permutation(len(titles))[:rng.integers(2, 5)]
            others = [i for i in rng.permutation(len(titles)).tolist() if i not in (0, 4)]
            candidates = [0, 4, *others][:number]  # a positive and a negative first
            users.append({"user": f"{split}{len(users)}", "history": [f"i{i}" for i in history],
                          "candidates": [f"i{i}" for i in candidates],
                          "labels": [int(titles[i].split()[1] in GOOD) for i in candidates]})
        write_lines(folder / f"{split}.jsonl", users)
    (folder / "meta.json").write_text(json.dumps({"format": 1, "domain": common.DOMAINS.get(name, "toys")}))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and models. Of the datasets, mind has 161 training samples (five batches and one sample)."""
    home = tmp_path_factory.mktemp("home")
    write_dataset(home / "data", "mind", {"train": SIZES * 2 + [31], "valid": [6] * 7})
    write_dataset(home / "data", "pens", {"train": SIZES, "valid": [5] * 4}, seed=1)
    write_dataset(home / "data", "goodreads", {"train": SIZES, "valid": [5] * 4}, seed=2)
    for family in ("llama", "bert", "bert-encoder"):
        tiny.build(family, home / family)
    return home


@pytest.fixture(autouse=True)
def folder(home, tmp_path, monkeypatch):
    """Each test runs in a folder of its own, in which data, llama, bert and bert-encoder lead home."""
    monkeypatch.chdir(tmp_path)
    for path in home.iterdir():
        Path(path.name).symlink_to(path)


def run(out, *flags):
    """Exit code of a command line, in this process; of the tiny Llama, unless the flags say otherwise."""
    argv = ["--model", "llama", "--out", out, "--device", "cpu", *flags]
    return common.run_script(finetune.main, list(map(str, argv)))


def finish(out, *flags):
    """Run a command line that must end well; its run.json."""
    assert run(out, *flags) == 0
    return read_json(Path(out, "run.json"))


@pytest.fixture
def error_of(capfd):
    """A function: the one error line of a command line that ends with exit code 2."""
    def error_of(*command):
        assert run(*command) == 2
        [line] = re.findall("error: .*", capfd.readouterr().err)
        return line
    return error_of


def read_json(path):
    return json.loads(Path(path).read_text())


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    return np.array([line["loss"] for line in read_log(out) if "loss" in line])


def adapter(out):
    return load_file(Path(out, "adapter_model.safetensors"))


def adapted(out):
    """Names of the modules that an adapter adapts."""
    return {key.split(".")[-3] for key in adapter(out)}


def contents(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def evaluated(out, *flags):
    """Result and scores file of evaluate.py on the validation users of pens."""
    argv = ["--out", out, "--test", "pens", "--split", "valid", "--device", "cpu", "--model", "llama", *flags]
    assert common.run_script(evaluate.main, list(map(str, argv))) == 0
    lines = Path(out, "pens.scores.jsonl").read_text().splitlines()
    return read_json(Path(out, "pens.json")), lines[1:]  # the first is the job


def assert_nearly_same(out, wanted):
    """The same losses and adapter up to rounding (RMSNorm computes in float32), relative to the size of each tensor."""
    assert losses(out) == pytest.approx(losses(wanted), rel=1e-5)
    tensors, expected = adapter(out), adapter(wanted)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name


def assert_same_run(out, wanted):
    """The same bits of the adapter, the same run.json and log.jsonl but for times, nothing else that is no leftover."""
    assert sorted(name for name in os.listdir(out) if not name.endswith(".tmp")) == RUN_FILES
    weights = "adapter_model.safetensors"
    assert Path(out, weights).read_bytes() == Path(wanted, weights).read_bytes()
    assert without_times(out) == without_times(wanted)


def without_times(out):
    """run.json and the lines of log.jsonl without what may differ: times and the arguments (out, overwrite)."""
    values = [read_json(Path(out, "run.json")), *read_log(out)]
    for value in values:
        for key in ("seconds", "samples_per_s", "tokens_per_s", "arguments"):
            value.pop(key, None)
    return values

# ------------------------------------------------------------------------------------------------------ losses, batches


def scorer_and_train(*flags):
    """(a scorer with an adapter whose gradients are not zero, training users of mind), in float64, without dropout."""
    argv = ["--model", "llama", "--out", "-", "--train", "mind", "--device", "cpu", "--dtype", "float64", *flags]
    args = finetune.arguments(list(map(str, argv)))
    scorer = finetune.add_lora(args, common.load_scorer(args))
    torch.manual_seed(0)
    for name, parameter in scorer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it half of the gradients
            torch.nn.init.normal_(parameter, std=0.05)
    for module in scorer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    train, _ = finetune.encode_train(args, scorer, finetune.read_datasets(args))
    return scorer, train


def gradient_of(scorer):
    return torch.cat([parameter.grad.flatten() for parameter in finetune.trained_parameters(scorer)])


def step(scorer, train, batch):
    """Loss and gradient of a step that moves nothing."""
    optimizer = torch.optim.Adam(finetune.trained_parameters(scorer), lr=0.0)
    loss, _ = finetune.train_step(scorer, optimizer, train, batch)
    return loss, gradient_of(scorer)


def loss_of_sample(scorer, texts, labels, candidate):
    """The formula, for one candidate of a user, from texts that run alone."""
    label = labels[candidate]
    if scorer.type == "prompt":
        row = common.Row([], [texts[candidate]], [0])
        [score] = common.score_rows(scorer._replace(layout="padded"), [row])
        yes = 1 / (1 + torch.exp(-score))
        return -torch.log(yes if label else 1 - yes)
    [history], [item] = common.embed(scorer, [texts[0]]), common.embed(scorer, [texts[candidate + 1]])
    return (history @ item / history.norm() / item.norm() - label) ** 2


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_loss_and_gradient_are_those_of_the_formula_one_sample_at_a_time(model, kind):
    scorer, train = scorer_and_train("--model", model, "--type", kind)
    batch = finetune.epoch_batches(train, 0, 0, 32)[1]
    total = 0.0
    for user, candidate in batch:
        loss = loss_of_sample(scorer, *train[user], candidate) / 32
        loss.backward()
        total += loss.item()
    wanted = gradient_of(scorer)
    assert wanted.abs().max() > 1e-4
    for changes in ({}, {"max_tokens": 120}, {"max_tokens": 1}, {"layout": "equal"}):
        loss, gradient = step(scorer._replace(**changes), train, batch)
        assert loss == pytest.approx(total, rel=1e-7)
        assert (gradient - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("kind, limit", [("prompt", 300), ("embed", 20)])
def test_a_forward_pass_holds_no_more_than_max_tokens(kind, limit):
    scorer, train = scorer_and_train("--type", kind, "--max-tokens", limit)
    sizes = []

    def note_size(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:  # one row may be longer
            sizes.append(kwargs["input_ids"].numel())
    scorer.model.register_forward_pre_hook(note_size, with_kwargs=True)
    for batch in finetune.epoch_batches(train, 0, 0, 32):
        step(scorer, train, batch)
    assert limit / 2 < max(sizes) <= limit


@pytest.mark.parametrize("flags, passes", [([], 1), (["--gradient-checkpointing"], 2)])
def test_gradient_checkpointing_computes_each_layer_again(flags, passes):
    """That is where its memory is saved."""
    scorer, train = scorer_and_train(*flags)
    calls = []

    def note_call(module, args):
        calls.append(module)
    scorer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(note_call)
    step(scorer, train, [(0, 0)])
    assert len(calls) == passes


def test_gradient_checkpointing_repeats_the_dropout():
    command = [*DROPOUT, "--dtype", "float64", "--seed", 3]
    assert finish("plain", *command)["beats_base"]  # so there is an adapter to compare
    finish("checkpointed", *command, "--gradient-checkpointing")
    assert_nearly_same("checkpointed", "plain")


def test_batches_hold_32_samples_and_an_epoch_each_sample_once():
    sizes = [13, 4, 7, 10, 2, 23, 1, 40] * 5
    train = [([], [0] * size) for size in sizes]
    first, second = finetune.epoch_batches(train, 7, 0, 32), finetune.epoch_batches(train, 7, 1, 32)
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [32] * 15 + [20]
        samples = sum(batches, [])
        assert sorted(samples) == [(user, candidate) for user, size in enumerate(sizes) for candidate in range(size)]
        n_chunks = 1 + sum(before[0] != after[0] for before, after in pairwise(samples))
        assert 60 < n_chunks <= 75  # up to ten of a user's candidates stay together
        assert [candidate for user, candidate in samples if user == 3] != list(range(10))  # shuffled within a chunk
    assert first == finetune.epoch_batches(train, 7, 0, 32)
    assert first != second and first != finetune.epoch_batches(train, 8, 0, 32)


@pytest.mark.parametrize("kind, lr", [("embed", 3e-3), pytest.param("prompt", 1e-2, marks=pytest.mark.slow)])
def test_training_learns_what_everybody_likes(kind, lr):
    command = ["--train", "mind", "--type", kind, "--lr", lr, "--lora-dropout", 0]
    result = finish("run", *command, "--epochs", 12, "--patience", 12)
    by_epoch = losses("run").reshape(12, 6)[:, :5].mean(1)  # the sixth batch has one sample
    assert by_epoch[-1] < 0.85 * by_epoch[0] and result["best"]["mean"] > 0.8


def test_texts_and_histories_that_were_cut_are_counted():
    write_dataset("long", "mind", {"train": [12, 4], "valid": [4]}, ending=" light" * 100)
    result = finish("run", "--data", "long", "--train", "mind", *QUICK, "--epochs", 1, "--max-length", 300)
    assert result["truncated"]["histories"] == 2 and result["truncated"]["texts"] > 9

# --------------------------------------------------------------------------------------------------------- killed runs


class Killed(BaseException):
    """In place of SIGKILL, at an exact moment: nothing in the project catches it."""


def die_at_call(monkeypatch, number, functions):
    """Raise Killed in place of the number-th call of any of these functions, [(owner, name)]."""
    calls = []

    def mortal(original):
        def call(*args, **kwargs):
            calls.append(original)
            if len(calls) == number:
                raise Killed
            return original(*args, **kwargs)
        return call
    for owner, name in functions:
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))


FILE_STEPS = [(os, "replace"), (Path, "unlink"), (shutil, "rmtree")]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A run that was never killed."""
    out = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(home):
        assert finish(out, *DROPOUT)["beats_base"]  # else the adapters compared below would all be zero
    return out


def test_the_start_and_the_last_step_are_evaluated_too(whole):
    assert [point["step"] for point in read_json(whole / "run.json")["curve"]] == [0, 5, 10, 15, 16]


@pytest.mark.parametrize("at_step", [1, 5, 6, 14])
def test_killed_within_a_step_a_run_ends_with_the_same_bits(whole, monkeypatch, capsys, at_step):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at_call(patch, at_step, [(finetune, "train_step")])
        run("out", *DROPOUT)
    finish("out", *DROPOUT)
    assert f"after step {(at_step - 1) // 5 * 5}\n" in capsys.readouterr().err  # the last that was evaluated
    assert_same_run("out", whole)


def test_killed_between_the_steps_of_its_end_a_run_ends_with_the_same_bits(whole, monkeypatch, error_of):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at_call(patch, 1, [(finetune, "save_run")])
        run("trained", *DROPOUT)
    for number in count(1):
        out = shutil.copytree("trained", f"out{number}")
        with monkeypatch.context() as patch:
            die_at_call(patch, number, FILE_STEPS)
            try:
                run(out, *DROPOUT)
                break  # nothing left to die at
            except Killed:
                pass
        assert Path(out, "state.pt").exists()
        if not Path(out, "run.json").exists():  # half an adapter is not taken for one
            assert "run.json" in error_of("next", *SHORT, "--init-adapter", out)
        finish(out, *DROPOUT)
        assert_same_run(out, whole)
    assert number > 7


def start(processes, *command):
    """Process ids of copies of this process that run a command line, together as torchrun's if there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.environ.update(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                sys.stdout = sys.stderr = open(os.devnull, "w")
                code = run(*command)
            finally:
                os._exit(code)
        children.append(child)
    return children


def wait(children):
    """How processes ended: exit codes, or minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("processes, kills", [
    (1, 2), pytest.param(1, 25, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(processes, kills):
    started = time.perf_counter()
    assert wait(start(processes, "whole", *DROPOUT)) == [0] * processes
    seconds = time.perf_counter() - started
    moments = random.Random(processes)
    killed = 0
    while killed < kills:
        children = start(processes, "out", *DROPOUT)
        time.sleep(moments.uniform(0.2, 1) * seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += wait(children)[0] == -signal.SIGKILL
        if Path("out/run.json").exists() and not Path("out/state.pt").exists():  # it was done before
            shutil.rmtree("out")
    assert wait(start(processes, "out", *DROPOUT)) == [0] * processes
    assert_same_run("out", "whole")


# ----------------------------------------------------------------------------------------------- what is in a run's way


def test_a_finished_run_answers_at_once_and_other_arguments_or_data_are_refused(whole, error_of, monkeypatch):
    monkeypatch.setattr(common, "load_scorer", None)  # nothing is loaded
    shutil.copytree(whole, "out")
    shutil.copytree("llama", "moved")
    for flags in ([], ["--model", "moved"], ["--max-tokens", 200, "--gradient-checkpointing"]):
        finish("out", *DROPOUT, *flags)
    for flags, named in ((["--lr", 1e-5], "lr"), (["--type", "embed"], "type"), (["--train", "mind"], "train, valid")):
        assert f"another {named}" in error_of("out", *DROPOUT, *flags)
    shutil.copytree("data", "edited")
    with open("edited/pens/valid.jsonl", "a") as file:
        file.write('{"user": "new", "history": [], "candidates": ["i1"], "labels": [1]}\n')
    assert "data_sha256" in error_of("out", *DROPOUT, "--data", "edited")
    Path("moved/config.json").write_text(Path("moved/config.json").read_text() + " ")
    assert "model" in error_of("out", *DROPOUT, "--model", "moved")
    assert contents("out") == contents(whole)


@pytest.mark.parametrize("name, text", [
    ("run.json", '{"mine": 1}'), ("run.json", "[]"), ("state.pt", ""), ("state.pt", "PK half")])
def test_a_damaged_file_or_another_programs_is_refused(error_of, name, text):
    Path("out").mkdir()
    Path("out", name).write_text(text)
    assert f"out/{name}" in error_of("out", *SHORT)
    assert contents("out") == {name: text.encode()}


def test_overwrite_removes_nothing_before_there_is_something_in_its_place(whole, error_of, monkeypatch):
    finish("wanted", *SHORT)
    shutil.copytree(whole, "misspelt")
    assert "no/model" in error_of("misspelt", *SHORT, "--overwrite", "--model", "no/model")
    assert contents("misspelt") == contents(whole)
    for number in (1, 2, 3):  # state.pt is put in place, log.jsonl is written; then those of the next state
        out = shutil.copytree(whole, f"out{number}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at_call(patch, number, FILE_STEPS)
            run(out, *SHORT, "--overwrite")
        for file in ("adapter_model.safetensors", "adapter_config.json", "run.json"):  # can be used as before
            assert contents(out)[file] == contents(whole)[file]
        if number == 1:
            assert out in error_of(out, *SHORT)
        else:
            finish(out, *SHORT)
            assert_same_run(out, "wanted")

# --------------------------------------------------------------------------------------------------- several processes

TWO = ["--train", "mind", "--valid", "mind", "pens", *QUICK, "--dtype", "float64", "--lora-dropout", 0, "--epochs", 5,
       "--eval-every", 10, "--patience", 5]


def assert_two_are_one():
    """The folder two, of two processes, holds the run of one."""
    assert_nearly_same("two", "one")
    assert len(losses("two")) == 30
    for point, wanted in zip(read_json("two/run.json")["curve"], read_json("one/run.json")["curve"], strict=True):
        assert point["valid"] == pytest.approx(wanted["valid"], rel=1e-12)


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_two_processes_are_one(kind):
    finish("one", *TWO, "--type", kind)
    assert wait(start(2, "two", *TWO, "--type", kind)) == [0, 0]
    assert_two_are_one()


def test_the_gradient_of_two_processes_is_that_of_one(monkeypatch):
    def note_gradient(optimizer):
        gradients = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        torch.save(torch.cat(gradients), f"{os.environ.get('RANK', 'one')}.pt")
        raise Killed
    monkeypatch.setattr(torch.optim.Adam, "step", note_gradient)
    tiny.build("gpt2", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    command = [*TWO, "--model", "gpt2"]  # all in float64, unlike RMSNorm
    with pytest.raises(Killed):
        run("one", *command)
    wait(start(2, "two", *command))
    wanted = torch.load("one.pt")
    for rank in "01":
        assert (torch.load(f"{rank}.pt") - wanted).abs().max() < 1e-14 * wanted.abs().max()


def test_two_processes_share_the_validation_users_and_draw_dropout_of_their_own(monkeypatch):
    score = common.scores_of

    def note_and_score(scorer, users, embeddings):
        with open(f"users{os.environ['RANK']}", "a") as file:
            file.write("".join(user["user"] + " " for user in users))
        return score(scorer, users, embeddings)

    def note_seed(*args):
        Path(f"seed{os.environ['RANK']}").write_text(str(torch.initial_seed()))
        sys.exit()
    monkeypatch.setattr(common, "scores_of", note_and_score)
    monkeypatch.setattr(finetune, "train_step", note_seed)
    wait(start(2, "out", *SHORT))
    assert Path("users0").read_text().endswith("valid0 valid2 ")
    assert Path("users1").read_text().endswith("valid1 valid3 ")
    assert Path("seed0").read_text() != Path("seed1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_torchrun(kind):
    finish("one", *TWO, "--type", kind)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    torchrun += [ROOT / "finetune.py", "--model", "llama", "--out", "two", "--device", "cpu", *TWO, "--type", kind]
    ended = subprocess.run(list(map(str, torchrun)), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("best auc") == 1 and ended.stderr.count("step 30: auc") == 1  # the first process alone
    assert_two_are_one()

# ------------------------------------------------------------------------- early stopping, the best adapter, validation


def test_early_stopping_looks_at_the_mean_and_the_best_adapter_is_kept(monkeypatch, capsys):
    script = [(0.5, 0.5), (0.5, 0.6), (0.9, 0.5), (0.6, 0.85), (0.95, 0.3), (0.5, 0.9), (0.99, 0.99)]
    seen = []  # means: .5 .55 .7 .725 .625 .7, then patience ends; the first is before any step

    def scripted(args, scorer, valid):
        seen.append([parameter.detach().clone() for parameter in finetune.trained_parameters(scorer)])
        return dict(zip(valid, script[len(seen) - 1], strict=True))
    monkeypatch.setattr(finetune, "validate", scripted)
    result = finish("out", "--train", "mind", "pens", *QUICK, "--eval-every", 2, "--lora-targets", "o_proj")
    assert (result["steps"], result["best"]["step"], len(seen)) == (10, 6, 6)
    assert result["best"]["valid"] == {"mind": 0.6, "pens": 0.85} and result["best"]["mean"] == pytest.approx(0.725)
    for (name, tensor), kept in zip(sorted(adapter("out").items()), seen[3], strict=True):
        assert torch.equal(tensor, kept), name
    assert result["unstable"] and result["beats_base"] and "unstable" in capsys.readouterr().out


def test_an_adapter_that_never_beats_the_base_model_changes_no_score():
    """The curve starts with the base model, as evaluate.py scores it; with such a rate nothing ever changes."""
    result = finish("run", "--train", "pens", "--lr", 1e-15)
    assert (result["beats_base"], result["best"]["step"], result["steps"]) == (False, 0, 6)  # patience 2
    base, base_scores = evaluated("base")
    assert result["curve"][0] == {"step": 0, "valid": {"pens": base["auc"]}, "mean": base["auc"]}
    assert evaluated("tuned", "--adapter", "run")[1] == base_scores


def test_the_best_value_is_that_of_the_adapter_and_other_validation_sets_are_said(capsys):
    result = finish("run", "--train", "mind", *LEARNING, "--valid", "pens", "--valid-metric", "ndcg@5")
    assert "validating on pens" in capsys.readouterr().err
    assert (result["train_chain"], result["valid_chain"], result["beats_base"]) == (["mind"], ["pens"], True)
    tuned, _ = evaluated("tuned", "--adapter", "run")
    assert result["best"]["valid"] == {"pens": pytest.approx(tuned["ndcg@5"], abs=1e-9)}

# --------------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("first, second", [("mind", "goodreads"), ("goodreads", "mind")])
def test_sequential_training_continues_the_adapter_in_its_shape(capsys, first, second):
    assert finish("first", "--train", first, *LEARNING)["beats_base"]
    capsys.readouterr()
    result = finish("out", "--train", second, "--init-adapter", "first", "--lr", 1e-12, "--epochs", 1, "--lora-r", 8)
    assert "LoRA as in first" in capsys.readouterr().err
    assert result["train"] == [second] and result["train_chain"] == result["valid_chain"] == [first, second]
    assert result["domains"] == {"mind": "news", "goodreads": "book"}
    weights = adapter("out")
    for name, tensor in adapter("first").items():  # with such a rate it stays where it began, of rank 4
        assert (weights[name] - tensor).abs().max() < 1e-8


def test_an_adapter_belongs_to_its_base_model_and_type(whole, error_of):
    init = [*SHORT, "--init-adapter", whole]
    assert "--model bert" in error_of("out", *init, "--model", "bert")
    assert "--type embed" in error_of("out", *init, "--type", "embed")
    finish("out", *init)
    finish("another", *SHORT)
    assert "init_adapter" in error_of("out", *SHORT, "--init-adapter", "another")
    Path("another/run.json").unlink()
    assert "another/run.json" in error_of("new", *SHORT, "--init-adapter", "another")
    assert "merge_and_unload" in error_of("new", *SHORT, "--model", "another")


def test_targets_can_be_chosen_and_a_plain_peft_model_loads_the_adapter():
    finish("out", *SHORT, "--lora-targets", "o_proj", "k_proj")
    assert adapted("out") == {"o_proj", "k_proj"}
    network = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("llama"), "out")
    weights = {name.replace(".default", ""): value for name, value in network.named_parameters() if "lora" in name}
    assert weights.keys() == adapter("out").keys()
    for name, tensor in adapter("out").items():
        assert torch.equal(weights[name], tensor)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.3}


def gemma4(n_tokens):
    """A Gemma 4 that reads pictures, too: peft's choice for it is a regular expression."""
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, **SMALL}
    text = transformers.Gemma4TextConfig(vocab_size=n_tokens, vocab_size_per_layer_input=n_tokens, **sizes)
    vision = transformers.Gemma4VisionConfig(head_dim=8, **SMALL)
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config)


def lfm2(n_tokens):
    """A hybrid, of the layout "cached", which does not go with --gradient-checkpointing."""
    config = transformers.Lfm2Config(vocab_size=n_tokens, layer_types=["conv", "full_attention"], **SMALL)
    return transformers.Lfm2ForCausalLM(config)


def phi3(n_tokens):
    """For which peft names nothing: all its linear layers but the LM head."""
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(vocab_size=n_tokens, **SMALL))


@pytest.mark.parametrize("build, targets", [
    (gemma4, {"q_proj", "v_proj"}), (phi3, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    (lfm2, {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"})])
def test_without_lora_targets_an_adapter_trains_and_is_read_again(build, targets):
    tokenizer = tiny.byte_level()
    torch.manual_seed(0)
    build(len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    result = finish("run", "--model", "model", *SHORT, "--gradient-checkpointing")
    assert result["beats_base"] and len(losses("run")) == 3 and adapted("run") == targets
    base, _ = evaluated("base", "--model", "model")
    tuned, _ = evaluated("tuned", "--model", "model", "--adapter", "run")
    assert [result["curve"][0]["mean"], result["best"]["mean"]] == pytest.approx([base["auc"], tuned["auc"]])


@pytest.mark.parametrize("flags, named", [
    (["--lora-targets", "no_such_module"], "no_such_module"), (["--lora-targets", "q_proj", "v_porj"], "v_porj"),
    (["--model", "bert-encoder"], "bert-encoder"),
    (["--valid", "hm"], "prepare_data.py hm"),
    (["--init-adapter", "nothing"], "run.json")])
def test_what_cannot_be_trained_is_one_line(error_of, flags, named):
    assert named in error_of("out", *SHORT, *flags)


@pytest.mark.parametrize("sizes, named", [
    ({"train": [4]}, "valid.jsonl"), ({"valid": [4]}, "train.jsonl"), ({"train": [4], "valid": [1]}, "auc")])
def test_data_that_cannot_train_are_one_line(error_of, sizes, named):
    write_dataset("few", "mind", sizes)
    assert named in error_of("out", "--data", "few", "--train", "mind")


@pytest.mark.parametrize("kind", ["prompt", "embed"])
@pytest.mark.parametrize("eval_every, named", [(100, "--lr"), (1, "NaN")])
def test_a_rate_that_diverges_is_one_line(error_of, kind, eval_every, named):
    assert named in error_of("out", "--train", "mind", "--lr", 1e30, "--type", kind, "--eval-every", eval_every)


def test_adapters_are_float32_over_a_bfloat16_base():
    finish("out", *SHORT, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in adapter("out").values()} == {torch.float32}
