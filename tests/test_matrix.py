"""The transfer matrix: command lines, statistics, tables, picture; from canned results and from a tiny model."""
import json
import random
from pathlib import Path

import numpy as np
import pytest

import common
import evaluate
import finetune
import tiny
import transfer_matrix

NAMES = list(common.DEMO)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dataset(data, name, users=24):
    """A small prepared dataset in the standard format, of the words of tests/tiny.py."""
    rng, folder = random.Random(name), Path(data, name)
    folder.mkdir(parents=True)
    words = rng.sample(tiny.WORDS[-16:], 8)
    items = {f"i{n}": " ".join(rng.sample(words, 2)) for n in range(30)}
    write_lines(folder / "items.jsonl", [{"id": key, "text": text} for key, text in items.items()])
    splits = {}
    for split, size in {"train": users, "valid": 8, "test": users}.items():
        drawn = [rng.sample(list(items), 11) for _ in range(size)]
        write_lines(folder / f"{split}.jsonl", [{"user": f"{split}{n}", "history": ids[:3], "candidates": ids[3:], "labels": [1, 0] * 4}
                                                for n, ids in enumerate(drawn)])
        splits[split] = {"users": size, "samples": 8 * size, "positives": 4 * size}
    meta = {"format": common.FORMAT, "sha256": f"sha of {name}", "domain": common.dataset(name).domain, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
