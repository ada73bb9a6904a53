"""The README: its commands (those for the demo and MovieLens run, the others are parsed), its own-dataset example, its RRA@K."""
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
RAW = ROOT.parent / "shared" / "raw"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # not to be had without the hub


def commands():
    """[script, argument, ...] of every script's command line in the README, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`((?:python|torchrun) [^`]*)`", README)
    blocks.sort(key=README.index)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word in SCRIPTS:
                found.append(words[i:])
    return found


def test_size():
    assert len(README.encode()) <= 16 * 1024


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses(command):
    if "--list" not in command:  # prints and exits
        SCRIPTS[command[0]].arguments(command[1:])


def test_commands_run(tmp_path, monkeypatch):
    """Those for the demo, with less training, and those for MovieLens and Steam that need no model, if they are at hand."""
    monkeypatch.chdir(tmp_path)
    if RAW.exists():
        shutil.copytree(RAW, "raw")
    ran = 0
    for script, *argv in commands():
        real = RAW.exists() and "steam" in argv and "hm" not in argv and HUB_MODEL not in argv
        demo = "demo" in argv or "data/demo-model" in argv
        if not (real or demo):
            continue
        if script == "finetune.py":
            argv += ["--epochs", "1"]
        if script == "evaluate.py":
            argv += ["--limit-users", "40"]
        if script == "transfer_matrix.py":  # the other sources are more of the same
            argv = [re.sub(r"^--finetune-args=.*", "--finetune-args=--epochs 1", word) for word in argv]
            argv += ["--evaluate-args=--limit-users 40"]
            argv[argv.index("--sources") + 1:argv.index("--targets")] = ["news-a", "news-a+shop"]
        assert common.run_script(SCRIPTS[script].main, argv) == 0, argv
        ran += 1
    assert ran >= (7 if RAW.exists() else 5)
    assert {path.suffix for path in Path("demo").glob("matrix.*")} == {".json", ".csv", ".md", ".svg"}


def test_own_dataset_as_the_readme_says(tmp_path, monkeypatch, capsys):
    """The lines of the README are the files; random stands for any model."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```\n(items\.jsonl .*?)```", README, re.S).group(1)
    lines = {}
    for line in block.splitlines():
        name, content = line.split(None, 1)
        if content.startswith("{"):
            lines[name] = content
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    items = [lines["items.jsonl"].replace("b1", f"b{i}") for i in (1, 2, 3, 4)]
    (folder / "items.jsonl").write_text("\n".join(items))
    (folder / "test.jsonl").write_text(lines["test.jsonl"] + "\n")
    (folder / "meta.json").write_text(lines["meta.json"])
    assert common.run_script(evaluate.main, ["--model", "random", "--test", "mine", "--out", "out"]) == 0
    assert "| mine " in capsys.readouterr().out


def test_rra_by_hand():
    rows = []
    for line in README.splitlines():
        if "= 0." in line and line.startswith("|"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    targets = ["mind", "goodreads", "cds"]
    assert [row[0] for row in rows] == targets
    table = {row[0]: dict(zip(targets, map(float, row[1:4]))) for row in rows}
    for column, k in ((4, 1), (5, 3)):
        values = common.reciprocal_rank_average(table, k)
        assert {row[0]: float(row[column].split("=")[1]) for row in rows} == pytest.approx(values, abs=5e-4)
