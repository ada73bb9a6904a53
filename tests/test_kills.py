"""kill -9 at random moments: the same command, given again, ends with the files of a run that was never killed.

With the 25 kills of tests/test_finetune.py these are 100 over the four scripts (python -m pytest tests --slow).
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_evaluate import write_dataset

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def start(command):
    """The process of a command line, in a group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(command):
    """Run a command to its end; the seconds that it took."""
    started = time.monotonic()
    process = start(command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return time.monotonic() - started


def check(out, command, names, seed, kills=25):
    """The files of these names in the folder out are the same after a run of command and after runs that were killed.

    Returns the names of all files there but for what a kill leaves half written.
    """
    command = [*command, "--out", out]
    seconds = finish(command)
    wanted = [(out / name).read_bytes() for name in names]
    shutil.rmtree(out)
    rng = random.Random(seed)
    n_killed = 0
    for _ in range(kills):
        process = start(command)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.05) * seconds)
            shutil.rmtree(out)  # it was done before
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            n_killed += 1
        process.communicate()
        if rng.random() < 0.2:  # from the beginning, too
            shutil.rmtree(out, ignore_errors=True)
    finish(command)
    assert n_killed and wanted == [(out / name).read_bytes() for name in names]
    return sorted(name for name in os.listdir(out) if not name.startswith(".") and not name.endswith(".tmp"))


def test_prepare_data(tmp_path):
    command = ["prepare_data.py", "movielens", "--raw", ROOT / "tests/raw"]
    names = [f"movielens/{name}" for name in ("items.jsonl", "test.jsonl", "meta.json")]
    assert check(tmp_path / "out", command, names, 1) == ["movielens"]
    assert len(os.listdir(tmp_path / "out/movielens")) == 3


def test_evaluate(tmp_path):
    write_dataset(tmp_path / "data", "mind", 600)
    model = tiny.build("llama", tmp_path / "model")
    command = ["evaluate.py", "--data", tmp_path / "data", "--model", model, "--test", "mind", "--device", "cpu"]
    assert check(tmp_path / "out", command, ["mind.scores.jsonl"], 2) == ["mind.json", "mind.scores.jsonl"]


def test_transfer_matrix(tmp_path):
    for name in ("mind", "pens"):
        write_dataset(tmp_path / "data", name, 40)
        folder = tmp_path / "data" / name
        lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:30]))
        (folder / "valid.jsonl").write_text("".join(lines[30:]))
    model = tiny.build("llama", tmp_path / "model")
    command = ["transfer_matrix.py", "--data", tmp_path / "data", "--model", model, "--sources", "mind", "pens",
               "--targets", "mind", "pens", "--device", "cpu", "--finetune-args=--epochs 2 --lr 1e-3"]
    check(tmp_path / "out", command, ["matrix.csv", "matrix.md", "matrix.svg"], 3)
