"""finetune.py: loss and gradients, batches, killed runs, several processes, validation, adapters, what is refused."""
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
EXACT = ["--dtype", "float64", "--lora-dropout", 0]
QUICK = ["--lr", 1e-3, "--lora-r", 4]
LEARNING = ["--lr", 1e-2, "--lora-r", 4, "--epochs", 1, "--eval-every", 1, "--patience", 9]  # soon beats the base model
SHORT = ["--train", "pens", *LEARNING]  # three steps
DROPOUT = ["--train", "mind", "pens", *QUICK, "--lora-dropout", 0.3, "--epochs", 2, "--eval-every", 5]  # 18 steps
RUN_FILES = ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"]


def write_dataset(data, name, sizes, seed=0, ending=""):
    """A prepared dataset. sizes: {split: [number of candidates per user]}; ending: what every item text ends in."""
    folder = Path(data, name)
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(name)])
    titles = [f"{first} {second}" for first in ("the", "old", "new", "blue") for second in GOOD + BAD]
    items = [{"id": f"i{i}", "text": title + ending} for i, title in enumerate(titles)]
    write_lines(folder / "items.jsonl", items)
    for split, numbers in sizes.items():
        users = []
        for number in numbers:
            history = rng.permutation(len(items))[:rng.integers(2, 5)]
            others = [i for i in rng.permutation(len(items)).tolist() if i not in (0, 4)]
            candidates = [0, 4, *others][:number]  # a positive and a negative first
            users.append({"user": f"{split}{len(users)}", "history": [f"i{i}" for i in history],
                          "candidates": [f"i{i}" for i in candidates],
                          "labels": [int(titles[i].split()[1] in GOOD) for i in candidates]})
        write_lines(folder / f"{split}.jsonl", users)
    meta = {"format": 1, "domain": common.DOMAINS.get(name, "toys")}
    Path(folder, "meta.json").write_text(json.dumps(meta))


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three datasets: mind has 161 training samples (five batches and one sample), the others 65."""
    folder = tmp_path_factory.mktemp("data")
    sizes = [13, 4, 7, 10, 2, 23, 6]
    write_dataset(folder, "mind", {"train": sizes * 2 + [31], "valid": [6] * 7, "test": [4] * 5})
    write_dataset(folder, "pens", {"train": sizes, "valid": [5] * 4, "test": [4] * 5}, seed=1)
    write_dataset(folder, "goodreads", {"train": sizes, "valid": [5] * 4, "test": [4] * 5}, seed=2)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: folder of a tiny model}."""
    folder = tmp_path_factory.mktemp("models")
    families = ("llama", "bert", "bert-encoder", "t5", "phi3", "glm4-0414")
    return {family: tiny.build(family, folder / family) for family in families}


def run(data, model, out, *argv):
    """Exit code of a command line of finetune.py, in this process."""
    files = ["--data", data, "--model", model, "--out", out, "--device", "cpu"]
    return common.run_script(finetune.main, list(map(str, [*files, *argv])))


