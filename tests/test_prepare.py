"""prepare_data.py: every raw format by a hand-made miniature (tests/raw), the shared rules, sampling, bad input."""
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import common
import prepare_data

HERE = Path(__file__).parent
RAW = HERE / "raw"
SCRIPT = str(HERE.parent / "prepare_data.py")
REAL = HERE.parent.parent / "shared" / "raw"


def run(*args):
    """(exit code, standard output, last line of standard error) of a command line; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = common.run_script(prepare_data.main, [str(arg) for arg in args])
    return code, out.getvalue(), ([""] + err.getvalue().splitlines())[-1]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def prepared(name, out, *args, raw=RAW):
    """(meta, items, {split: lines}) of a dataset that must be prepared without an error."""
    code, _, err = run(name, "--raw", raw, "--out", out, *args)
    assert code == 0, err
    folder = out / name
    return (json.loads((folder / "meta.json").read_text(encoding="utf-8")),
            {row["id"]: row["text"] for row in lines(folder / "items.jsonl")},
            {split: lines(folder / f"{split}.jsonl") for split in ("train", "valid", "test")})


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def hashed(*parts):
    """The hash of the format, written out again: 8 bytes of blake2b over the parts joined by the unit separator."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def ties(name, user, *items):
    """Items of one time, in the order in which they count."""
    return sorted(items, key=lambda item: hashed(2025, name, user, item))


# ------------------------------------------------------------------------------------------------------ miniatures

H = ["Hotel_Review-g1-d1-Reviews-Hotel_Baltic-Giulianova_Province_of_Teramo_Abruzzo.html",
     "Hotel_Review-g2-d2-Reviews-The_St._Regis-New_York_City_New_York.html",
     "Hotel_Review-g3-d3-Reviews-Bed-and-Breakfast_Uno-Rome_Lazio.html",
     "Hotel_Review-g4-d4-Reviews-Four_Seasons-Paris.html"]
E, M2, C2 = ties("electronics", "R1", "E1", "E2", "E3", "E4", "E5"), ties("microlens", "2", "1", "2", "3", "4"), \
    ties("hm", "c2", "0108775015", "0108775044", "0110065002")
SONGS = [f"t{k:02}" for k in range(1, 15)]

LINES = {  # dataset: user: (history, positives, negatives), worked out by hand
    "mind": {"U1": ("N2 N1", "N3 N6", "N4"), "U4": ("N3 N1", "N7", "N6"), "U5": ("N1", "N3 N4", "N6")},
    "pens": {"U1": ("N2", "N3 N4", "N5"), "U3": ("N4 N5", "N1 N2", "N3")},
    "goodreads": {"u1": ("b2", "b1 b3", "b5")},
    "books": {"R1": ("A1", "A4 A2", "A7")},
    "movielens": {"7": ("1", "12 11", "13 16"), "8": ("1", "11 15", "12 13")},
    "microlens": {"1": ("3 2", "1 4", "5 7"), "2": (M2[:2], M2[2:], "5 7")},
    "netflix": {"10": ("4", "2 1", "3"), "11": ("6 4", "1 3", "2")},
    "cds": {"R1": ("C2", "C3 C1", "C4")},
    "lastfm": {"user_1": (SONGS[:2], SONGS[2:12], SONGS[12:]), "user_2": ("t14 t13", SONGS[2:12], SONGS[:2])},
    "hm": {"c1": ("0108775044", "0110065002 0108775015", "0111565001 0111586001"),
           "c2": (C2[:1], C2[1:], "0111565001 0111586001")},
    "pog": {"a1": ("i2 i1", "i3", "i4 i6"), "a3": ("i2 i6", "i4", "i1 i3")},
    "electronics": {"R1": (E[:3], E[3:], "E6 E7")},
    "steam": {"s1": ("10 20", "50 30", "40 70"), "s3": ("70 40", "30 20", "10 50")},
    "hotelrec": {"ann": (H[1:2], [H[2], H[0]], H[3:])},
    "yelp": {"y1": ("p3", "p2 p1", "p4")},
}
TEXTS = {
    "mind": {"N1": "First", "N2": '"Second, he said', "N3": "Third thing", "N4": "Fourth", "N6": "Sixth",
             "N7": "Seventh"},
    "pens": {"N1": "One", "N2": "Two", "N3": "Three", "N4": "Four", "N5": "Five"},
    "goodreads": {"b1": "The Hobbit", "b2": "Émile", "b3": "Dune", "b5": "Emma"},
    "books": {"A1": "Pride & Prejudice", "A2": "War and Peace", "A4": "I <3 you, 2 < 3", "A7": "Seven"},
    "movielens": {"1": "Toy Story (1995)", "11": "American President, The (1995)", "12": 'He said "Hi" twice',
                  "13": "Émile (2000)", "15": "Casino (1995)", "16": "Heat (1995)"},
    "microlens": {"1": "Cats", "2": "Dogs, and cats", "3": "Birds", "4": "Fish", "5": "Line break", "7": "Mice"},
    "netflix": {"1": "title: Dinosaur Planet, year: 2003", "2": "title: Mostly Martha, Again, year: 2004",
                "3": "title: Amélie", "4": "title: Heat, year: 1999", "6": "title: Six, year: 2002"},
    "cds": {"C1": "Abbey Road", "C2": "Kind of Blue", "C3": "Homogenic", "C4": "Blue"},
    "lastfm": {song: f"track_name: Song {int(song[1:])}, artist_name: Björk" for song in SONGS},
    "hm": {"0108775015": "Jersey top, with narrow straps.", "0108775044": "Cotton dress", "0110065002": "Wool socks",
           "0111565001": "Semi shiny tights", "0111586001": "Knitted hat"},
    "pog": {"i1": "Dress, red", "i2": "Hat", "i3": "Shoes", "i4": "Bag", "i6": "Watch"},
    "electronics": {f"E{k}": f"Cable {k}" for k in range(1, 8)},
    "steam": {"10": "Counter-Strike", "20": "Pokémon™, the game", "30": "三国", "40": "Déjà vu", "50": "Portal",
              "70": "Braid"},
    "hotelrec": {H[0]: "hotel_name: Hotel Baltic, hotel_location: Giulianova Province of Teramo Abruzzo",
                 H[1]: "hotel_name: The St. Regis, hotel_location: New York City New York",
                 H[2]: "hotel_name: Bed-and-Breakfast Uno, hotel_location: Rome Lazio",
                 H[3]: "hotel_name: Four Seasons, hotel_location: Paris"},
    "yelp": {"p1": 'Pizza "Roma"', "p2": "Café Olé", "p3": "42", "p4": "Taco Town"},
}
TEXT, ITEM, PAST = "items without text", "events whose item has no text", "users without history"
NEG, THREE, AGAIN = "users without negatives", "neutral ratings", "repeated events"
DROPPED = {  # what else must stand in meta.json; all that is not named here is 0
    "mind": {TEXT: 1, ITEM: 2, "items of histories without text": 1,
             AGAIN: 3, "candidates that stand in the history": 1, PAST: 1,
             NEG: 1},
    "pens": {AGAIN: 1, "candidates that stand in the history": 1, NEG: 1},
    "goodreads": {TEXT: 1, ITEM: 1, PAST: 1,
                  NEG: 1},
    "books": {TEXT: 2, ITEM: 2, THREE: 1, PAST: 1},
    "movielens": {TEXT: 1, ITEM: 2, THREE: 1, AGAIN: 2,
                  PAST: 1},
    "microlens": {TEXT: 1, ITEM: 1, AGAIN: 1, PAST: 1},
    "netflix": {TEXT: 1, ITEM: 1, THREE: 2, PAST: 1},
    "cds": {AGAIN: 4, THREE: 1, NEG: 1},
    "lastfm": {"items without id": 1, ITEM: 1, AGAIN: 1, PAST: 1},
    "hm": {TEXT: 1, ITEM: 1, AGAIN: 1, PAST: 1},
    "pog": {TEXT: 1, ITEM: 3, AGAIN: 1, PAST: 1},
    "electronics": {NEG: 1},
    "steam": {TEXT: 1, ITEM: 3, AGAIN: 1, PAST: 1},
    "hotelrec": {"events without user": 1, THREE: 2, PAST: 1},
    "yelp": {TEXT: 1, ITEM: 1, PAST: 1},
}


