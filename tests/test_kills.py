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
NAMES = ("mind", "pens")


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


def killed_and_finished(command, out, seconds, kills, seed):
    """Kill runs of a command at random moments, then let it end."""
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(command)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.05) * seconds)
            shutil.rmtree(out)  # it was done before
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
        if rng.random() < 0.2:  # from the beginning, too
            shutil.rmtree(out, ignore_errors=True)
    finish(command)
    return killed


def contents(folder, names):
    """The bytes of files in a folder."""
    return {name: Path(folder, name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25])
def test_prepare_data(tmp_path, kills):
    command = ["prepare_data.py", "movielens", "--raw", ROOT / "tests/raw", "--out"]
    seconds = finish([*command, tmp_path / "whole"])
    killed = killed_and_finished([*command, tmp_path / "killed"], tmp_path / "killed", seconds, kills, 1)
    names = sorted(path.name for path in Path(tmp_path, "whole/movielens").iterdir())
    assert killed and contents(tmp_path / "whole/movielens", names) == contents(tmp_path / "killed/movielens", names)
    assert [path.name for path in Path(tmp_path, "killed").iterdir()] == ["movielens"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25])
def test_evaluate(tmp_path, kills):
    write_dataset(tmp_path / "data", "mind", 600)
    model = tiny.build("llama", tmp_path / "model")
    command = ["evaluate.py", "--data", tmp_path / "data", "--model", model, "--test", "mind", "--device", "cpu", "--out"]
    seconds = finish([*command, tmp_path / "whole"])
    killed = killed_and_finished([*command, tmp_path / "killed"], tmp_path / "killed", seconds, kills, 2)
    names = ["mind.scores.jsonl"]
    assert killed and contents(tmp_path / "whole", names) == contents(tmp_path / "killed", names)
    assert sorted(os.listdir(tmp_path / "killed")) == ["mind.json", "mind.scores.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25])
def test_transfer_matrix(tmp_path, kills):
    for name in NAMES:
        users = write_dataset(tmp_path / "data", name, 40)
        folder = tmp_path / "data" / name
        lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:30]))
        (folder / "valid.jsonl").write_text("".join(lines[30:]))
        assert len(users) == 40
    model = tiny.build("llama", tmp_path / "model")
    command = ["transfer_matrix.py", "--data", tmp_path / "data", "--model", model, "--sources", *NAMES, "--targets",
               *NAMES, "--device", "cpu", "--finetune-args=--epochs 2 --lr 1e-3", "--out"]
    seconds = finish([*command, tmp_path / "whole"])
    killed = killed_and_finished([*command, tmp_path / "killed"], tmp_path / "killed", seconds, kills, 3)
    names = ["matrix.csv", "matrix.md", "matrix.svg"]
    assert killed and contents(tmp_path / "whole", names) == contents(tmp_path / "killed", names)
