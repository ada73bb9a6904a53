"""Every command of README.md: those for the demo and MovieLens run (one epoch), the others are parsed."""
import re
import shlex
import shutil
from pathlib import Path

import pytest

import common
import evaluate
import finetune
import prepare_data
import transfer_matrix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"prepare_data.py": prepare_data, "finetune.py": finetune, "evaluate.py": evaluate,
           "transfer_matrix.py": transfer_matrix}
REAL = ROOT.parent / "shared" / "raw" / "movielens"


def commands():
    """Argument lists [script, ...] of every script's command line in the README, in order, variables of loops filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`(python \w+\.py [^`]*)`", README)
    blocks.sort(key=README.index)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$model", "qwen-2-0.5b").replace("$name", "mind").splitlines()
    words = [shlex.split(line.replace("NAME...", "mind").replace("<dataset>", "mind")) for line in lines if re.match(r"\s*(python|torchrun) ", line)]
    starts = [next(i for i, word in enumerate(line) if word in SCRIPTS or word == "pytest") for line in words]
    return [line[start:] for line, start in zip(words, starts) if line[start] in SCRIPTS and "--list" not in line]


def runs_here(command):
    """Whether a command is about the demo or MovieLens, so that nothing has to be downloaded for it."""
    here = "data/demo-model" in command or command[1] in ("demo", "random", "popularity", "overlap")
    return here or command[:2] == ["prepare_data.py", "movielens"]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses(command):
    SCRIPTS[command[0]].arguments(command[1:])


def test_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if REAL.exists():
        shutil.copytree(REAL, "raw/movielens")
    ran = 0
    for script, *argv in filter(runs_here, commands()):
        if "movielens" in argv and not REAL.exists() or "--from-recbench" in argv:
            continue
        if script == "finetune.py":
            argv += ["--epochs", "1"]
        if script == "transfer_matrix.py":
            argv = [re.sub(r"^--finetune-args=.*", "--finetune-args=--epochs 1", arg) for arg in argv]
            argv[argv.index("--sources") + 1:argv.index("--targets")] = ["news-a", "news-a+shop"]  # the rest is more of it
        assert common.run(SCRIPTS[script].main, argv) == 0, argv
        ran += 1
    assert ran >= 12
    assert {path.suffix for path in Path("demo").glob("matrix.*")} == {".json", ".csv", ".md", ".svg"}


def test_rra_by_hand():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if "= 0." in line]
    targets = ["mind", "goodreads", "cds"]
    assert [row[0] for row in rows] == targets
    table = {row[0]: dict(zip(targets, map(float, row[1:4]))) for row in rows}
    for column, k in ((4, 1), (5, 3)):
        values = common.reciprocal_rank_average(table, k)
        assert {row[0]: float(row[column].split("=")[1]) for row in rows} == pytest.approx(values, abs=5e-4)
