"""RecBench-MD in one module: how well do foundation models recommend? (arXiv 2508.21354)

15 datasets in 10 domains. A sample is (user history, candidate item, liked or not); a model is asked for a score of
every candidate, in one of two ways, and the scores of a user's candidates are compared with the labels:

    prompt   a text shows history and candidate and ends where the answer goes;  score = logit(yes) - logit(no)
    embed    one text for the user, one for the item;                            score = cosine of their embeddings

In reading order: the benchmark, its settings, prompts, prompt scoring, embedding scoring, baselines, metrics, intervals,
files and command lines. Sections and tables cited are the paper's.
"""
import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
from bisect import bisect_left
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------- the benchmark

Dataset = namedtuple("Dataset", "domain test finetune kind positives negatives")  # caps a user; kind: prepare_data.py

DATASETS = {
    "mind":        Dataset("news", True, True, "impressions", 10, 10),
    "pens":        Dataset("news", False, True, "impressions", 10, 10),
    "goodreads":   Dataset("book", True, True, "ratings", 2, 10),
    "books":       Dataset("book", False, True, "ratings", 2, 10),
    "movielens":   Dataset("movie", True, False, "ratings", 2, 10),
    "microlens":   Dataset("video", True, True, "sequences", 2, 2),
    "netflix":     Dataset("video", False, True, "ratings", 2, 10),
    "cds":         Dataset("music", True, True, "ratings", 2, 10),
    "lastfm":      Dataset("music", False, True, "sequences", 10, 100),
    "hm":          Dataset("fashion", True, True, "sequences", 2, 2),
    "pog":         Dataset("fashion", False, True, "sequences", 1, 10),
    "electronics": Dataset("electronics", True, False, "ratings", 2, 10),
    "steam":       Dataset("game", True, False, "sequences", 2, 2),
    "hotelrec":    Dataset("hotel", True, False, "ratings", 2, 25),
    "yelp":        Dataset("restaurant", True, False, "ratings", 2, 10),
}
DEMO = {  # built by `prepare_data.py demo`, needs no download
    "news-a":  Dataset("news", True, True, "demo", 4, 4),
    "news-b":  Dataset("news", True, True, "demo", 4, 4),
    "books-a": Dataset("book", True, True, "demo", 4, 4),
    "books-b": Dataset("book", True, True, "demo", 4, 4),
    "shop":    Dataset("shop", True, True, "demo", 4, 4),
}
SETTINGS = {
    "A": "zero-shot, single dataset",
    "B": "zero-shot, multi-domain",
    "C": "single-domain single-dataset",
    "D": "single-domain cross-dataset",
    "E": "single-domain multi-dataset",
    "F": "cross-domain cross-dataset",
    "G": "multi-domain multi-dataset, target held out",
    "H": "multi-domain multi-dataset, joint",
}


def setting_of(train, target, single=False):
    """The letter of the setting in which a model trained on the datasets `train` is tested on `target` (section 4).

    train: names, in any order, empty for zero-shot. single: the evaluation is given one dataset only (A instead of B).
    B, C, E, F and H are stated in the paper; A, D and G follow from the pattern.
    """
    train, home = set(train), dataset(target).domain
    domains = {dataset(name).domain for name in train}
    if not train:
        return "A" if single else "B"
    if target in train:
        return "C" if train == {target} else "E" if domains == {home} else "H"
    if domains == {home}:
        return "D"
    return "F" if len(train) == 1 else "G"


def training_sets(setting, target):
    """The datasets that a setting trains on for a target: the largest choice that the letter allows.

    Raises UserError where the setting does not exist for the target, and for F, which is any one set of another domain.
    """
    universe = DEMO if target in DEMO else DATASETS
    trainable = [name for name, row in universe.items() if row.finetune]
    same = [name for name in trainable if universe[name].domain == dataset(target).domain]
    if setting not in SETTINGS:
        raise UserError(f"unknown setting {setting!r}; there are {', '.join(SETTINGS)}")
    if setting == "F":
        raise UserError(f"setting F trains on one dataset of another domain: name it with --train (not {', '.join(same) or target})")
    sets = {"A": [], "B": [], "C": [target], "D": [n for n in same if n != target], "E": same,
            "G": [n for n in trainable if n != target], "H": trainable}[setting]
    if not set(sets) <= set(trainable) or setting_of(sets, target, setting == "A") != setting:
        raise UserError(f"setting {setting} ({SETTINGS[setting]}) does not exist for {target}: its domain "
                        f"({dataset(target).domain}) has {len(same)} fine-tuning dataset(s): {', '.join(same) or 'none'}")
    return sets


def dataset(name):
    """The benchmark's row of a dataset. Raises UserError with the valid names."""
    if name not in DATASETS and name not in DEMO:
        raise UserError(f"unknown dataset {name!r}; there are {', '.join([*DATASETS, *DEMO])}")
    return DATASETS.get(name) or DEMO[name]


def check_names(names):
    """The names in their order, each a known dataset and none twice. Raises UserError."""
    for name in names:
        dataset(name)
    return list(dict.fromkeys(names))

# SCORING GOES HERE

# -------------------------------------------------------------------------------------------- files and command lines

FORMAT = 1  # version of the standard format: data/<dataset>/{items,train,valid,test}.jsonl and meta.json


class UserError(Exception):
    """Anything the user can mend: one line on standard error, exit code 2."""


def digest(*parts):
    """A 64-bit integer from the parts: blake2b, so the same on every machine, unlike hash()."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def write_atomically(path, text):
    """Write text under a temporary name beside path and rename it: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    """JSON, indented, atomically; NaN is refused with ValueError (it is no JSON)."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """The JSON value of a file. Raises UserError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_meta(data, name):
    """meta.json of a prepared dataset. Raises UserError with the command that prepares it."""
    dataset(name)
    path = Path(data, name, "meta.json")
    if not path.exists():
        command = f"prepare_data.py demo --out {data}" if name in DEMO else f"prepare_data.py {name} --raw RAW --out {data}"
        raise UserError(f"dataset {name} is not prepared ({path} is missing); run: python {command}")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} has format {meta.get('format')}, this version reads {FORMAT}; prepare it again")
    return meta


def read_items(data, name):
    """{item id: text} of a prepared dataset."""
    return {row["id"]: row["text"] for row in read_lines(Path(data, name, "items.jsonl"))}


def read_users(data, name, split, limit=None):
    """Yield the users of a split in order: {"user", "history" (oldest first), "candidates", "labels"}."""
    path = Path(data, name, f"{split}.jsonl")
    if not path.exists():
        raise UserError(f"dataset {name} has no {split} split ({path} is missing); prepare it with --test-size / --train-size")
    for number, row in enumerate(read_lines(path)):
        if number == limit:
            return
        yield row


def read_lines(path):
    """Yield the JSON values of a .jsonl file. Raises UserError with the line number where one is broken."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise UserError(f"{path}, line {number}: not JSON; prepare the dataset again") from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing; prepare the dataset again") from None


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (UserError), and whose help shows the script's docstring and the defaults."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=type("Formatter", (
            argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}), allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{self.prog}: {message} (see --help)")


def run(main, argv=None):
    """Call a script's main and return its exit code: 0, 2 with one line on standard error, 130 after Ctrl-C."""
    try:
        return main(argv) or 0
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, a file-size limit, a folder that cannot be written
        message = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