def error_of(capfd, *argv):
    """The one line on standard error of a command line that must end with exit code 2."""
    capfd.readouterr()
    assert run(*argv) == 2
    stderr = capfd.readouterr().err
    lines = [line for line in re.split("[\r\n]", stderr) if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.strip().endswith(lines[0]) and "Traceback" not in stderr, stderr
    return lines[0]


def evaluated(data, model, out, *argv):
    """Results of evaluate.py on pens's validation users: (result, lines of the scores file)."""
    command = ["--data", data, "--model", model, "--out", out, "--test", "pens", "--split", "valid", *argv]
    assert common.run_script(evaluate.main, list(map(str, command))) == 0
    return read_json(out / "pens.json"), (out / "pens.scores.jsonl").read_text().splitlines()[1:]


def read_json(path):
    return json.loads(Path(path).read_text())


def losses(out):
    lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def adapter(out):
    return load_file(Path(out, "adapter_model.safetensors"))


def adapted(out):
    """Names of the modules that an adapter adapts."""
    return {key.split(".")[-3] for key in adapter(out)}


def contents(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def assert_nearly_same(out, wanted):
    """The same losses and adapter up to rounding (RMSNorm computes in float32), relative to the size of each tensor."""
    assert losses(out) == pytest.approx(losses(wanted), rel=1e-5)
    tensors, expected = adapter(out), adapter(wanted)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name


def assert_same_run(out, wanted):
    """The same bits of the adapter, the same run.json and log.jsonl but for times, and nothing else in the folder."""
    assert sorted(os.listdir(out)) == RUN_FILES
    assert contents(out)["adapter_model.safetensors"] == contents(wanted)["adapter_model.safetensors"]
    assert without_times(out) == without_times(wanted)


def without_times(out):
    """run.json and the lines of log.jsonl without what may differ: times, memory and the arguments (out, overwrite)."""
    lines = Path(out, "log.jsonl").read_text().splitlines()
    values = [read_json(Path(out, "run.json")), *map(json.loads, lines)]
    for value in values:
        for key in ("seconds", "samples_per_s", "tokens_per_s", "peak_memory_gb", "arguments"):
            value.pop(key, None)
    return values


# ------------------------------------------------------------------------------------------------------ losses, batches


def scorer_and_train(data, model, *argv):
    """(a scorer with an adapter whose gradients are not zero, training users of mind), in float64, without dropout."""
    command = ["--data", data, "--model", model, "--out", "-", "--train", "mind", "--device", "cpu", *EXACT, *argv]
    args = finetune.arguments(list(map(str, command)))
    scorer = finetune.add_lora(args, common.load_scorer(args))
    torch.manual_seed(0)
    for name, parameter in scorer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it half of the gradients
            torch.nn.init.normal_(parameter, std=0.05)
    for module in scorer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return scorer, finetune.read_train(args, scorer)[0]


def step(scorer, train, batch):
    """Loss and gradient of a step that moves nothing."""
    parameters = finetune.trained_parameters(scorer)
    loss, _ = finetune.train_step(scorer, torch.optim.Adam(parameters, lr=0.0), train, batch)
    return loss, torch.cat([parameter.grad.flatten() for parameter in parameters])


def test_a_step_takes_nothing_but_the_loss_from_the_models_device(data, models, monkeypatch):
    """A model on the device "meta", whose tensors have no values: only item() is answered."""
    scorer, train = scorer_and_train(data, models["llama"])
    scorer.model.to("meta")
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 16.0)
    loss, gradient = step(scorer, train, finetune.epoch_batches(train, 0, 0, 32)[0])
    assert loss >= 16.0 and gradient.device.type == "meta"


@pytest.mark.parametrize("family, kind", [
    ("llama", "prompt"), ("bert", "prompt"), ("llama", "embed"), ("bert", "embed"),
    pytest.param("t5", "prompt", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_the_formula_one_sample_at_a_time(data, models, family, kind):
    scorer, train = scorer_and_train(data, models[family], "--type", kind)
    batch = finetune.epoch_batches(train, 0, 0, 32)[1]
    total = 0.0
    for user, candidate in batch:
        texts, labels = train[user]
        if kind == "prompt":
            row = common.Row([], [texts[candidate]], [0])
            score = common.score_rows(scorer._replace(layout="padded"), [row])[0]
            yes = 1 / (1 + torch.exp(-score))
            loss = -torch.log(yes if labels[candidate] else 1 - yes)
        else:
            a, b = common.embed(scorer, [texts[0]])[0], common.embed(scorer, [texts[candidate + 1]])[0]
            loss = (a @ b / a.norm() / b.norm() - labels[candidate]) ** 2
        (loss / 32).backward()
        total += loss.item() / 32
    gradient = torch.cat([parameter.grad.flatten() for parameter in finetune.trained_parameters(scorer)])
    assert gradient.abs().max() > 1e-4

    for changes in ({}, {"max_tokens": 120}, {"max_tokens": 1}, {"layout": "equal"}):
        loss, got = step(scorer._replace(**changes), train, batch)
        assert loss == pytest.approx(total, rel=1e-7)
        assert (got - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("kind, limit", [("prompt", 300), ("embed", 20)])
def test_a_forward_pass_holds_no_more_than_max_tokens(data, models, kind, limit):
    scorer, train = scorer_and_train(data, models["llama"], "--type", kind, "--max-tokens", limit)
    sizes = []

    def note_size(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:  # one row may be longer
            sizes.append(kwargs["input_ids"].numel())
    scorer.model.register_forward_pre_hook(note_size, with_kwargs=True)
    for batch in finetune.epoch_batches(train, 0, 0, 32):
        step(scorer, train, batch)
    assert limit / 2 < max(sizes) <= limit


def test_gradient_checkpointing_computes_each_layer_again(data, models):
    """That is where its memory is saved; that results stay the same is tested below."""
    for flags, passes in (([], 1), (["--gradient-checkpointing"], 2)):
        scorer, train = scorer_and_train(data, models["llama"], *flags)
        calls = []

        def note_call(module, args):
            calls.append(module)
        scorer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(note_call)
        step(scorer, train, [(0, 0)])
        assert len(calls) == passes


def test_batches_hold_32_samples_and_an_epoch_each_sample_once():
    sizes = [13, 4, 7, 10, 2, 23, 1, 40] * 5
    train = [([], [0] * size) for size in sizes]
    samples = {(user, candidate) for user, size in enumerate(sizes) for candidate in range(size)}
    chunks_of_all = sum(-(-size // finetune.CHUNK_SIZE) for size in sizes)
    first, second = finetune.epoch_batches(train, 7, 0, 32), finetune.epoch_batches(train, 7, 1, 32)
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [32] * 15 + [20]
        flat = sum(batches, [])
        assert len(flat) == len(samples) and set(flat) == samples
        chunks = 1 + sum(a[0] != b[0] for a, b in pairwise(flat))
        assert 0.8 * chunks_of_all < chunks <= chunks_of_all  # up to ten of a user's candidates stay together
        assert len({user for user, _ in batches[0]}) > 3
        assert [candidate for user, candidate in flat if user == 3] != list(range(10))  # shuffled within a chunk
    assert first != second and first == finetune.epoch_batches(train, 7, 0, 32)
    assert first != finetune.epoch_batches(train, 8, 0, 32)


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_packed_and_split_runs_end_with_the_same_adapter(data, models, tmp_path, monkeypatch, kind):
    command = ["--train", "mind", *EXACT, *QUICK, "--type", kind, "--epochs", 5, "--patience", 5]
    assert run(data, models["llama"], tmp_path / "whole", *command) == 0
    assert len(losses(tmp_path / "whole")) == 30 and losses(tmp_path / "whole").std() > 0.01
    assert run(data, models["llama"], tmp_path / "split", *command, "--max-tokens", 150) == 0
    assert_nearly_same(tmp_path / "split", tmp_path / "whole")
    if kind == "prompt":
        monkeypatch.setattr(common, "find_layout", unpacked)
        assert run(data, models["llama"], tmp_path / "unpacked", *command) == 0
        assert_nearly_same(tmp_path / "unpacked", tmp_path / "whole")


def unpacked(scorer):
    """In place of common.find_layout."""
    return "padded"


def test_gradient_checkpointing_repeats_the_dropout(data, models, tmp_path):
    command = [*DROPOUT, "--dtype", "float64", "--seed", 3]
    assert run(data, models["llama"], tmp_path / "plain", *command) == 0
    assert read_json(tmp_path / "plain/run.json")["beats_base"]  # so there is an adapter to compare
    assert run(data, models["llama"], tmp_path / "checkpointed", *command, "--gradient-checkpointing") == 0
    assert_nearly_same(tmp_path / "checkpointed", tmp_path / "plain")


@pytest.mark.parametrize("family, kind, lr, changes", [
    ("llama", "embed", 3e-3, {}),
    pytest.param("llama", "prompt", 1e-2, {}, marks=pytest.mark.slow),
    pytest.param("t5", "prompt", 3e-3, dict(dropout_rate=0.0), marks=pytest.mark.slow),
    pytest.param("bert-encoder", "embed", 3e-3, {}, marks=pytest.mark.slow)])
def test_training_learns_what_everybody_likes(data, tmp_path, family, kind, lr, changes):
    model = tiny.build(family, tmp_path / "model", **changes)
    command = ["--train", "mind", "--type", kind, "--lr", lr, "--lora-dropout", 0, "--epochs", 12, "--patience", 12]
    assert run(data, model, tmp_path / "run", *command) == 0
    by_epoch = losses(tmp_path / "run").reshape(-1, 6)[:, :5].mean(1)  # the sixth batch has one sample
    assert by_epoch[-1] < 0.85 * by_epoch[0]
    assert read_json(tmp_path / "run/run.json")["best"]["mean"] > 0.8


def test_histories_are_cut_by_user_and_counted(models, tmp_path, capsys):
    write_dataset(tmp_path, "mind", {"train": [12, 4], "valid": [4]}, ending=" light" * 100)
    _, train = scorer_and_train(tmp_path, models["llama"], "--max-length", 300)
    for texts, _ in train:
        assert max(map(len, texts)) <= 300
        assert len({tuple(text[:100]) for text in texts}) == 1  # all prompts of a user show the same history
    said = capsys.readouterr().err
    assert "texts were cut to fit" in said and "2 histories were cut to fit" in said


def test_the_loop_can_be_lifted_out(models, tmp_path):
    """fine_tune takes a scorer and token ids: no files but its own state."""
    args = finetune.arguments(["--model", models["llama"], "--train", "-", "--out", str(tmp_path), "--lr", "0.003",
                               "--epochs", "3", "--device", "cpu"])
    scorer = finetune.add_lora(args, common.load_scorer(args))
    train = [([[5, 6, 7, 8], [5, 6, 7, 9]], [1, 0])] * 20
    valid = {"made-up": [{"user": "u", "history": ["red"], "candidates": ["moon", "king"], "labels": [1, 0]}]}
    state = finetune.fine_tune(args, scorer, train, valid, None, {})
    values = [line["loss"] for line in state["log"] if "loss" in line]
    assert state["steps"] == len(values) > 2 and values[-1] < values[0]
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "state.pt"]


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
def whole(data, models, tmp_path_factory):
    """A run that was never killed: (folder, seconds)."""
    out = tmp_path_factory.mktemp("whole")
    started = time.perf_counter()
    assert run(data, models["llama"], out, *DROPOUT) == 0
    assert read_json(out / "run.json")["beats_base"]  # else the adapters compared below would all be zero
    return out, time.perf_counter() - started


def test_the_last_step_is_evaluated_too_and_the_seconds_of_a_run_are_those_of_all_its_steps(whole):
    assert [point["step"] for point in read_json(whole[0] / "run.json")["curve"]] == [0, 5, 10, 15, 16]
    lines = map(json.loads, Path(whole[0], "log.jsonl").read_text().splitlines())
    speeds = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
    seconds = read_json(whole[0] / "run.json")["seconds"]
    assert len(speeds) == 16 and sum(1 / speed for speed in speeds) < seconds < sum(33 / speed for speed in speeds)
    assert seconds < whole[1]


@pytest.mark.parametrize("at_step", [1, 5, 6, 14])
def test_killed_within_a_step_a_run_ends_with_the_same_bits(data, models, tmp_path, whole, monkeypatch, capsys, at_step):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at_call(patch, at_step, [(finetune, "train_step")])
        run(data, models["llama"], tmp_path, *DROPOUT)
    assert run(data, models["llama"], tmp_path, *DROPOUT) == 0
    evaluated_last = (at_step - 1) // 5 * 5
    assert f"continuing {tmp_path} after step {evaluated_last}\n" in capsys.readouterr().err
    assert_same_run(tmp_path, whole[0])


def test_killed_between_the_steps_of_its_end_a_run_ends_with_the_same_bits(data, models, tmp_path, whole, monkeypatch,
                                                                           capfd):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at_call(patch, 1, [(finetune, "save_run")])
        run(data, models["llama"], tmp_path / "trained", *DROPOUT)
    for number in count(1):
        out = shutil.copytree(tmp_path / "trained", tmp_path / f"out{number}")
        with monkeypatch.context() as patch:
            die_at_call(patch, number, FILE_STEPS)
            try:
                run(data, models["llama"], out, *DROPOUT)
                break
            except Killed:
                pass
        assert (out / "state.pt").exists()
        if not (out / "run.json").exists():  # half an adapter is not taken for one
            init = [tmp_path / "next", *SHORT, "--init-adapter", out]
            assert "no finished run" in error_of(capfd, data, models["llama"], *init)
        assert run(data, models["llama"], out, *DROPOUT) == 0
        assert_same_run(out, whole[0])
    assert number == 9  # state.pt and log.jsonl again (3 steps), the adapter (3), run.json, state.pt; then none to die at


def start(processes, *argv):
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
                code = run(*argv)
            finally:
                os._exit(code)
        children.append(child)
    return children


def wait(children):
    """How processes ended: exit codes, or minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_and_continue(processes, kills, whole, data, model, out):
    """kill -9 at random moments, until so many runs were killed; then let one finish."""
    folder, seconds = whole
    moments = random.Random(processes)
    killed = 0
    while killed < kills:
        children = start(processes, data, model, out, *DROPOUT)
        time.sleep(moments.uniform(0.2, 1) * seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += wait(children)[0] == -signal.SIGKILL
        if Path(out, "run.json").exists() and not Path(out, "state.pt").exists():  # it was done before
            assert_same_run(out, folder)
            shutil.rmtree(out)
    assert wait(start(processes, data, model, out, *DROPOUT)) == [0] * processes
    assert_same_run(out, folder)


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(data, models, tmp_path, whole, kills):
    kill_and_continue(1, kills, whole, data, models["llama"], tmp_path / "out")


def test_a_kill_between_the_last_state_and_its_log_loses_no_line(data, models, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):  # when all is trained
        die_at_call(patch, 1, [(finetune, "save_run")])
        run(data, models["llama"], tmp_path / "out", *DROPOUT)
    log = tmp_path / "out/log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-3]))
    assert run(data, models["llama"], tmp_path / "out", *DROPOUT) == 0
    assert_same_run(tmp_path / "out", whole[0])


def test_ctrl_c_ends_with_exit_code_130_and_the_run_continues(data, models, tmp_path):
    command = [sys.executable, "finetune.py", "--data", data, "--model", models["llama"], "--out", tmp_path, "--device",
               "cpu", "--train", "pens", "--epochs", "100000", "--patience", "100000"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "run the same command again, without --overwrite" in stderr
    assert torch.load(tmp_path / "state.pt")["curve"]


def test_a_damaged_state_is_one_line(data, models, tmp_path, capfd):
    for content in (b"PK\x03\x04 half of it", b""):
        (tmp_path / "state.pt").write_bytes(content)
        assert "state.pt is damaged" in error_of(capfd, data, models["llama"], tmp_path, *SHORT)
    torch.save([1], tmp_path / "state.pt")
    assert "state.pt is damaged" in error_of(capfd, data, models["llama"], tmp_path, *SHORT)
    assert run(data, models["llama"], tmp_path, *SHORT, "--overwrite") == 0
    assert sorted(os.listdir(tmp_path)) == RUN_FILES


def test_a_full_disk_is_one_line_and_the_run_continues(data, models, tmp_path, whole, monkeypatch, capfd):
    saves = []

    def save(value, path):
        saves.append(path)
        if len(saves) == 3:
            raise RuntimeError("PytorchStreamWriter failed writing file data/5")
        return original(value, path)
    original = torch.save
    monkeypatch.setattr(torch, "save", save)
    assert "state.pt cannot be written" in error_of(capfd, data, models["llama"], tmp_path, *DROPOUT)
    assert run(data, models["llama"], tmp_path, *DROPOUT) == 0
    assert_same_run(tmp_path, whole[0])


# ----------------------------------------------------------------------------------------------- what is in a run's way


def test_a_finished_run_answers_at_once_and_other_arguments_are_refused(data, models, tmp_path, whole, capfd, monkeypatch):
    monkeypatch.setattr(common, "load_scorer", None)  # nothing is loaded
    out = shutil.copytree(whole[0], tmp_path / "out")
    moved = shutil.copytree(models["llama"], tmp_path / "moved")
    for model, flags in ((models["llama"], []), (moved, []), (moved, ["--max-tokens", 200, "--gradient-checkpointing"])):
        assert run(data, model, out, *DROPOUT, *flags) == 0
        assert "is finished already" in capfd.readouterr().err
    for flags, what in ((["--lr", 1e-5], "lr:"), (["--seed", 1], "seed:"), (["--type", "embed"], "type:"),
                        (["--train", "mind"], "train, valid, data_sha256:")):
        assert f"made with a different {what}" in error_of(capfd, data, models["llama"], out, *DROPOUT, *flags)
    other_data = tmp_path / "data"
    shutil.copytree(data / "mind", other_data / "mind")
    write_dataset(other_data, "pens", {"train": [4] * 9, "valid": [4] * 9}, seed=9)
    assert "made with a different data_sha256:" in error_of(capfd, other_data, models["llama"], out, *DROPOUT)
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize("name, text", [("adapter_config.json", "{}"), ("run.json", '{"mine": 1}'),
                                        ("run.json", "[]"), ("run.json", '{"job": 3}')])
def test_the_files_of_another_program_are_refused(data, models, tmp_path, capfd, name, text):
    (tmp_path / name).write_text(text)
    assert "was not made by this script" in error_of(capfd, data, models["llama"], tmp_path, *SHORT)
    assert contents(tmp_path) == {name: text.encode()}
    if name == "run.json":
        init = [tmp_path / "out", *SHORT, "--init-adapter", tmp_path]
        assert "is missing or of another program" in error_of(capfd, data, models["llama"], *init)


def test_overwrite_removes_nothing_before_there_is_something_in_its_place(data, models, tmp_path, whole, capfd,
                                                                         monkeypatch):
    before = contents(whole[0])
    misspelt = shutil.copytree(whole[0], tmp_path / "misspelt")
    assert "cannot be used" in error_of(capfd, data, "misspelt/model", misspelt, *SHORT, "--overwrite")
    assert contents(misspelt) == before

    assert run(data, models["llama"], tmp_path / "wanted", *SHORT) == 0
    for number in (1, 2, 3):  # state.pt is put in place, log.jsonl is written; then those of the next state
        out = shutil.copytree(whole[0], tmp_path / f"out{number}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at_call(patch, number, FILE_STEPS)
            run(data, models["llama"], out, *SHORT, "--overwrite")
        after = contents(out)
        for file in ("adapter_model.safetensors", "adapter_config.json", "run.json"):  # can be used as before
            assert after[file] == before[file]
        assert ("state.pt" in after) == (number > 1)
        if number == 1:
            assert "made with a different" in error_of(capfd, data, models["llama"], out, *SHORT)
        else:
            assert run(data, models["llama"], out, *SHORT) == 0
            assert_same_run(out, tmp_path / "wanted")


# --------------------------------------------------------------------------------------------------- several processes


TWO = ["--train", "mind", "--valid", "mind", "pens", *EXACT, *QUICK, "--epochs", 5, "--eval-every", 10, "--patience", 5]


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_two_processes_are_one(data, models, tmp_path, kind):
    command = [*TWO, "--type", kind]
    assert run(data, models["llama"], tmp_path / "one", *command) == 0
    assert wait(start(2, data, models["llama"], tmp_path / "two", *command)) == [0, 0]
    assert_nearly_same(tmp_path / "two", tmp_path / "one")
    assert len(losses(tmp_path / "two")) == 30
    curves = [read_json(tmp_path / name / "run.json")["curve"] for name in ("two", "one")]
    for point, wanted in zip(*curves, strict=True):
        assert point["valid"] == pytest.approx(wanted["valid"], rel=1e-12)


def test_two_processes_share_the_validation_users_and_draw_dropout_of_their_own(data, models, tmp_path, monkeypatch,
                                                                                capfd):
    score_prompts = common.score_prompts

    def counted(scorer, users):
        with open(tmp_path / os.environ["RANK"], "a") as file:
            file.write(f"{len(users)} ")
        return score_prompts(scorer, users)
    monkeypatch.setattr(common, "score_prompts", counted)
    command = [data, models["llama"], tmp_path / "out", *SHORT]
    assert wait(start(2, *command)) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 " * 4, "2 " * 4]  # of four, four times
    assert run(*command) == 0 and "finished already" in capfd.readouterr().err  # by one process, too

    def seed_alone(*args):
        (tmp_path / f"seed{os.environ['RANK']}").write_text(str(torch.initial_seed()))
        sys.exit()
    monkeypatch.setattr(finetune, "train_step", seed_alone)
    wait(start(2, data, models["llama"], tmp_path / "first", *SHORT))
    assert (tmp_path / "seed0").read_text() != (tmp_path / "seed1").read_text()


def test_two_processes_do_not_share_a_gpu(data, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    command = ["--data", data, "--model", models["llama"], "--out", tmp_path / "out", "--train", "mind"]
    assert common.run_script(finetune.main, list(map(str, command))) == 2
    assert "2 processes here, each for a GPU of its own, and there are 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_torchrun(data, models, tmp_path, kind):
    command = [*TWO, "--type", kind]
    assert run(data, models["llama"], tmp_path / "one", *command) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "finetune.py",
                "--data", data, "--model", models["llama"], "--out", tmp_path / "two", "--device", "cpu", *command]
    ended = subprocess.run(list(map(str, torchrun)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("best auc") == 1 and ended.stderr.count("step 30: auc") == 1  # the first process alone
    assert_nearly_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_killed_and_continued(data, models, tmp_path):
    out = tmp_path / "whole"
    started = time.perf_counter()
    assert wait(start(2, data, models["llama"], out, *DROPOUT)) == [0, 0]
    whole = out, time.perf_counter() - started
    kill_and_continue(2, 2, whole, data, models["llama"], tmp_path / "out")


# ------------------------------------------------------------------------- early stopping, the best adapter, validation


def test_early_stopping_looks_at_the_mean_and_the_best_adapter_is_kept(data, models, tmp_path, monkeypatch, capsys):
    script = [(0.5, 0.5), (0.5, 0.6), (0.9, 0.5), (0.6, 0.85), (0.95, 0.3), (0.5, 0.9), (0.99, 0.99)]
    seen = []  # means: .5 .55 .7 .725 .625 .7, then patience ends; the first is before any step

    def scripted(args, scorer, valid):
        seen.append([parameter.detach().clone() for parameter in finetune.trained_parameters(scorer)])
        return dict(zip(valid, script[len(seen) - 1], strict=True))
    monkeypatch.setattr(finetune, "validate", scripted)
    command = ["--train", "mind", "pens", *QUICK, "--eval-every", 2, "--lora-targets", "o_proj"]
    assert run(data, models["llama"], tmp_path, *command) == 0
    result = read_json(tmp_path / "run.json")
    assert (result["steps"], result["best"]["step"], len(seen)) == (10, 6, 6)
    assert result["best"]["valid"] == {"mind": 0.6, "pens": 0.85} and result["best"]["mean"] == pytest.approx(0.725)
    for (name, tensor), kept in zip(sorted(adapter(tmp_path).items()), seen[3], strict=True):
        assert torch.equal(tensor, kept), name
    assert result["unstable"] and result["beats_base"] and "unstable training" in capsys.readouterr().out


def test_an_adapter_that_never_beats_the_base_model_is_said_so_and_changes_no_score(data, models, tmp_path, capsys):
    """The curve starts with the base model, as evaluate.py scores it; with such a rate nothing ever changes."""
    assert run(data, models["llama"], tmp_path / "run", "--train", "pens", "--lr", 1e-15) == 0
    assert "no evaluation beat the one before the first step" in capsys.readouterr().out
    result = read_json(tmp_path / "run/run.json")
    assert (result["beats_base"], result["best"]["step"], result["steps"]) == (False, 0, 6)  # patience 2
    base, base_scores = evaluated(data, models["llama"], tmp_path / "zero")
    assert result["curve"][0] == {"step": 0, "valid": {"pens": base["auc"]}, "mean": base["auc"]}
    assert evaluated(data, models["llama"], tmp_path / "tuned", "--adapter", tmp_path / "run")[1] == base_scores


def test_the_best_value_is_that_of_the_adapter_and_other_validation_sets_are_said(data, models, tmp_path, capsys):
    command = ["--train", "mind", *LEARNING, "--valid", "pens", "--valid-metric", "ndcg@5"]
    assert run(data, models["llama"], tmp_path / "run", *command) == 0
    assert "validating on pens, which --train does not name" in capsys.readouterr().err
    result = read_json(tmp_path / "run/run.json")
    assert (result["valid"], result["train_chain"], list(result["best"]["valid"])) == (["pens"], ["mind"], ["pens"])
    assert result["beats_base"]
    tuned, _ = evaluated(data, models["llama"], tmp_path / "tuned", "--adapter", tmp_path / "run")
    assert result["best"]["mean"] == pytest.approx(tuned["ndcg@5"], abs=1e-9)


def test_unstable_training_is_seen_in_the_curve():
    for means, seen in (([0.5], False), ([0.6, 0.7, 0.69, 0.66, 0.7], False), ([0.6, 0.7, 0.64, 0.7], True)):
        assert finetune.unstable([{"mean": mean} for mean in means]) == seen


def test_the_settings_of_a_run_are_printed_also_for_a_dataset_with_a_domain_of_its_own(data, models, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    write_dataset(tmp_path / "data", "mine", {"train": [6] * 6, "valid": [6] * 3, "test": [4] * 3})
    command = ["--train", "mind", "mine", *QUICK, "--epochs", 1]
    assert run(tmp_path / "data", models["llama"], tmp_path / "run", *command) == 0
    printed = capsys.readouterr().out
    assert "setting H for mind, mine (" in printed and "setting G for pens, goodreads (" in printed
    assert read_json(tmp_path / "run/run.json")["domains"] == {"mind": "news", "mine": "toys"}


# --------------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("first, second", [("mind", "goodreads"), ("goodreads", "mind")])
def test_sequential_training_continues_the_adapter(data, models, tmp_path, capfd, first, second):
    assert run(data, models["llama"], tmp_path / "first", "--train", first, *LEARNING) == 0
    command = ["--train", second, "--init-adapter", tmp_path / "first", "--lr", 1e-12, "--epochs", 1]
    assert run(data, models["llama"], tmp_path / "out", *command) == 0
    said = capfd.readouterr()
    assert "rank 4, alpha 128" in said.err
    assert run(data, models["llama"], tmp_path / "out", *command, "--lora-r", 4) == 0  # the shape that it has
    assert "finished already" in capfd.readouterr().err
    assert "setting H for mind, goodreads (" in said.out and "setting G for pens (" in said.out
    result = read_json(tmp_path / "out/run.json")
    assert result["train"] == [second] and result["arguments"]["lora_r"] == 4
    assert result["train_chain"] == result["valid_chain"] == [first, second]
    assert result["domains"] == {"mind": "news", "goodreads": "book"}
    weights, wanted = adapter(tmp_path / "out"), adapter(tmp_path / "first")
    assert any(tensor.any() for name, tensor in wanted.items() if "lora_B" in name)
    for name, tensor in wanted.items():  # with such a rate it stays where it began
        assert (weights[name] - tensor).abs().max() < 1e-8


def test_an_adapter_belongs_to_its_base_model_and_type(data, models, tmp_path, whole, capfd):
    init = [*SHORT, "--init-adapter", whole[0]]
    assert "is an adapter for --model" in error_of(capfd, data, models["bert"], tmp_path / "out", *init)
    assert "--type prompt, not" in error_of(capfd, data, models["llama"], tmp_path / "out", *init, "--type", "embed")
    moved = shutil.copytree(models["llama"], tmp_path / "moved")
    assert run(data, moved, tmp_path / "out", *init) == 0  # the same files elsewhere
    other = shutil.copytree(whole[0], tmp_path / "other-init")
    (other / "adapter_config.json").write_text((other / "adapter_config.json").read_text() + " ")
    init_other = [tmp_path / "out", *SHORT, "--init-adapter", other]
    assert "made with a different init_adapter:" in error_of(capfd, data, moved, *init_other)
    network = transformers.AutoModelForCausalLM.from_pretrained(moved)
    torch.nn.init.normal_(network.model.norm.weight)
    network.save_pretrained(moved)
    assert "is an adapter for --model" in error_of(capfd, data, moved, tmp_path / "other", *init)
    assert "from which the run starts" in error_of(capfd, data, models["llama"], whole[0], *init, "--overwrite")
    assert "from which the run starts" in error_of(capfd, data, moved, moved, *SHORT)


def test_targets_can_be_chosen_and_a_plain_peft_model_loads_the_adapter(data, models, tmp_path):
    assert run(data, models["llama"], tmp_path, *SHORT, "--lora-targets", "o_proj", "k_proj") == 0
    assert adapted(tmp_path) == {"o_proj", "k_proj"}
    network = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    network = peft.PeftModel.from_pretrained(network, tmp_path)
    weights = {name.replace(".default", ""): value for name, value in network.named_parameters() if "lora" in name}
    assert weights.keys() == adapter(tmp_path).keys()
    for name, tensor in adapter(tmp_path).items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize("family", ["glm4-0414", "phi3"])
def test_where_peft_names_no_targets_all_linear_layers_are_adapted(data, models, tmp_path, family, capsys):
    assert run(data, models[family], tmp_path, *SHORT) == 0
    assert capsys.readouterr().err.count("adapting all-linear") == 1
    assert {"o_proj", "down_proj", "gate_up_proj"} <= adapted(tmp_path) and "lm_head" not in adapted(tmp_path)
    targets = read_json(tmp_path / "adapter_config.json")["target_modules"]  # a set: its order would differ by process
    assert targets == sorted(targets) and len(targets) >= 4


def build_small(folder, name, **changes):
    """Save a model of transformers' classes <name>Config and <name>ForCausalLM; returns the folder."""
    tokenizer = tiny.byte_level()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), pad_token_id=0, **{**sizes, **changes})
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name, changes, targets", [
    ("Mixtral", dict(num_local_experts=2), {"q_proj", "v_proj"}),
    ("Qwen3Moe", dict(num_experts=2, num_experts_per_tok=1, head_dim=8, moe_intermediate_size=16),
     {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ("DeepseekV3", dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                        first_k_dense_replace=0),
     {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"})])
def test_of_a_mixture_of_experts_attention_is_adapted(data, tmp_path, name, changes, targets):
    """Experts take no LoRA dropout."""
    model = build_small(tmp_path / "model", name, **changes)
    assert run(data, model, tmp_path / "run", *SHORT) == 0
    assert adapted(tmp_path / "run") == targets and len(losses(tmp_path / "run")) == 3


def test_mamba_is_one_line(data, tmp_path, capfd):
    model = build_small(tmp_path / "model", "Mamba", state_size=8)
    assert "choose other --lora-targets" in error_of(capfd, data, model, tmp_path / "run", *SHORT)


@pytest.mark.parametrize("family, head", [("llama", "lm_head"), ("bert", "decoder")])
def test_the_lm_head_is_refused_as_a_target(data, models, tmp_path, capfd, family, head):
    error = error_of(capfd, data, models[family], tmp_path / "out", *SHORT, "--lora-targets", head)
    assert "names the LM head, which has only the rows of the two answers here" in error


def test_adapters_are_float32_over_a_bfloat16_base(data, models, tmp_path):
    assert run(data, models["llama"], tmp_path, *SHORT, "--dtype", "bfloat16") == 0
    saved = adapter(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    args = finetune.arguments(["--model", models["llama"], "--train", "-", "--out", "-", "--device", "cpu", "--dtype",
                               "bfloat16"])
    network = common.load_adapter(common.load_scorer(args), tmp_path, trainable=True).model
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora" in name or "lm_head" in name else torch.bfloat16)
        assert parameter.requires_grad == ("lora" in name)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_a_rate_that_diverges_is_one_line(data, models, tmp_path, capfd, kind):
    command = [data, models["llama"], tmp_path, "--train", "mind", "--lr", 1e30, "--type", kind]
    assert "lower --lr (now 1e+30)" in error_of(capfd, *command)
    assert "NaN or infinite" in error_of(capfd, *command, "--eval-every", 1, "--overwrite")
    assert not list(tmp_path.glob("adapter*"))


@pytest.mark.parametrize("flags, what", [
    (["--lr", "nan"], "--lr is a positive number"), (["--lr", 0], "--lr is a positive number"),
    (["--lora-dropout", 1.5], "--lora-dropout at least 0"), (["--epochs", 0], "--epochs: '0' is not a whole number"),
    (["--dtype", "float16"], "bfloat16 or float32"), (["--valid-metric", "best"], "invalid choice: 'best'"),
    (["--target", "mind"], "unrecognized arguments"), (["--lora-targets", "no_such_module"], "no_such_module"),
    (["--lora-targets", "q_proj", "v_porj"], "no module of"), (["--lora-targets", "all-linear", "q_proj"], "no module of"),
    (["--train", "hm"], "run: python prepare_data.py hm"), (["--valid", "nothing"], "unknown dataset 'nothing'"),
    (["--init-adapter", "nothing"], "nothing holds no finished run")])
def test_bad_arguments_are_one_line(data, models, tmp_path, capfd, flags, what):
    assert what in error_of(capfd, data, models["llama"], tmp_path / "out", "--train", "mind", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes, what", [
    ({"train": [4]}, "mind has no valid split"), ({"train": [4], "valid": [1]}, "auc is undefined"),
    ({"train": [], "valid": [4]}, "train.jsonl is empty"), ({"train": [4], "valid": []}, "valid.jsonl is empty")])
def test_data_that_cannot_train_is_one_line(models, tmp_path, capfd, sizes, what):
    write_dataset(tmp_path / "data", "mind", sizes)
    assert what in error_of(capfd, tmp_path / "data", models["llama"], tmp_path / "out", "--train", "mind")


def test_models_that_cannot_train_are_one_line(data, models, tmp_path, capfd):
    encoder = models["bert-encoder"]
    assert "has no LM head" in error_of(capfd, data, encoder, tmp_path / "out", *SHORT)
    command = [*SHORT, "--type", "embed", "--lora-targets", "pooler.dense"]
    assert "nothing to train" in error_of(capfd, data, encoder, tmp_path / "out", *command)
    (tmp_path / "file").write_text("")
    assert "file" in error_of(capfd, data, models["llama"], tmp_path / "file" / "out", *SHORT)