@pytest.mark.parametrize("name", common.DATASETS)
def test_miniature(name, tmp_path):
    meta, items, splits = prepared(name, tmp_path, "--test-size", 999, "--train-size", 0)
    expected = {user: [ids.split() if isinstance(ids, str) else ids for ids in line]
                for user, line in LINES[name].items()}
    got = {line["user"]: (line["history"], dict(zip(line["candidates"], line["labels"]))) for line in splits["test"]}
    assert got == {user: (history, {**dict.fromkeys(liked, 1), **dict.fromkeys(disliked, 0)})
                   for user, (history, liked, disliked) in expected.items()}
    assert [line["user"] for line in splits["test"]] == sorted(expected, key=lambda user: hashed(2025, name, user))
    assert items == TEXTS[name] and list(items) == sorted(items)
    assert {reason: count for reason, count in meta["dropped"].items() if count} == DROPPED[name]
    assert all(count["malformed"] == 0 for part in meta["rows"].values() for count in part.values())
    assert not splits["train"] and not (tmp_path / name / "train.jsonl").exists()
    row = meta["splits"]["test"]
    assert (row["users"], row["items"]) == (len(expected), len(TEXTS[name])) and meta["items"] == len(items)
    assert row["samples"] == sum(len(p) + len(n) for _, p, n in expected.values()) == meta["short"]["test_size"]
    assert row["positives"] == sum(len(p) for _, p, _ in expected.values())


@pytest.mark.parametrize("name", common.DATASETS)
def test_splits_of_the_miniatures(name, tmp_path):
    """One user for test, then a tenth, at least one of two, for valid; pytest -s prints the table."""
    meta, _, splits = prepared(name, tmp_path, "--test-size", 1, "--train-size", 99)
    test, *tuned = sorted(LINES[name], key=lambda user: hashed(2025, name, user))
    valid = tuned[:1] if len(tuned) > 1 else []
    assert {split: [line["user"] for line in users] for split, users in splits.items()} == {
        "test": [test], "valid": valid, "train": tuned[len(valid):]}
    assert not any(set(line["history"]) & set(line["candidates"]) for users in splits.values() for line in users)
    for split, row in meta["splits"].items():
        print(f"| {name} | {split} | " + " | ".join(map(str, row.values())) + " |")


def test_pog_with_its_own_titles(tmp_path):
    write(tmp_path / "raw/pog/item_data.txt", "".join(f"i{k},c1,//img/{k}.jpg,红色, 标题 {k}\n" for k in "12346"))
    shutil.copy(RAW / "pog/user_data.txt", tmp_path / "raw/pog/user_data.txt")
    _, items, splits = prepared("pog", tmp_path, raw=tmp_path / "raw")
    assert items["i2"] == "红色, 标题 2"
    assert {line["user"] for line in splits["train"] + splits["valid"]} == {"a1", "a3"}


@pytest.mark.skipif(not (REAL / "movielens").exists(), reason="the real MovieLens file is not at hand")
def test_movielens_as_it_is(tmp_path):
    row = prepared("movielens", tmp_path, raw=REAL)[0]["splits"]["test"]
    assert (row["users"], row["samples"], row["positives"]) == (614, 5540, 1228)
    meta, _, splits = prepared("movielens", tmp_path / "2", "--test-size", 2000, "--train-size", 3000, raw=REAL)
    assert meta["short"] == {} and 2000 <= meta["splits"]["test"]["samples"] < 2012
    assert 3000 <= meta["splits"]["train"]["samples"] + meta["splits"]["valid"]["samples"] < 3012
    assert len(splits["valid"]) == (len(splits["train"]) + len(splits["valid"])) // 10
    users = [line["user"] for split in splits.values() for line in split]
    assert len(users) == len(set(users))
    assert not any(set(line["history"]) & set(line["candidates"]) for split in splits.values() for line in split)


# ---------------------------------------------------------------------------------------------------- generated files


def movielens(folder, rows, items=50):
    """A raw MovieLens folder of rows (user, item, stars, time)."""
    write(folder / "movielens/movies.csv", "movieId,title,genres\n" + "".join(
        f"{k},Film {k},Drama\n" for k in range(items)))
    write(folder / "movielens/ratings.csv", "userId,movieId,rating,timestamp\n" + "".join(
        "%s,%s,%s,%s\n" % row for row in rows))
    return folder


def some_rows(users=300, each=20, items=50, seed=0):
    rng = random.Random(seed)
    return [(f"u{user}", rng.randrange(items), rng.choice([1, 2, 3, 4, 5]), rng.randrange(30))
            for user in range(users) for _ in range(each)]


SIZES = ("--test-size", 500, "--train-size", 600)


def test_the_same_whatever_the_order_of_the_rows_the_bound_or_the_process(tmp_path):
    rows = some_rows()
    first, _, splits = prepared("movielens", tmp_path / "a", *SIZES, raw=movielens(tmp_path, rows))
    users = [line["user"] for split in ("test", "valid", "train") for line in splits[split]]
    assert users == sorted(set(users), key=lambda user: hashed(2025, "movielens", user))  # so they are disjoint, too
    assert len(splits["valid"]) == (len(splits["valid"]) + len(splits["train"])) // 10 > 1 and first["short"] == {}
    command = [sys.executable, SCRIPT, "movielens", "--raw", str(tmp_path), *map(str, SIZES)]
    subprocess.run([*command, "--out", str(tmp_path / "b")], env={**os.environ, "PYTHONHASHSEED": "7"}, check=True,
                   capture_output=True, timeout=100)
    assert json.loads((tmp_path / "b/movielens/meta.json").read_text()) == first
    random.Random(1).shuffle(rows)
    shuffled = prepared("movielens", tmp_path / "c", *SIZES, raw=movielens(tmp_path, rows))[0]
    assert shuffled["sha256"] == first["sha256"] and shuffled["dropped"] == first["dropped"]
    bound = prepared("movielens", tmp_path / "d", *SIZES, "--max-rows", 6500, raw=tmp_path)[0]
    assert bound["sha256"] == first["sha256"] and bound["share_of_users"] == 0.5
    assert prepared("movielens", tmp_path / "e", *SIZES, "--seed", 1, raw=tmp_path)[0]["sha256"] != first["sha256"]


