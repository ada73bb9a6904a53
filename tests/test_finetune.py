"""finetune.py: the loss and its gradient, batches, killed runs, several processes, what is kept and what is refused."""
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
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
EXACT = ["--dtype", "float64", "--lora-dropout", 0]
QUICK = ["--lr", 1e-3, "--lora-r", 4]


def write_dataset(data, name, sizes, seed=0, text=lambda title: title):
    """A prepared dataset; sizes: {split: [candidates of each user]}."""
    folder, rng, users = Path(data, name), np.random.default_rng([seed, len(name)]), 0
    folder.mkdir(parents=True, exist_ok=True)
    titles = [f"{a} {b}" for a in ["the", "old", "new", "blue"] for b in GOOD + BAD]
    items = [{"id": f"i{i}", "text": text(title)} for i, title in enumerate(titles)]
    Path(folder, "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for split, counts in sizes.items():
        lines = []
        for count in counts:
            history, candidates = rng.permutation(len(items)).tolist(), rng.permutation(len(items)).tolist()
            candidates = [0, 4, *(c for c in candidates if c not in (0, 4))][:count]  # both labels
            users += 1
            lines.append({"user": f"u{users}", "history": [f"i{i}" for i in history[:rng.integers(2, 5)]],
                          "candidates": [f"i{i}" for i in candidates],
                          "labels": [int(titles[i].split()[1] in GOOD) for i in candidates]})
        Path(folder, f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"format": 1, "domain": common.DOMAINS.get(name, "toys")}
    Path(folder, "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = [13, 4, 7, 10, 2, 23, 6]
    write_dataset(folder, "mind", {"train": sizes * 2 + [31], "valid": [6] * 7, "test": [4] * 5})  # 5 batches, 1 sample
    write_dataset(folder, "pens", {"train": sizes, "valid": [5] * 4, "test": [4] * 5}, seed=1)
    write_dataset(folder, "goodreads", {"train": sizes, "valid": [5] * 4, "test": [4] * 5}, seed=2)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(family) -> folder of a tiny model, each built once; small matrices, so that a moderate rate trains it."""
    made = {}

    def build(family):
        if family not in made:
            made[family] = tiny.build(family, tmp_path_factory.mktemp(family))
        return made[family]
    return build


def run(data, model, out, *argv):
    """Exit code of a command line in this process."""
    return common.run(finetune.main, ["--data", str(data), "--model", str(model), "--out", str(out), "--device", "cpu",
                                      *map(str, argv)])


def read_log(out):
    """(steps, evaluations) of log.jsonl."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "valid" in line]


def losses(out):
    return np.array([line["loss"] for line in read_log(out)[0]])


def adapter(out):
    return load_file(Path(out, "adapter_model.safetensors"))


def difference(a, b):
    """Largest difference between two runs' losses and adapters, relative to the size of each tensor."""
    pairs = [(torch.tensor(losses(a)), torch.tensor(losses(b)))]
    first, second = adapter(a), adapter(b)
    assert first.keys() == second.keys()
    pairs += [(first[name], second[name]) for name in first]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def error_of(capfd, *argv):
    """The one line on standard error of a command line that must end with exit code 2."""
    capfd.readouterr()
    assert run(*argv) == 2
    return error_line(capfd.readouterr().err)


def error_line(stderr):
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    lines = [line for line in stderr.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.strip().endswith(lines[0]), stderr
    return lines[0]


# --------------------------------------------------------------------------------- processes, cheaper than subprocess


def fork(*argv, prepare=lambda: None, output=None):
    """A command line in a copy of this process, after prepare() there. Returns its process id. output: a descriptor."""
    child = os.fork()
    if not child:
        code = 99
        try:
            sys.stderr = sys.stdout = open(output or os.devnull, "w")
            torch.set_num_threads(1)
            prepare()
            code = run(*argv)
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


def wait(child):
    """How a process ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork_two(*argv, **options):
    """A command line in two processes that know of each other. Returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [fork(*argv, prepare=lambda: os.environ.update(known, RANK=str(rank), LOCAL_RANK=str(rank)), **options)
            for rank in range(2)]


# ------------------------------------------------------------------------------------------------------ losses, batches


def scorer_and_data(data, folder, *argv):
    """(arguments, a scorer with an adapter whose gradients are not zero, training users) without any dropout."""
    args = finetune.arguments(["--data", str(data), "--model", folder, "--out", "-", "--train", "mind", "--device",
                               "cpu", "--dtype", "float64", "--lora-dropout", "0", *map(str, argv)])
    torch.manual_seed(0)
    scorer = finetune.add_lora(args, common.load_scorer(args))
    for name, p in scorer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it half of the gradients
            torch.nn.init.normal_(p, std=0.05)
    for module in scorer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return args, scorer, finetune.read_train(args, scorer)[0]


def gradient_step(scorer, train, batch):
    """Loss and gradients of a step that moves nothing."""
    parameters = finetune.trained_parameters(scorer)
    loss, _ = finetune.train_step(scorer, torch.optim.Adam(parameters, lr=0.0), train, batch)
    return loss, torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("family, kind", [("llama", "prompt"), ("bert", "prompt"), ("t5", "prompt"), ("llama", "embed"),
                                          ("bert", "embed")])
def test_loss_and_gradient_are_those_of_the_formula_one_sample_at_a_time(data, model, family, kind):
    args, scorer, train = scorer_and_data(data, model(family), "--type", kind)
    users, items = common.read_users(data, "mind", "train")
    batch = finetune.epoch_batches(train, 0, 0, 32)[1]
    parameters, total = finetune.trained_parameters(scorer), 0.0
    for user, c in batch:
        alone, label = common.with_texts(users[user], items), users[user]["labels"][c]
        alone["candidates"] = [alone["candidates"][c]]
        ids, _ = common.encode_user(scorer, alone)
        if kind == "prompt":
            score = common.score_rows(scorer._replace(layout="padded"), [common.Row([], ids, [0])])[0]
            p = 1 / (1 + torch.exp(-score))
            loss = -torch.log(p if label else 1 - p)
        else:
            a = common.embed(scorer, ids)[0]
            b = common.embed(scorer, common.encode_items(scorer, alone["candidates"]))[0]
            loss = (a @ b / a.norm() / b.norm() - label) ** 2
        (loss / 32).backward()
        total += loss.item() / 32
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    assert gradient.abs().max() > 1e-4
    for changes in ({}, {"max_tokens": 120}, {"max_tokens": 1}, {"layout": "padded"}, {"layout": "equal"}):
        if changes.get("layout") and family != "llama":
            continue
        loss, got = gradient_step(scorer._replace(**changes), train, batch)
        assert loss == pytest.approx(total, rel=1e-7)
        assert (got - gradient).abs().max() < 1e-6 * gradient.abs().max()  # RMSNorm computes in float32


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_a_forward_holds_no_more_than_max_tokens(data, model, kind):
    args, scorer, train = scorer_and_data(data, model("llama"), "--type", kind, "--max-tokens", 300)
    sizes = []
    scorer.model.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()),
                                           with_kwargs=True)
    for batch in finetune.epoch_batches(train, 0, 0, 32):
        gradient_step(scorer, train, batch)
    assert 80 < max(sizes) <= 300  # embeddings: users and items in forwards of their own


@pytest.mark.slow
def test_memory_of_a_step_is_bounded_by_max_tokens_and_by_checkpointing(tmp_path):
    sizes = {"train": [8] * 4, "valid": [6]}
    write_dataset(tmp_path, "mind", sizes, text=lambda title: title + " song river light" * 12)
    folder = tiny.build("llama", tmp_path / "model", hidden_size=256, num_hidden_layers=8, num_key_value_heads=4,
                        head_dim=64, intermediate_size=768, max_position_embeddings=2048)

    def held(key):
        return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) // 1024

    def peak(max_tokens, *argv):
        """MB that a step takes beyond what was held before, measured in a copy of this process."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            args, scorer, train = scorer_and_data(tmp_path, folder, "--dtype", "float32", *argv)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before = held("VmRSS:")
            batch = finetune.epoch_batches(train, 0, 0, 32)[0]
            gradient_step(scorer._replace(max_tokens=max_tokens), train, batch)
            os.write(write, str(held("VmHWM:") - before).encode())
            os._exit(0)
        wait(child)
        return int(os.read(read, 99))
    peaks = {case: peak(*case) for case in [(4096,), (512,), (4096, "--gradient-checkpointing")]}
    print("MB beyond the model:", peaks)
    assert peaks[512,] < 0.5 * peaks[4096,] and peaks[4096, "--gradient-checkpointing"] < 0.75 * peaks[4096,]


def test_batches_hold_32_samples_and_an_epoch_each_sample_once():
    sizes = [13, 4, 7, 10, 2, 23, 1, 40] * 5
    train = [([], [0] * size) for size in sizes]
    samples = {(user, c) for user, size in enumerate(sizes) for c in range(size)}
    first, second = finetune.epoch_batches(train, 7, 0, 32), finetune.epoch_batches(train, 7, 1, 32)
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [32] * 15 + [20]
        flat = [sample for batch in batches for sample in batch]
        assert len(flat) == len(samples) and set(flat) == samples
        chunks = 1 + sum(a[0] != b[0] for a, b in pairwise(flat))
        assert sum(-(-size // 10) for size in sizes) * 0.8 < chunks <= sum(-(-size // 10) for size in sizes)
        for user, size in enumerate(sizes):  # shuffled within users
            assert size < 10 or [c for u, c in flat if u == user] != list(range(size))
        assert len({user for user, _ in batches[0]}) > 3
        assert max(len([1 for u, _ in batch if u == 5]) for batch in batches) <= 20  # 23 candidates: never in one chunk
    assert first != second and first == finetune.epoch_batches(train, 7, 0, 32)
    assert first != finetune.epoch_batches(train, 8, 0, 32)


def test_each_epoch_trains_on_all_samples_in_an_order_of_its_own(data, model, tmp_path):
    assert run(data, model("llama"), tmp_path, "--train", "pens", *EXACT, "--lr", 1e-12, "--epochs", 2) == 0
    first, second = losses(tmp_path).reshape(2, 3)
    assert abs(first - second).min() > 1e-3  # other batches, the same samples
    assert first @ [32, 32, 1] == pytest.approx(second @ [32, 32, 1])


def test_packed_and_split_runs_end_with_the_same_adapter(data, model, tmp_path, monkeypatch):
    command = ["--train", "mind", *EXACT, *QUICK, "--epochs", 5]
    assert run(data, model("llama"), tmp_path / "packed", *command) == 0
    assert run(data, model("llama"), tmp_path / "split", *command, "--max-tokens", 150) == 0
    assert run(data, model("llama"), tmp_path / "checkpointed", *command, "--gradient-checkpointing") == 0
    monkeypatch.setattr(common, "packing_fault", lambda scorer: "it is a test")
    assert run(data, model("llama"), tmp_path / "unpacked", *command) == 0
    assert len(losses(tmp_path / "packed")) == 30 and losses(tmp_path / "packed").std() > 0.01
    for other in ("split", "checkpointed", "unpacked"):
        assert difference(tmp_path / other, tmp_path / "packed") < 1e-5, other


def test_gradient_checkpointing_repeats_the_dropout(data, model, tmp_path):
    command = ["--train", "pens", *QUICK, "--dtype", "float64", "--lora-dropout", 0.5, "--epochs", 1]
    assert run(data, model("llama"), tmp_path / "plain", *command) == 0
    assert run(data, model("llama"), tmp_path / "checkpointed", *command, "--gradient-checkpointing") == 0
    assert difference(tmp_path / "plain", tmp_path / "checkpointed") < 1e-9


@pytest.mark.parametrize("family, kind, lr, changes", [
    ("bert", "prompt", 1e-2, dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    ("t5", "prompt", 3e-3, dict(dropout_rate=0.0)), ("llama", "embed", 3e-3, {}), ("bert-encoder", "embed", 3e-3, {})])
def test_every_family_learns(data, tmp_path, monkeypatch, family, kind, lr, changes):
    monkeypatch.setitem(tiny.SCALE, "bert", 3.0)  # a tiny masked model learns slowly
    folder = tiny.build(family, tmp_path / "model", **changes)
    assert run(data, folder, tmp_path, "--train", "mind", "--type", kind, "--lr", lr, "--lora-dropout", 0,
               "--epochs", 12, "--patience", 12) == 0
    by_epoch = losses(tmp_path).reshape(-1, 6)[:, :5].mean(1)  # the sixth batch has one sample
    assert by_epoch[-1] < 0.85 * by_epoch[0]
    assert json.loads(Path(tmp_path, "run.json").read_text())["best"]["mean"] > 0.8


def test_histories_are_cut_by_user_and_counted(model, tmp_path, capsys):
    write_dataset(tmp_path, "mind", {"train": [12, 4], "valid": [4]}, text=lambda title: title + " light" * 100)
    args, scorer, train = scorer_and_data(tmp_path, model("llama"), "--max-length", 300)
    assert max(len(text) for texts, _ in train for text in texts) <= 300
    said = capsys.readouterr().err
    assert "texts were cut to fit" in said and "2 histories were cut to fit" in said
    shared = {tuple(text[:100]) for text in train[0][0]}
    assert len(shared) == 1  # all prompts of a user show the same history


# --------------------------------------------------------------------------------------------------------- killed runs


KILLED = ["--train", "mind", "pens", *QUICK, "--lora-dropout", 0.3, "--epochs", 2, "--eval-every", 5]


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory):
    """A run that was never killed, and its seconds."""
    out, started = tmp_path_factory.mktemp("whole"), time.perf_counter()
    assert wait(fork(data, model("llama"), out, *KILLED)) == 0
    return out, time.perf_counter() - started


def assert_same_run(out, whole):
    assert Path(out, "adapter_model.safetensors").read_bytes() == Path(whole, "adapter_model.safetensors").read_bytes()
    (steps, points), (wanted, wanted_points) = read_log(out), read_log(whole)
    assert [(line["step"], line["loss"]) for line in steps] == [(line["step"], line["loss"]) for line in wanted]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert [line["valid"] for line in points] == [line["valid"] for line in wanted_points]
    runs = [json.loads(Path(folder, "run.json").read_text()) for folder in (out, whole)]
    assert runs[0]["curve"] == runs[1]["curve"] and runs[0]["samples"] == runs[1]["samples"]
    assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"]


def kill_at_random_moments(times, seed, data, folder, out, whole, command=KILLED, start=lambda *a: [fork(*a)]):
    """Start a run, kill it at a random moment, and so on; then let it finish."""
    moments, killed = random.Random(seed), 0
    for _ in range(10 * times):
        if killed == times:
            break
        children = start(data, folder, out, *command)
        time.sleep(moments.uniform(0.2, 1) * whole[1])
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += [wait(child) for child in children][0] == -signal.SIGKILL
        if Path(out, "run.json").exists() and not Path(out, "state.pt").exists():
            assert_same_run(out, whole[0])
            shutil.rmtree(out)
    assert killed == times
    assert [wait(child) for child in start(data, folder, out, *command)] == [0] * len(children)
    assert_same_run(out, whole[0])


def test_killed_at_3_random_moments(data, model, tmp_path, whole):
    kill_at_random_moments(3, 1, data, model("llama"), tmp_path / "out", whole)


@pytest.mark.slow
def test_killed_at_20_random_moments(data, model, tmp_path, whole):
    kill_at_random_moments(20, 2, data, model("llama"), tmp_path / "out", whole)


def test_killed_before_or_after_each_file_is_put_in_place(data, model, tmp_path, whole, monkeypatch):
    replace, deaths = os.replace, 0
    while True:
        def dying(source, target, calls=[]):
            calls.append(target)
            if len(calls) == 1 + deaths // 2 and deaths % 2:
                replace(source, target)
            if len(calls) == 1 + deaths // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        ended = wait(fork(data, model("llama"), tmp_path / "out", *KILLED,
                          prepare=lambda: monkeypatch.setattr(os, "replace", dying)))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        deaths += 1
    assert deaths >= 6
    assert_same_run(tmp_path / "out", whole[0])


def test_a_finished_run_is_left_alone_and_other_arguments_are_refused(data, model, tmp_path, whole, capfd, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    monkeypatch.setattr(common, "load_scorer", None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(data, model("llama"), out, *KILLED) == 0
    assert run(data, model("llama"), out, *KILLED, "--max-tokens", 200, "--gradient-checkpointing") == 0  # only memory
    shutil.copytree(model("llama"), tmp_path / "moved")
    assert run(data, tmp_path / "moved", out, *KILLED) == 0
    assert "other lr:" in error_of(capfd, data, model("llama"), out, *KILLED, "--lr", 1e-5)
    assert "other seed:" in error_of(capfd, data, model("llama"), out, *KILLED, "--seed", 1)
    assert "other train, valid, data_sha256" in error_of(capfd, data, model("llama"), out, "--train", "mind", *KILLED[3:])
    shutil.copytree(data, tmp_path / "data")
    write_dataset(tmp_path / "data", "pens", {"train": [4] * 9, "valid": [4] * 9}, seed=9)
    assert "other data_sha256:" in error_of(capfd, tmp_path / "data", model("llama"), out, *KILLED)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "run.json").unlink()  # an adapter of somebody else
    assert "made with other" in error_of(capfd, data, model("llama"), out, *KILLED)
    assert (out / "adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]
    monkeypatch.undo()
    assert run(data, model("llama"), out, "--train", "pens", *QUICK, "--epochs", 1, "--overwrite") == 0
    assert len(losses(out)) == 3 and json.loads((out / "run.json").read_text())["train"] == ["pens"]


def test_overwrite_removes_nothing_before_there_is_something_in_its_place(data, model, tmp_path, whole, capfd, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = [out, "--train", "pens", *QUICK, "--epochs", 1, "--overwrite"]
    assert "cannot be used" in error_of(capfd, data, "misspelt/model", *command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    child = fork(data, model("llama"), *command, prepare=lambda: after_one(os, "replace"))
    assert wait(child) == -signal.SIGKILL  # the new state is there, and the old run not yet gone
    assert (out / "state.pt").exists() and (out / "run.json").read_bytes() == before["run.json"]
    assert run(data, model("llama"), *command[:-1]) == 0  # continues
    assert json.loads((out / "run.json").read_text())["train"] == ["pens"]


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_two_processes_are_one(data, model, tmp_path, monkeypatch, kind):
    command = ["--train", "mind", "--valid", "mind", "pens", *EXACT, *QUICK, "--type", kind, "--epochs", 5]
    assert run(data, model("llama"), tmp_path / "one", *command) == 0
    if kind == "embed":
        children = fork_two(data, model("llama"), tmp_path / "two", *command)
    else:  # who validates how many users
        score = common.score_prompts

        def counted(scorer, users):
            with open(tmp_path / f"{os.environ['RANK']}.users", "a") as file:
                file.write(f"{len(users)}\n")
            return score(scorer, users)
        monkeypatch.setattr(common, "score_prompts", counted)
        children = fork_two(data, model("llama"), tmp_path / "two", *command)
    assert [wait(child) for child in children] == [0, 0]
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-5
    (steps, points), (_, wanted) = read_log(tmp_path / "two"), read_log(tmp_path / "one")
    assert [line["step"] for line in steps] == list(range(1, 31)) and len(points) == 6
    for point, other in zip(points, wanted, strict=True):
        assert point["valid"] == pytest.approx(other["valid"], rel=1e-12)
    if kind == "prompt":  # 7 and 4 users, before the first step and after each epoch
        counts = [(tmp_path / f"{rank}.users").read_text().split() for rank in range(2)]
        assert counts == [["4", "2"] * 6, ["3", "2"] * 6]


def test_two_processes_killed_and_continued(data, model, tmp_path):
    command = [*KILLED[:-1], 3]
    started = time.perf_counter()
    assert [wait(child) for child in fork_two(data, model("llama"), tmp_path / "whole", *command)] == [0, 0]
    seconds = time.perf_counter() - started
    whole = tmp_path / "whole", seconds
    kill_at_random_moments(2, 3, data, model("llama"), tmp_path / "out", whole, command, fork_two)


def test_torchrun(data, model, tmp_path):
    command = ["--train", "mind", *EXACT, *QUICK, "--epochs", 5, "--eval-every", 10]
    assert run(data, model("llama"), tmp_path / "one", *command) == 0
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py",
         "--data", data, "--model", model("llama"), "--out", tmp_path / "two", "--device", "cpu", *map(str, command)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-5
    assert ended.stdout.count("best auc") == 1 and ended.stderr.count("step 30: auc") == 1


# ------------------------------------------------------------------------- early stopping, the best adapter, validation


def test_early_stopping_looks_at_the_mean_and_the_best_adapter_is_kept(data, model, tmp_path, monkeypatch, capsys):
    curve = [(0.5, 0.5), (0.5, 0.6), (0.9, 0.5), (0.6, 0.85), (0.95, 0.3), (0.5, 0.9), (0.99, 0.99)]
    seen = []  # means: .5 .55 .7 .725 .625 .7, the first before any step

    def scripted(args, scorer, valid):
        seen.append({n: p.detach().clone() for n, p in scorer.model.named_parameters() if p.requires_grad})
        return dict(zip(valid, curve[len(seen) - 1], strict=True))
    monkeypatch.setattr(finetune, "validate", scripted)
    assert run(data, model("llama"), tmp_path, "--train", "mind", "pens", *QUICK, "--eval-every", 2) == 0
    result = json.loads(Path(tmp_path, "run.json").read_text())
    assert (result["steps"], result["best"]["step"], len(seen)) == (10, 6, 6)
    assert result["best"]["valid"] == {"mind": 0.6, "pens": 0.85} and result["best"]["mean"] == pytest.approx(0.725)
    for name, tensor in adapter(tmp_path).items():
        assert torch.equal(tensor, seen[3][name.replace(".weight", ".default.weight")])
    assert result["unstable"] and result["beats_base"] and "unstable training" in capsys.readouterr().out


def test_the_curve_starts_with_the_base_model(data, model, tmp_path):
    assert run(data, model("llama"), tmp_path / "run", "--train", "pens", *QUICK, "--epochs", 1) == 0
    first = json.loads((tmp_path / "run/run.json").read_text())["curve"][0]
    assert common.run(evaluate.main, ["--data", str(data), "--model", model("llama"), "--test", "pens", "--split", "valid",
                                      "--out", str(tmp_path / "zero")]) == 0
    assert first["step"] == 0
    assert first["mean"] == pytest.approx(json.loads((tmp_path / "zero/pens.json").read_text())["auc"], abs=1e-9)


def test_an_adapter_that_never_beats_the_base_model_is_said_so_and_changes_nothing(data, model, tmp_path, monkeypatch,
                                                                                   capsys):
    falling = iter([0.9, 0.8, 0.7])
    monkeypatch.setattr(finetune, "validate", lambda args, scorer, valid: {"pens": next(falling)})
    assert run(data, model("llama"), tmp_path, "--train", "pens", *QUICK) == 0
    result = json.loads(Path(tmp_path, "run.json").read_text())
    assert (result["beats_base"], result["best"]["step"], result["steps"]) == (False, 0, 6)
    assert "no evaluation was better than that before the first step" in capsys.readouterr().out
    assert all(not tensor.any() for name, tensor in adapter(tmp_path).items() if "lora_B" in name)


def test_the_settings_of_the_run_are_printed(data, model, tmp_path, capsys):
    write_dataset(tmp_path / "data", "mine", {"train": [6] * 6, "valid": [6] * 3, "test": [4] * 3})
    for name in ("mind", "pens"):
        shutil.copytree(data / name, tmp_path / "data" / name)
    assert run(tmp_path / "data", model("llama"), tmp_path / "run", "--train", "mind", "mine", *QUICK, "--epochs", 1) == 0
    printed = capsys.readouterr().out
    assert "setting H for mind, mine (" in printed and "setting G for pens (" in printed
    assert json.loads((tmp_path / "run/run.json").read_text())["domains"] == {"mind": "news", "mine": "toys"}


def test_unstable_training_is_seen_in_the_curve():
    def curve(*means):
        return [{"mean": mean} for mean in means]
    assert not finetune.unstable(curve(0.6, 0.7, 0.69, 0.66, 0.7)) and not finetune.unstable(curve(0.5))
    assert finetune.unstable(curve(0.6, 0.7, 0.64, 0.7))


def test_the_loop_can_be_lifted_out(model, tmp_path):
    """fine_tune takes a scorer and token ids: no files but its own state."""
    args = finetune.arguments(["--model", model("llama"), "--train", "-", "--out", str(tmp_path), "--lr", "0.003",
                               "--epochs", "3", "--device", "cpu"])
    scorer = finetune.add_lora(args, common.load_scorer(args))
    train = [([[5, 6, 7, 8], [5, 6, 7, 9]], [1, 0]) for _ in range(20)]
    valid = {"made-up": [{"user": "u", "history": ["red"], "candidates": ["moon", "king"], "labels": [1, 0]}]}
    state = finetune.fine_tune(args, scorer, train, valid, None, {})
    losses = [line["loss"] for line in state["log"] if "loss" in line]
    assert state["steps"] == len(losses) > 2 and losses[-1] < losses[0]


def test_validation_on_a_dataset_that_is_not_trained_on_is_said(data, model, tmp_path, capsys):
    command = [data, model("llama"), tmp_path / "run", "--train", "mind", *QUICK, "--epochs", 1]
    assert run(*command, "--valid", "pens", "--valid-metric", "ndcg@5") == 0
    assert "validating on pens, not trained on" in capsys.readouterr().err
    result = json.loads(Path(tmp_path, "run", "run.json").read_text())
    assert (result["valid"], result["train_chain"], list(result["best"]["valid"])) == (["pens"], ["mind"], ["pens"])
    results = tmp_path / "results"
    assert common.run(evaluate.main, ["--data", str(data), "--model", model("llama"), "--adapter", str(tmp_path / "run"),
                                      "--test", "pens", "--split", "valid", "--out", str(results)]) == 0
    assert result["best"]["mean"] == pytest.approx(json.loads((results / "pens.json").read_text())["ndcg@5"], abs=1e-9)


# --------------------------------------------------------------------------------------------------------- the adapter


def test_sequential_training_continues_the_adapter_in_both_orders(data, model, tmp_path, capfd):
    flags, tests = [*QUICK, "--epochs", 1], ["mind", "pens", "goodreads"]
    for a, b in (("mind", "goodreads"), ("goodreads", "mind")):
        assert run(data, model("llama"), tmp_path / a, "--train", a, *flags) == 0
        out = tmp_path / f"{a}-{b}"
        capfd.readouterr()
        assert run(data, model("llama"), out, "--train", b, "--init-adapter", tmp_path / a, "--lr", 1e-12,
                   "--epochs", 1) == 0
        said = capfd.readouterr().err
        assert "without packing" not in said and "rank 4, alpha 128" in said
        result = json.loads((out / "run.json").read_text())
        assert (result["train"], result["train_chain"]) == ([b], [a, b]) and result["arguments"]["lora_r"] == 4
        assert result["valid_chain"] == [a, b]
        for name, tensor in adapter(tmp_path / a).items():  # with such a rate it stays where it began
            assert (adapter(out)[name] - tensor).abs().max() < 1e-8
        results = tmp_path / f"{a}-{b}-results"
        assert common.run(evaluate.main, ["--data", str(data), "--model", model("llama"), "--adapter", str(out),
                                          "--test", *tests, "--out", str(results)]) == 0
        printed = capfd.readouterr().out
        for test, letter in zip(tests, "HGH"):
            assert re.search(rf"\| {test} +\| {letter} ", printed)
    assert "same folder" in error_of(capfd, data, model("llama"), tmp_path / "mind", "--train", "pens",
                                     "--init-adapter", tmp_path / "mind", "--overwrite")
    assert (tmp_path / "mind" / "adapter_model.safetensors").exists()


def test_an_adapter_belongs_to_its_base_model_and_type(data, model, tmp_path, whole, capfd):
    init = ["--train", "pens", "--init-adapter", whole[0], "--epochs", 1]
    assert "is an adapter for --model" in error_of(capfd, data, model("bert"), tmp_path / "out", *init)
    assert "--type prompt, not for" in error_of(capfd, data, model("llama"), tmp_path / "out", *init, "--type", "embed")
    moved = shutil.copytree(model("llama"), tmp_path / "moved")
    assert run(data, moved, tmp_path / "out", *init) == 0  # the same files elsewhere
    network = transformers.AutoModelForCausalLM.from_pretrained(moved)
    torch.nn.init.normal_(network.model.norm.weight)
    network.save_pretrained(moved)
    assert "is an adapter for --model" in error_of(capfd, data, moved, tmp_path / "other", *init)
    shutil.copytree(whole[0], tmp_path / "unfinished")
    (tmp_path / "unfinished" / "run.json").unlink()
    assert "no finished run" in error_of(capfd, data, model("llama"), tmp_path / "other", "--train", "pens",
                                         "--init-adapter", tmp_path / "unfinished")


@pytest.mark.parametrize("family", ["glm4-0414", "phi3"])
def test_where_peft_names_no_targets_all_linear_layers_are_adapted(data, model, tmp_path, family, capsys):
    assert run(data, model(family), tmp_path, "--train", "pens", *QUICK, "--epochs", 1) == 0
    assert capsys.readouterr().err.count("adapting all-linear") == 1
    names = {name.split(".")[-3] for name in adapter(tmp_path)}
    assert {"o_proj", "down_proj", "gate_up_proj"} <= names and "lm_head" not in names


def test_targets_can_be_chosen_and_a_plain_peft_model_loads_the_adapter(data, model, tmp_path):
    assert run(data, model("llama"), tmp_path, "--train", "pens", *QUICK, "--epochs", 1, "--lora-targets", "o_proj",
               "k_proj") == 0
    assert {name.split(".")[-3] for name in adapter(tmp_path)} == {"o_proj", "k_proj"}
    network = transformers.AutoModelForCausalLM.from_pretrained(model("llama"))
    network = peft.PeftModel.from_pretrained(network, tmp_path)
    weights = {n.replace(".default", ""): p for n, p in network.named_parameters() if "lora" in n}
    assert weights.keys() == adapter(tmp_path).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapter(tmp_path).items())


MIXTURES = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=2), {"q_proj", "v_proj"}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(num_experts=2, num_experts_per_tok=1, head_dim=8,
                  moe_intermediate_size=16), {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", dict(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=0),
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {}, None),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_of_a_mixture_of_experts_attention_is_adapted(data, tmp_path, capfd, name):
    """Experts take LoRA without dropout only. For Mamba peft has nothing: one line."""
    config_name, model_name, changes, targets = MIXTURES[name]
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, state_size=8)
    tokenizer = tiny.byte_level()
    config = getattr(transformers, config_name)(vocab_size=len(tokenizer), pad_token_id=0, num_key_value_heads=4,
                                                **{**small, **changes})
    getattr(transformers, model_name)(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [data, tmp_path / "model", tmp_path / "run", "--train", "pens", *QUICK, "--epochs", 1]
    if targets is None:
        assert "choose other --lora-targets" in error_of(capfd, *command)
        return
    assert run(*command) == 0
    assert {key.split(".")[-3] for key in adapter(tmp_path / "run")} == targets


@pytest.mark.parametrize("family, head", [("llama", "lm_head"), ("bert", "decoder")])
def test_the_lm_head_is_refused_as_a_target(data, model, tmp_path, capfd, family, head):
    """It has two rows here."""
    error = error_of(capfd, data, model(family), tmp_path / "out", "--train", "pens", "--lora-targets", head)
    assert "names the LM head, which has only the rows of the two answers here" in error


def test_float16_is_refused(data, model, tmp_path, capfd):
    error = error_of(capfd, data, model("llama"), tmp_path / "out", "--train", "pens", "--dtype", "float16")
    assert "bfloat16 or float32" in error


def test_adapters_are_float32_over_a_bfloat16_base(data, model, tmp_path):
    assert run(data, model("llama"), tmp_path, "--train", "pens", *QUICK, "--epochs", 1, "--dtype", "bfloat16") == 0
    saved = adapter(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    args = scorer_and_data(data, model("llama"), "--dtype", "bfloat16")[0]
    for trainable in (True, False):
        network = common.load_adapter(common.load_scorer(args), tmp_path, trainable).model
        for name, p in network.named_parameters():
            assert p.dtype == (torch.float32 if "lora" in name or "lm_head" in name else torch.bfloat16)
            assert "lora" not in name or torch.equal(p, saved[name.replace(".default", "")])


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_rate_that_diverges_is_one_line(data, model, tmp_path, capfd):
    for kind in ("prompt", "embed"):
        command = [data, model("llama"), tmp_path / kind, "--train", "mind", "--lr", 1e30, "--type", kind]
        assert "lower --lr (now 1e+30)" in error_of(capfd, *command)
        assert not list((tmp_path / kind).glob("adapter*"))
        assert "NaN or infinite" in error_of(capfd, *command, "--eval-every", 1, "--overwrite")


def test_a_damaged_state_is_one_line(data, model, tmp_path, capfd):
    out = tmp_path / "out"
    assert wait(fork(data, model("llama"), out, *KILLED, prepare=lambda: after_one(finetune, "save_state"))) == -9
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:999])
    assert "state.pt is damaged" in error_of(capfd, data, model("llama"), out, *KILLED)
    assert run(data, model("llama"), out, *KILLED, "--overwrite") == 0


@pytest.mark.parametrize("limit", [300, 10_000])
def test_a_file_size_limit_is_one_line_and_the_run_continues(data, model, tmp_path, whole, limit):
    out = tmp_path / "out"
    assert wait(fork(data, model("llama"), out, *KILLED, prepare=lambda: after_one(finetune, "save_state"))) == -9
    before = (out / "state.pt").read_bytes()
    read, write = os.pipe()  # a file would be limited too
    child = fork(data, model("llama"), out, *KILLED, output=write,
                 prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    os.close(write)
    line = error_line(open(read).read())
    assert wait(child) == 2 and ("File too large" in line or "cannot be written" in line)
    assert (out / "state.pt").read_bytes() == before
    assert run(data, model("llama"), out, *KILLED) == 0
    assert_same_run(out, whole[0])


def after_one(module, name):
    """Kill this process after the first call of a function."""
    original = getattr(module, name)

    def dying(*args):
        original(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, dying)


def test_errors_that_the_user_can_fix(data, model, tmp_path, capfd):
    def error(*argv, folder=model("llama"), out=tmp_path / "out"):
        return error_of(capfd, data, folder, out, *argv)
    train = ["--train", "mind"]
    assert "no_such_module" in error(*train, "--lora-targets", "no_such_module")
    assert "nothing to train" in error(*train, "--type", "embed", "--lora-targets", "pooler.dense",
                                       folder=model("bert-encoder"), out=tmp_path / "pooler")
    assert "has no LM head" in error(*train, folder=model("bert-encoder"))
    assert "--lr is a positive number" in error(*train, "--lr", "nan")
    assert "--lora-dropout at least 0" in error(*train, "--lora-dropout", 1.5)
    assert "run: python prepare_data.py hm" in error("--train", "hm")
    assert "no finished run" in error(*train, "--init-adapter", tmp_path / "nothing")
    write_dataset(tmp_path / "half", "mind", {"train": [4]})
    assert "mind has no valid split" in error_of(capfd, tmp_path / "half", "no/such/model", tmp_path / "out", *train)
    write_dataset(tmp_path / "one", "mind", {"train": [4], "valid": [1]})
    assert "auc is undefined" in error_of(capfd, tmp_path / "one", model("llama"), tmp_path / "out", *train)
    write_dataset(tmp_path / "none", "mind", {"train": [], "valid": [4]})
    assert "train.jsonl is empty" in error_of(capfd, tmp_path / "none", model("llama"), tmp_path / "o", *train)
    (tmp_path / "file").write_text("")
    assert "file" in error(*train, out=tmp_path / "file" / "out")
    assert not list(tmp_path.glob("*/adapter*"))