def test_too_small_a_bound_is_said(tmp_path):
    movielens(tmp_path, some_rows())
    meta = prepared("movielens", tmp_path / "out", "--max-rows", 1000, raw=tmp_path)[0]
    assert meta["share_of_users"] < 0.2 and meta["short"]["test_size"] == meta["splits"]["test"]["samples"]
    assert "raise --max-rows" in run("movielens", "--raw", tmp_path, "--out", tmp_path / "x", "--max-rows", 1000)[2]


def test_users_are_sampled_uniformly_with_complete_histories(tmp_path):
    """Events by date, so each user is spread over the file; the bound keeps one user in sixteen or fewer."""
    users, each = 20_000, 5
    write(tmp_path / "hm/articles.csv", "article_id,detail_desc\n" + "".join(f"{k},Item {k}\n" for k in range(100)))
    write(tmp_path / "hm/transactions_train.csv", "t_dat,customer_id,article_id\n" + "".join(
        f"2020-01-0{day + 1},c{user},{(user + 7 * day) % 100}\n" for day in range(each) for user in range(users)))
    meta, _, splits = prepared("hm", tmp_path / "out", "--test-size", 10 ** 6, "--train-size", 0, "--max-rows", 12_000,
                               raw=tmp_path)
    kept = [int(line["user"][1:]) for line in splits["test"]]
    assert meta["share_of_users"] == 1 / 16 and 1100 < len(kept) < 1400
    observed = np.bincount(np.array(kept) * 10 // users, minlength=10)  # by place in the file
    assert np.sum((observed - len(kept) / 10) ** 2 / (len(kept) / 10)) < 27.9  # chi-square, 9 degrees: p = 0.001
    for line in splits["test"]:
        own = [str((int(line["user"][1:]) + 7 * day) % 100) for day in range(each)]
        assert line["history"] == own[:3]
        assert {item for item, label in zip(line["candidates"], line["labels"]) if label} == set(own[3:])


def test_caps_histories_and_candidate_order(tmp_path):
    rows = [(f"u{user}", item, 5 if item < 25 else 1, item) for user in range(200) for item in range(50)]
    _, _, splits = prepared("movielens", tmp_path / "out", raw=movielens(tmp_path, rows))
    places = []
    for line in splits["test"]:
        assert line["history"] == [str(item) for item in range(3, 23)]  # the latest 20 of 23
        assert sum(line["labels"]) == 2 and len(line["labels"]) == 12
        disliked = ties("movielens", line["user"], *map(str, range(25, 50)))[:10]
        assert {item for item, label in zip(line["candidates"], line["labels"]) if not label} == set(disliked)
        places += [place for place, label in enumerate(line["labels"]) if label]
    assert abs(np.mean(places) - 5.5) < 4 * np.std(range(12)) / len(places) ** 0.5  # the order tells nothing


def test_next_item_ranking(tmp_path):
    rows = some_rows(users=400, each=30, items=1000)
    touched = {(user, str(item)) for user, item, _, _ in rows}
    _, _, splits = prepared("movielens", tmp_path / "out", "--positives", 1, "--negatives", 99,
                            raw=movielens(tmp_path, rows, 1000))
    drawn = []
    for line in splits["test"]:
        assert len(set(line["candidates"])) == 100 and sum(line["labels"]) == 1
        negatives = [item for item, label in zip(line["candidates"], line["labels"]) if not label]
        assert not any((line["user"], item) in touched for item in negatives)
        drawn += map(int, negatives)
    observed = np.bincount(np.array(drawn) // 100, minlength=10)
    assert np.sum((observed - len(drawn) / 10) ** 2 / (len(drawn) / 10)) < 27.9


@pytest.mark.parametrize("name", common.DATASETS)
def test_next_item_ranking_of_any_dataset(name, tmp_path):
    _, _, splits = prepared(name, tmp_path, "--positives", 1, "--negatives", 99, "--test-size", 999, "--train-size", 0)
    assert splits["test"]
    for line in splits["test"]:
        assert sum(line["labels"]) == 1 < len(line["labels"])
        assert not set(line["history"]) & set(line["candidates"])


def test_draw_is_distinct_and_never_touched():
    items = [f"i{k}" for k in range(100)]
    for touched, count, found in ((items[:10], 20, 20), (items[:95], 20, 5), (items, 3, 0), (items[:60], 40, 40)):
        drawn = prepare_data.draw_negatives(set(touched), items, count, ("draw",))
        assert len(drawn) == len(set(drawn)) == found and set(drawn) <= set(items) - set(touched)


# ------------------------------------------------------------------------------------------------------------- files


def test_prepared_twice_is_left_alone_and_replaced_only_when_asked(tmp_path):
    movielens(tmp_path, some_rows())
    first, out = prepared("movielens", tmp_path / "out", *SIZES, raw=tmp_path)[0], tmp_path / "out/movielens"
    before = (out / "meta.json").stat().st_mtime_ns
    code, text, _ = run("movielens", "--raw", tmp_path, "--out", tmp_path / "out", *SIZES)
    assert code == 0 and "already prepared" in text and (out / "meta.json").stat().st_mtime_ns == before
    code, _, err = run("movielens", "--raw", tmp_path, "--out", tmp_path / "out", "--test-size", 100)
    assert code == 2 and "--overwrite" in err and json.loads((out / "meta.json").read_text()) == first
    assert prepared("movielens", tmp_path / "out", "--test-size", 100, "--overwrite", raw=tmp_path)[0] != first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["movielens"]


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "test.jsonl").unlink(),
    lambda folder: (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text().replace("Taco", "Tofu")),
    lambda folder: (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"format": 1', '"format": 0')),
    lambda folder: (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"job"', '"other"'))])
def test_a_dataset_that_was_edited_or_lost_a_file_is_not_taken_for_prepared(tmp_path, spoil):
    before = prepared("yelp", tmp_path)
    spoil(tmp_path / "yelp")
    code, _, err = run("yelp", "--raw", RAW, "--out", tmp_path)
    assert code == 2 and "gone or edited" in err
    assert prepared("yelp", tmp_path, "--overwrite") == before


@pytest.mark.parametrize("step", ["json.dumps", "os.rename", "common.write_json"])
def test_stopped_half_way_nothing_is_lost(tmp_path, monkeypatch, step):
    movielens(tmp_path, some_rows())
    first = prepared("movielens", tmp_path / "out", *SIZES, raw=tmp_path)[0]
    module, function = step.split(".")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(getattr(prepare_data, module), function, stop)
        assert run("movielens", "--raw", tmp_path, "--out", tmp_path / "out", "--overwrite")[0] == 130
    assert json.loads((tmp_path / "out/movielens/meta.json").read_text()) == first
    second = prepared("movielens", tmp_path / "out", "--overwrite", raw=tmp_path)[0]
    assert second["job"]["test_size"] == 20_000 and [p.name for p in (tmp_path / "out").iterdir()] == ["movielens"]


def test_sha256_is_of_the_files(tmp_path):
    meta = prepared("yelp", tmp_path)[0]
    assert meta["sha256"] == common.data_sha256(tmp_path, "yelp")
    test = tmp_path / "yelp/test.jsonl"
    whole = test.read_bytes()
    cut = whole.index(b"\n") + 1
    (tmp_path / "yelp/valid.jsonl").write_bytes(whole[:cut])  # the same bytes in the same order, but other users
    test.write_bytes(whole[cut:])
    moved = common.data_sha256(tmp_path, "yelp")
    (tmp_path / "yelp/valid.jsonl").unlink()
    test.write_bytes(whole)
    assert moved != common.data_sha256(tmp_path, "yelp") == meta["sha256"]


@pytest.mark.parametrize("time, text, seconds", [
    (prepare_data.us_time, "11/15/2019 12:00:00 AM", 1573776000),
    (prepare_data.us_time, "11/15/2019 1:02:03 PM ", 1573822923),
    (prepare_data.us_time, "11/15/2019 12:59:59 PM", 1573822799),
    (prepare_data.iso_time, "2009-05-04", 1241395200),
    (prepare_data.iso_time, "2009-05-04T23:08:57Z", 1241478537),
    (prepare_data.iso_time, "2009-05-04 23:08:57", 1241478537),
    (prepare_data.goodreads_time, "Fri Aug 25 13:55:02 -0700 2017", 1503694502),
])
def test_times(time, text, seconds):
    assert time(text) == seconds


def test_list_names_every_home_page():
    code, out, _ = run("--list")
    assert code == 0 and all(name in out and source.home in out for name, source in prepare_data.SOURCES.items())
    assert set(prepare_data.SOURCES) == set(prepare_data.RECBENCH) == set(common.DATASETS)


# --------------------------------------------------------------------------------------------------------- bad input


def broken(tmp_path, name, file=None, change=None):
    """A copy of a miniature in which the bytes of one file were changed (None: removed)."""
    shutil.copytree(RAW / name, tmp_path / name, dirs_exist_ok=True)
    if file:
        path = tmp_path / name / file
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("name, file, change, says", [
    ("movielens", "ratings.csv", lambda data: None, "grouplens.org"),
    ("mind", "train/news.tsv", lambda data: None, "msnews.github.io"),
    ("netflix", "combined_data_4.txt", lambda data: None, "combined_data_4.txt"),
    ("movielens", "ratings.csv", lambda data: b"", "empty"),
    ("movielens", "ratings.csv", lambda data: data.split(b"\n")[0], "holds no rows"),
    ("movielens", "ratings.csv", lambda data: data.replace(b",", b";"), "no column"),
    ("movielens", "ratings.csv", lambda data: random.Random(0).randbytes(5000), "no column"),
    ("movielens", "ratings.csv", lambda data: data.replace(b"rating", b"stars"), "'rating'"),
    ("movielens", "ratings.csv", lambda data: data.replace(b",5.0,", b",five,"), "malformed"),
    ("movielens", "ratings.csv", lambda data: data.replace(b",5.0,", b",50,"), "malformed"),
    ("mind", "train/behaviors.tsv", lambda data: data.replace(b"\t", b","), "malformed"),
    ("mind", "train/behaviors.tsv", lambda data: data.replace(b"11/1", b"13/4"), "malformed"),
    ("mind", "train/behaviors.tsv", lambda data: data.replace(b"-1", b""), "malformed"),
    ("steam", "train_game.txt", lambda data: data.replace(b",", b";"), "malformed"),
    ("yelp", "yelp_academic_dataset_review.json", lambda data: data.replace(b"2018-", b"on "), "malformed"),
    ("yelp", "yelp_academic_dataset_review.json", lambda data: data.replace(b"{", b"["), "malformed"),
    ("yelp", "yelp_academic_dataset_review.json", lambda data: b"[" * 100_000 + b"\n", "malformed"),
    ("yelp", "yelp_academic_dataset_review.json", lambda data: data.replace(b"user_id", b"user"), "without user"),
    ("lastfm", "userid-timestamp-artid-artname-traid-traname.tsv", lambda data: b"\0" * 5000, "NUL bytes"),
    ("cds", "CDs_and_Vinyl.json.gz", lambda data: data[:len(data) // 2], "cut short"),
    ("cds", "CDs_and_Vinyl.json.gz", lambda data: gzip.decompress(data), "cut short"),
    ("cds", "CDs_and_Vinyl.json.gz", lambda data: data[:60] + b"\xff\xff\xff\xff" + data[64:], "damaged"),
])
def test_bad_file_is_one_line(tmp_path, name, file, change, says):
    code, _, err = run(name, "--raw", broken(tmp_path, name, file, change), "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and says in err
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("args, says", [
    (["movie"], "unknown dataset 'movie'"), ([], "name the datasets"), (["movielens", "--seed", "x"], "--seed"),
    (["movielens", "--max-history", "0"], "--max-history"), (["news-a"], "unknown"),
    (["mind", "--raw", "/nowhere"], "msnews"), (["mind", "--from-recbench", "/nowhere"], "kaggle"),
    (["yelp", "--test-size", "0", "--train-size", "0"], "nothing to write"), (["demo", "--positives", "1"], "fixed"),
])
def test_bad_command_is_one_line(tmp_path, args, says):
    code, _, err = run("--raw", RAW, "--out", tmp_path, *args)
    assert code == 2 and err.startswith("error: ") and says in err


def test_all_files_are_looked_for_before_any_work(tmp_path):
    assert run("yelp", "mind", "--raw", broken(tmp_path, "yelp"), "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad, code", [(3, 0), (4, 2)])
def test_up_to_one_percent_of_malformed_rows_is_counted(tmp_path, bad, code):
    rows = some_rows(users=300, each=1) + [("u0", item, 5, item) for item in range(10)] + [("u0", 20, 1, 0)]
    movielens(tmp_path, rows)
    path = tmp_path / "movielens/ratings.csv"
    table = path.read_text().splitlines()
    for line in range(bad):  # lines 10, 11, ... of the file
        table[9 + line] = "1,2,3"
    path.write_text("\n".join(table[:8] + ["", "  "] + table[8:]))  # two blank lines, which are not rows
    got, _, err = run("movielens", "--raw", tmp_path, "--out", tmp_path / "out")
    assert got == code
    if code:
        assert "4 of 311 rows are malformed; the first, on line 12: '1,2,3' (3 fields, not 4)" in err
    else:
        count = json.loads((tmp_path / "out/movielens/meta.json").read_text())["rows"]["events"]["ratings.csv"]
        assert count == {"rows": 311, "malformed": 3, "first_malformed": "line 12: '1,2,3' (3 fields, not 4)"}


def test_of_several_texts_of_one_item_the_first_in_the_alphabet_counts(tmp_path):
    movielens(tmp_path, [("u", k, 5 if k else 1, k) for k in range(5)] + [("u", 9, 5, 9)], items=5)
    path = tmp_path / "movielens/movies.csv"
    films = path.read_text()
    for order in ("BAC", "ABC"):
        path.write_text(films + "".join(f"9,{title},x\n" for title in order))
        assert prepared("movielens", tmp_path / order, raw=tmp_path)[1]["9"] == "A"


def test_half_surrogates_survive(tmp_path):
    reviews = [{"user_id": "\ud800y", "business_id": f"p\udc00{k}", "stars": stars, "date": f"2018-01-0{k + 1}"}
               for k, stars in enumerate([5.0, 5.0, 5.0, 1.0])]
    write(tmp_path / "yelp/yelp_academic_dataset_business.json", "".join(
        json.dumps({"business_id": f"p\udc00{k}", "name": f"Name \ud801 {k}"}) + "\n" for k in range(4)))
    write(tmp_path / "yelp/yelp_academic_dataset_review.json", "".join(json.dumps(row) + "\n" for row in reviews))
    _, items, splits = prepared("yelp", tmp_path / "out", raw=tmp_path)
    assert splits["test"][0]["user"] == "\ud800y" and items["p\udc000"] == "Name ? 0"


# ----------------------------------------------------------------------------------- what users' files have been seen to be


def changed(tmp_path, name, file, old, new, *args):
    """(exit code, last line of standard error) of preparing a miniature in which some bytes of a file are others."""
    def replace(data):
        assert old in data
        return data.replace(old, new)
    code, _, err = run(name, "--raw", broken(tmp_path / "raw", name, file, replace), "--out", tmp_path / "out", *args)
    return code, err


def texts_of(tmp_path, name):
    return {row["id"]: row["text"] for row in lines(tmp_path / "out" / name / "items.jsonl")}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_raw_files_are_never_replaced(tmp_path, overwrite):
    """--raw . --out .: the folder to write is the folder to read."""
    broken(tmp_path, "mind")
    before = sorted(path for path in tmp_path.rglob("*"))
    code, _, err = run("mind", "--raw", tmp_path, "--out", tmp_path, *overwrite)
    assert code == 2 and "which prepare_data.py did not write" in err and "--overwrite" not in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_symbolic_link_is_followed_twice_in_a_row(tmp_path):
    (tmp_path / "disk/yelp").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/yelp").symlink_to(tmp_path / "disk/yelp")
    for overwrite in ([], ["--overwrite"], ["--overwrite"]):
        prepared("yelp", tmp_path / "out", *overwrite)
        assert (tmp_path / "out/yelp").is_symlink() and (tmp_path / "disk/yelp/meta.json").exists()


def test_where_nothing_can_be_written_is_said_before_reading(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare_data, "read_dataset", lambda *args: pytest.fail("it was read"))
    code, _, err = run("yelp", "--raw", RAW, "--out", tmp_path / "file/out")
    assert code == 2 and err.startswith("error: ")


def test_an_edit_that_keeps_size_and_name_is_seen(tmp_path):
    assert changed(tmp_path, "yelp", "yelp_academic_dataset_review.json", b'"', b'"')[0] == 0
    path = tmp_path / "raw/yelp/yelp_academic_dataset_review.json"
    path.write_bytes(path.read_bytes().replace(b"5.0", b"1.0", 1))
    code, _, err = run("yelp", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and "made with a different raw" in err
    shutil.copyfile(RAW / "yelp" / path.name, path)  # another time of modification, the same content
    code, out, _ = run("yelp", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 0 and "already prepared" in out


PENS_HEADER = b"UserID\tClicknewsID\tdwelltime\texposure_time\tpos\tneg\tstart\tend\tdwelltime_pos"
PENS_ITEMS = b"News ID\tCategory\tTopic\tHeadline\tNews body\tTitle entity\tEntity content"
FILMS, STARS, NEWS, READS = "movies.csv", "ratings.csv", "train/news.tsv", "train/behaviors.tsv"
SONGS_FILE = "userid-timestamp-artid-artname-traid-traname.tsv"


@pytest.mark.parametrize("name, file, old, new, says", [
    # a quote that is not closed
    ("movielens", FILMS, b"\n1,Toy Story", b'\n1,"Toy Story', "line 2: "),
    ("movielens", FILMS, b"15,Casino", b'15,"Casino', "line 7: unexpected end of data"),
    ("movielens", FILMS, b"14,,Drama", b'14,"Ugly,Drama\n15,Casino,Crime\n17,Up","x"', "line 6: a quote opened there"),
    ("movielens", FILMS, b"14,,Drama", b'14,"Ugly,Drama\n300,300 5",x', "line 6: a quote opened there"),
    ("movielens", FILMS, b'American President, The (1995)"', b"American President, The (1995)", "line 3"),
    # encodings
    ("movielens", FILMS, "Émile".encode(), "Émile".encode("cp1252"), "line 5: '13,\\udcc9mile (2000),Drama' ("),
    ("hotelrec", "HotelRec.txt", b"ann", b"Jos\xe9", "can't decode byte 0xe9"),
    ("steam", "App_ID_Info.txt", b"Braid", "Braid".encode("utf-16-le"), "NUL bytes"),
    ("pog", "user_data.txt", b"a1", "\ufeffa1".encode("utf-16"), "UTF-16"),
    # too many fields
    ("lastfm", SONGS_FILE, b"Bj\xc3\xb6rk", b"Bj\xc3\xb6rk\tDC", "malformed"),
    ("movielens", FILMS, b'"American President, The (1995)"', b"American President, The (1995)", "4 fields, not 3"),
    ("movielens", STARS, b"7,1,3.5,1000", b"7,1,3.5,1000,x", "5 fields, not 4"),
    ("mind", NEWS, b"N1\t", b"N1\tx\tx\tx\tx\tx\tx\tx\tx\t", "too many values"),
    # headers
    ("movielens", STARS, b"8,1,5.0,10", b"userId,movieId,rating,timestamp", "a second header row"),
    ("movielens", STARS, b"8,1,5.0,10", b"\xef\xbb\xbfuserId,movieId,rating,timestamp", "a second header row"),
    ("microlens", "MicroLens-50k_titles.csv", b"\n5,", b"\nitem,title\n5,", "a second header row"),
    ("pens", "news.tsv", b"N2\t", b"News ID\tCategory\tTopic\tHeadline\nN2\t", "line 3: 'News ID"),
    ("pens", "news.tsv", b"N2\t", PENS_ITEMS + b"\nN2\t", "a second header row"),
    ("pog", "pog_translated_titles.csv", b"\ni2", b"\nitem_id,title,title_en\ni2", "a second header row"),
    ("pens", "train.tsv", PENS_HEADER + b"\r\nU1\tN1 N2\t1", b"U1\tN1 N2\t1\t1", "line 1: 'U1"),
    ("pog", "user_data.txt", b"a1,", b'"a1",', "a quote, and this file is no CSV"),
    # ids of events and items that do not meet
    ("movielens", FILMS, b"\n1", b"\nm1", "an item of the events is '11', of the items ['m1']"),
])
def test_malformed_file_is_one_line_that_shows_it(tmp_path, name, file, old, new, says):
    code, err = changed(tmp_path, name, file, old, new)
    assert code == 2 and says in err, err
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name, file, old, new, item, text", [
    ("netflix", "movie_titles.csv", "Amélie".encode("latin-1"), "Amélie".encode(), "3", "title: Amélie"),
    ("netflix", "movie_titles.csv", b"1,2003,", b"\xef\xbb\xbf1,2003,", "1", "title: Dinosaur Planet, year: 2003"),
    ("mind", NEWS, b"N1\t", b"id\tcategory\tsubcategory\ttitle\tabstract\nN1\t", "N1", "First"),
    ("mind", NEWS, b"N4\t", b"\xef\xbb\xbfN4\t", "N4", "Fourth"),
    ("pens", "news.tsv", b"Two", b'"""Two"" of two"', "N2", '"Two" of two'),
    ("pens", "news.tsv", b"Two", b'"Two" and "three"', "N2", '"Two" and "three"'),
    ("microlens", "MicroLens-50k_titles.csv", b"Line\n", b"Line,\none, two ", "5", "Line, one, two break"),
    ("movielens", FILMS, b"1,Toy Story (1995),Comedy", b'"1","Toy Story (1995)","Comedy"', "1", "Toy Story (1995)"),
])
def test_odd_file_is_read_as_it_was_meant(tmp_path, name, file, old, new, item, text):
    code, err = changed(tmp_path, name, file, old, new)
    assert code == 0, err
    assert texts_of(tmp_path, name)[item] == text


@pytest.mark.parametrize("name, file", [("pens", "news.tsv"), ("pog", "pog_translated_titles.csv")])
def test_a_missing_header_loses_no_row(tmp_path, name, file):
    expected = prepared(name, tmp_path / "with")[1:]
    rows = (RAW / name / file).read_bytes().split(b"\n", 1)
    code, err = changed(tmp_path, name, file, rows[0] + b"\n", b"")
    assert code == 0, err
    assert texts_of(tmp_path, name) == expected[0]


def test_a_quoted_ratings_file_is_read(tmp_path):
    """Whatever Python's csv reads is read."""
    rows = (RAW / "movielens/ratings.csv").read_text(encoding="utf-8-sig").splitlines()
    quoted = "\n".join('"' + row.replace(",", '","') + '"' for row in rows if row)
    path = broken(tmp_path, "movielens") / "movielens/ratings.csv"
    path.write_text(quoted)
    assert prepared("movielens", tmp_path / "a", raw=tmp_path)[1:] == prepared("movielens", tmp_path / "b")[1:]


def test_of_two_columns_of_one_name_the_first_is_read(tmp_path):
    head, *rows = (RAW / "movielens/ratings.csv").read_text(encoding="utf-8-sig").splitlines()
    path = broken(tmp_path, "movielens") / "movielens/ratings.csv"
    path.write_text("\n".join([f"{head},rating", *(f"{row},0" for row in rows if row)]))
    assert prepared("movielens", tmp_path / "a", raw=tmp_path)[1:] == prepared("movielens", tmp_path / "b")[1:]


@pytest.mark.parametrize("title, text", [
    ("x<y and other inequalities", "x<y and other inequalities"), ("if a<b then c", "if a<b then c"),
    ("Size <L", "Size <L"), ("USB <Type-C & A> Cable", "USB <Type-C & A> Cable"),
    ("The HTML &lt;table&gt; Tag Explained", "The HTML <table> Tag Explained"), ("AT&amp;amp;T phone", "AT&T phone"),
    ('<span class="a-size">Blue</span> <b>Train</b>', "Blue Train"), ("A<script>var x = 1 < 2;</script>B", "A B"),
    ("I &lt;3 you", "I <3 you"), ("", ""),
])
def test_amazon_titles(title, text):
    assert prepare_data.amazon_item(("A1", title)) == ("A1", text)


def test_amazon_metadata_without_a_title_is_no_malformed_row(tmp_path):
    folder = broken(tmp_path, "electronics") / "electronics"
    with open(folder / "meta_Electronics.json", "a") as file:
        for k, more in enumerate(["", ', "title": null', ', "title": NaN', ', "title": ["a"]']):
            file.write('{"asin": "X%d"%s}\n' % (k, more))
    before = prepared("electronics", tmp_path / "before")[0]
    meta = prepared("electronics", tmp_path / "out", raw=tmp_path)[0]
    assert meta["dropped"][TEXT] == before["dropped"].get(TEXT, 0) + 4
    assert meta["rows"]["items"]["meta_Electronics.json"]["malformed"] == 0


@pytest.mark.parametrize("title, text", [
    ("Gumboy - Crazy Adventures\x99", "Gumboy - Crazy Adventures™"), ("Assassin\x92s Creed", "Assassin’s Creed"),
    ("PokÃ©mon", "Pokémon"), ("三国", "三国"), ("Déjà vu", "Déjà vu"), ("\xa0Two \x85", "Two …"),
])
def test_steam_titles(title, text):
    assert prepare_data.steam_item(["10", title, "game"]) == ("10", text)


def test_of_mind_s_two_folders_the_one_for_training_is_read(tmp_path):
    for folder in ("MINDsmall_dev", "MINDsmall_train"):
        shutil.copytree(RAW / "mind/train", tmp_path / "raw/mind" / folder)
    write(tmp_path / "raw/mind/MINDsmall_dev/news.tsv", "not read")
    assert prepared("mind", tmp_path / "out", raw=tmp_path / "raw")[1:] == prepared("mind", tmp_path / "plain")[1:]


def test_files_one_folder_deeper_are_found_and_packed_ones_named(tmp_path):
    broken(tmp_path / "deep", "movielens")
    os.rename(tmp_path / "deep/movielens", tmp_path / "moved")
    os.makedirs(tmp_path / "deep/movielens")
    os.rename(tmp_path / "moved", tmp_path / "deep/movielens/ml-latest-small")
    deep = prepared("movielens", tmp_path / "out", raw=tmp_path / "deep")
    assert deep[1:] == prepared("movielens", tmp_path / "plain")[1:]
    write(tmp_path / "packed/movielens/ml-latest-small.zip", "PK")
    code, _, err = run("movielens", "--raw", tmp_path / "packed", "--out", tmp_path / "x")
    assert code == 2 and "there are ml-latest-small.zip" in err
    shutil.copy(RAW / "movielens/movies.csv", tmp_path / "deep/movielens/movies.csv")
    assert prepared("movielens", tmp_path / "mixed", raw=tmp_path / "deep") == deep  # files of one folder, not of two
    shutil.copytree(tmp_path / "deep/movielens/ml-latest-small", tmp_path / "deep/movielens/ml-25m")
    code, _, err = run("movielens", "--raw", tmp_path / "deep", "--out", tmp_path / "x")
    assert code == 2 and "leave one of them" in err
    write(tmp_path / "other/movielens/u.data", "1\t2\t3\t4\n")
    code, _, err = run("movielens", "--raw", tmp_path / "other", "--out", tmp_path / "x")
    assert code == 2 and "there are u.data" in err


# --------------------------------------------------------------------------------------------------------------- fuzz


def mutated(data, rng):
    """Bytes of a raw file, damaged: bytes flipped, lines cut or mixed up, columns swapped, encodings broken."""
    rows = data.splitlines(keepends=True) or [b""]
    row = rng.randrange(len(rows))
    for separator in (b"\t", b",", b": ", b" "):
        if separator in rows[row]:
            break
    parts = rows[row].split(separator)
    kind = rng.randrange(9)
    if kind == 0:
        data = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 1:
        return data[:rng.randrange(len(data))]
    if kind == 2:
        rng.shuffle(parts)
        rows[row] = separator.join(parts)
    elif kind == 3:
        swapped = [line.split(separator) for line in rows]
        return b"".join(separator.join([line[-1].rstrip(b"\r\n"), *line[1:-1], line[0]]) + b"\n" for line in swapped)
    elif kind == 4:
        rows[row] = rows[row][:rng.randrange(len(rows[row]))] + b"\n"
    elif kind == 5:
        rng.shuffle(rows)
    elif kind == 6:
        return data.decode("latin-1").encode(rng.choice(["utf-16", "utf-8", "utf-32-be"]))
    elif kind == 7:
        rows[row] = rng.choice([b'"', b"\0", b"\xff\xfe", b"[", b"9" * 400, b"\\ud800", b"NaN", b"null"]).join(parts)
    else:
        rows = [line for line in rows if rng.random() < 0.7] or rows
    return b"".join(rows)


def fuzz(name, tmp_path, turns):
    files = sorted(path.relative_to(RAW / name) for path in (RAW / name).rglob("*") if path.is_file())
    outcomes = set()
    for turn in range(turns):
        rng = random.Random(f"{name} {turn}")
        raw, file = tmp_path / str(turn), rng.choice(files)
        shutil.copytree(RAW / name, raw / name)
        data = (raw / name / file).read_bytes()
        packed = file.suffix == ".gz" and rng.random() < 0.8
        data = gzip.decompress(data) if packed else data
        if rng.random() < 0.7:  # so many rows that a malformed one is under 1%
            head, *rest = data.splitlines(keepends=True)
            data = head + b"".join(rest) * 40
        data = mutated(data, rng)
        (raw / name / file).write_bytes(gzip.compress(data) if packed else data)
        code, out, err = run(name, "--raw", raw, "--out", raw / "out", "--test-size", 5, "--train-size", 99)
        outcomes.add(code)
        assert code in (0, 2), (turn, err)
        if code == 2:
            assert err.startswith("error: ") and not (raw / "out" / name).exists()
        else:
            assert sum(row["samples"] for row in json.loads(
                (raw / "out" / name / "meta.json").read_text(encoding="utf-8"))["splits"].values()) > 0
        shutil.rmtree(raw)
    assert outcomes == {0, 2}  # the damage is neither all harmless nor all deadly


@pytest.mark.parametrize("name", common.DATASETS)
def test_fuzz(name, tmp_path):
    fuzz(name, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", common.DATASETS)
def test_fuzz_more(name, tmp_path):
    fuzz(name, tmp_path, 200)


# ------------------------------------------------------------------------------------------------ the authors' samples


def parquet(path, columns):
    from pyarrow import parquet as files, table
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table(columns), path)


def recbench(folder, name):
    """Files in the authors' layout: numbers for ids, a null text, duplicates, one-class users, users out of order."""
    user, item, history, label, *attributes = prepare_data.RECBENCH[name].split()
    parquet(folder / "items.parquet", {item: [1, 2, 3, 4, 2], attributes[0]: ["One", "old", None, "Four", " Two  x "],
                                       **{key: ["a", "b", "c", None, "e"] for key in attributes[1:]}})
    parquet(folder / "users.parquet", {
        user: [7, 8, 9, 6, 7], history: [[4], [1, 1], [], list(range(1, 5)) * 6, [1, 2, 3]]})
    parquet(folder / "test.parquet", {user: [8, 7, 8, 8], item: [1, 3, 1, 2], label: [1, 0, 1, 0]})
    parquet(folder / "finetune.parquet", {user: [9, 6], item: [4, 4], label: [1, 1]})
    return attributes


@pytest.mark.parametrize("name", common.DATASETS)
def test_from_recbench(name, tmp_path):
    pytest.importorskip("pyarrow")
    attributes = recbench(tmp_path / "in" / name, name)
    (tmp_path / "in" / name / "valid_user_set_0.1.txt").write_text("\ufeff6 \n")
    code, _, err = run(name, "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, err
    folder = tmp_path / "out" / name
    assert lines(folder / "test.jsonl") == [
        {"user": "8", "history": ["1", "1"], "candidates": ["1", "1", "2"], "labels": [1, 1, 0]},
        {"user": "7", "history": ["1", "2", "3"], "candidates": ["3"], "labels": [0]}]
    assert lines(folder / "train.jsonl") == [{"user": "9", "history": [], "candidates": ["4"], "labels": [1]}]
    assert lines(folder / "valid.jsonl") == [
        {"user": "6", "history": [str(k) for k in list(range(1, 5)) * 5], "candidates": ["4"], "labels": [1]}]
    texts = {row["id"]: row["text"] for row in lines(folder / "items.jsonl")}
    if len(attributes) == 1:
        assert texts == {"1": "One", "2": " Two  x ", "3": "", "4": "Four"}
    else:
        first, second = attributes
        assert texts == {"1": f"{first}: One, {second}: a", "2": f"{first}:  Two  x , {second}: e", "3": "",
                         "4": f"{first}: Four"}


def test_from_recbench_without_a_list_of_valid_users(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    recbench(tmp_path / "in/yelp", "yelp")
    assert run("yelp", "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    assert [line["user"] for line in lines(tmp_path / "out/yelp/valid.jsonl")] == \
        [min(("9", "6"), key=lambda user: hashed(2025, "yelp", user))]
    shutil.copyfile(tmp_path / "in/yelp/test.parquet", tmp_path / "in/yelp/finetune.parquet")
    code, _, err = run("yelp", "--from-recbench", tmp_path / "in", "--out", tmp_path / "both")
    assert code == 0 and "WARNING: 2 of the 2 test users are in finetune.parquet, too" in err
    recbench(tmp_path / "in/mind", "yelp")
    code, _, err = run("mind", "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 2 and "needs the columns" in err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("yelp", "--from-recbench", tmp_path / "in", "--out", tmp_path / "new")
    assert code == 2 and "pip install pyarrow" in err


@pytest.mark.parametrize("file, columns, says", [
    ("test", {"click": [2, 1]}, "the label of user 8 is 2"),
    ("finetune", {"click": [None, 1]}, "the label of user 8 is None"),
    ("users", {"history": ["1 2", "3"]}, "the history of user 8 is no list"),
    ("users", {"history": [1, 2]}, "the history of user 8 is no list"),
    ("test", {"user_id": [], "business_id": [], "click": []}, "hold no samples"),
    ("users", {"user_id": [6, 7, 8, 9], "history": [[1], [99], [1], [1]]}, "lacks 1 of"),
    ("test", {"business_id": [1, 98]}, "lacks 1 of"), ("users", {}, "users.parquet lacks user 7"),
    ("valid_user_set_0.1.txt", b"nobody\n", "names no user"),
    (None, None, "no sizes")])
def test_from_recbench_refuses_what_it_would_misread(tmp_path, file, columns, says):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "in/yelp"
    recbench(folder, "yelp")
    if file == "test":
        (folder / "finetune.parquet").unlink()
    if isinstance(columns, dict):
        usual = {"user_id": [8, 9], "business_id": [1, 2], "history": [[1], [2]], "click": [1, 0]}
        keep = ("user_id", "history") if file == "users" else ("user_id", "business_id", "click")
        parquet(folder / f"{file}.parquet", {key: {**usual, **columns}[key] for key in keep})
    elif file:
        (folder / file).write_bytes(columns)
    more = [] if file else ["--test-size", "0"]
    code, _, err = run("yelp", "--from-recbench", tmp_path / "in", "--out", tmp_path / "out", *more)
    assert code == 2 and says in err and not (tmp_path / "out/yelp").exists()


def test_what_is_in_the_way_of_a_later_dataset_is_said_before_the_first(tmp_path):
    write(tmp_path / "out/hm/mine.txt", "hello")
    code, _, err = run("yelp", "hm", "--raw", RAW, "--out", tmp_path / "out")
    assert code == 2 and "holds mine.txt" in err and not (tmp_path / "out/yelp").exists()
    prepared("cds", tmp_path / "out")
    code, _, err = run("yelp", "cds", "--raw", RAW, "--out", tmp_path / "out", "--train-size", 5)
    assert code == 2 and "different train_size" in err and not (tmp_path / "out/yelp").exists()


def test_english_titles_apart_from_the_events_are_not_replaced_by_chinese_ones(tmp_path):
    shutil.copytree(RAW / "pog", tmp_path / "raw/pog/release")
    (tmp_path / "raw/pog/release/pog_translated_titles.csv").rename(tmp_path / "raw/pog/pog_translated_titles.csv")
    write(tmp_path / "raw/pog/release/item_data.txt", "a1,1,x,Kleid\n")
    code, _, err = run("pog", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and "has to hold pog_translated_titles.csv or item_data.txt, user_data.txt" in err


def test_a_demo_model_of_another_seed_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "train_demo_model", lambda folder, seed: (folder / "seed").write_text(str(seed)))
    assert run("demo", "--out", tmp_path)[0] == run("demo", "--out", tmp_path)[0] == 0
    for name in common.DEMO:
        shutil.rmtree(tmp_path / name)
    code, _, err = run("demo", "--out", tmp_path, "--seed", "7")
    assert code == 2 and "demo-model was made with a different seed" in err
    assert run("demo", "--out", tmp_path, "--seed", "7", "--overwrite")[0] == 0
    assert (tmp_path / "demo-model/seed").read_text() == "7"
    (tmp_path / "demo-model/seed").unlink()
    code, _, err = run("demo", "--out", tmp_path, "--seed", "7")
    assert code == 2 and "gone or edited" in err


# -------------------------------------------------------------------------------------------------------------- speed


def test_five_thousand_impressions(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "mind/news.tsv", "".join(f"N{k}\tnews\tx\tTitle {k}\t\t\t[]\t[]\n" for k in range(5000)))
    write(tmp_path / "mind/behaviors.tsv", "".join("{}\tU{}\t11/{}/2019 9:05:58 AM\t{}\t{}\n".format(
        k, rng.randrange(3000), rng.randint(10, 20), " ".join(f"N{rng.randrange(5000)}" for _ in range(25)),
        " ".join(f"N{rng.randrange(5000)}-{int(rng.random() < 0.1)}" for _ in range(20))) for k in range(5000)))
    start = time.process_time()
    prepared("mind", tmp_path / "out", raw=tmp_path)
    assert time.process_time() - start < 3


def big_ratings(folder, rows, users=150_000, items=60_000):
    """Ratings in the order of MovieLens: by user, then by item."""
    rng = np.random.default_rng(0)
    movielens(folder, [], items)
    with open(folder / "movielens/ratings.csv", "a") as file:
        for user in range(users):
            films = np.sort(rng.integers(0, items, rows * (user + 1) // users - rows * user // users))
            stars, times = rng.integers(1, 6, len(films)), rng.integers(8 * 10 ** 8, 16 * 10 ** 8, len(films))
            file.writelines(f"{user},{film},{star}.0,{time}\n"
                            for film, star, time in zip(films.tolist(), stars.tolist(), times.tolist()))
    return "movielens", "movielens/ratings.csv"


def big_sequences(folder, rows, users=400_000, items=100_000):
    """Purchases sorted by date."""
    rng = np.random.default_rng(0)
    write(folder / "hm/articles.csv", "article_id,detail_desc\n" + "".join(f"{k:010},Item {k}\n" for k in range(items)))
    with open(folder / "hm/transactions_train.csv", "w") as file:
        file.write("t_dat,customer_id,article_id,price,sales_channel_id\n")
        names = [hashlib.sha256(str(user).encode()).hexdigest() for user in range(users)]
        for k in range(rows // 100_000):
            day = np.datetime64("2018-09-20") + 700 * k * 100_000 // rows
            columns = (rng.integers(0, high, 100_000).tolist() for high in (users, items))
            file.writelines(f"{day},{names[user]},{item:010},0.0508135,{item % 2}\n" for user, item in zip(*columns))
    return "hm", "hm/transactions_train.csv"


def seconds_of(*command):
    """Processor seconds of a command: the same whatever else the machine does, nearly."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, timeout=550)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("generate", [big_ratings, big_sequences])
def test_ten_million_rows(generate, tmp_path):
    """Speed as a share of a bare csv.reader pass over the same file, and peak memory (pytest -s shows them)."""
    rows = 10_000_000
    name, file = generate(tmp_path, rows)
    bare = "import csv, sys\nfor row in csv.reader(open(sys.argv[1], newline='', encoding='utf-8')): pass"
    bare = seconds_of("-c", bare, tmp_path / file)
    full = seconds_of(SCRIPT, name, "--raw", tmp_path, "--out", tmp_path / "o")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
    print(f"\n{name}: {rows / full:,.0f} rows a second ({full:.1f} s), {bare / full:.0%} of the speed of csv.reader "
          f"alone ({bare:.1f} s), peak {peak:.2f} GB")
    assert peak < 1.5 and bare / full > 0.05
