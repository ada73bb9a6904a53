"""prepare_data.py: every raw format by a hand-made miniature (tests/raw), the shared rules, sampling, bad input."""
import contextlib
import datetime
import decimal
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
import prepare_data

HERE = Path(__file__).parent
RAW = HERE / "raw"
SCRIPT = str(HERE.parent / "prepare_data.py")
REAL = HERE.parent.parent / "shared" / "raw"
SPLITS = ("train", "valid", "test")


def run(*args):
    """(exit code, standard output, standard error) of a command line; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    argv = [str(arg) for arg in args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = common.run_script(prepare_data.main, argv)
        except SystemExit as left:  # argparse
            code = left.code
    return code, out.getvalue(), err.getvalue()


def lines(path):
    if not path.exists():
        return []
    rows = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(row) for row in rows if row]


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def read_splits(folder):
    return {split: lines(folder / f"{split}.jsonl") for split in SPLITS}


def read_items(folder, key="text"):
    return {row["id"]: row.get(key) for row in lines(folder / "items.jsonl")}


def prepared(name, out, *args, raw=RAW):
    """(meta, items, {split: lines}) of a dataset that must be prepared without an error."""
    code, _, err = run(name, "--raw", raw, "--out", out, *args)
    assert code == 0, err
    folder = out / name
    return read_meta(folder), read_items(folder), read_splits(folder)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def hashed(*parts):
    """The hash of the format, written out again: 8 bytes of blake2b over the parts joined by the unit separator."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def ties(name, user, *items):
    """Items of one time, in the order in which they count."""
    return sorted(items, key=lambda item: hashed(2025, name, user, item))


def by_hash(name, users):
    return sorted(users, key=lambda user: hashed(2025, name, user))


def liked_and_not(line):
    """The (positives, negatives) of a user's line, as sets."""
    pairs = list(zip(line["candidates"], line["labels"]))
    assert len(dict(pairs)) == len(pairs)
    return {item for item, label in pairs if label}, {item for item, label in pairs if not label}


# ------------------------------------------------------------------------------------------------------ miniatures

EXPECTED = json.loads((RAW / "expected.json").read_text(encoding="utf-8"))  # worked out by hand
TEXT = "items without text"


@pytest.mark.parametrize("name", common.DATASETS)
def test_miniature(name, tmp_path):
    meta, _, splits = prepared(name, tmp_path, "--test-size", 999, "--train-size", 0)
    expected = EXPECTED[name]
    users = by_hash(name, expected["users"])
    assert [line["user"] for line in splits["test"]] == users
    samples = positives = 0
    for line in splits["test"]:
        user = expected["users"][line["user"]]
        assert line["history"] == user["history"]
        assert liked_and_not(line) == (set(user["positives"]), set(user["negatives"]))
        samples += len(line["labels"])
        positives += sum(line["labels"])
    rows = lines(tmp_path / name / "items.jsonl")
    assert {row.pop("id"): row for row in rows} == expected["items"]
    dropped = {reason: count for reason, count in meta["dropped"].items() if count}
    assert dropped == expected["dropped"]
    for part in meta["rows"].values():
        for count in part.values():
            assert count["malformed"] == 0
    assert not splits["train"] and not (tmp_path / name / "train.jsonl").exists()
    counts = {"users": len(users), "items": len(rows), "samples": samples, "positives": positives}
    assert meta["splits"] == {"test": counts} and meta["short"] == {"test_size": samples}


@pytest.mark.parametrize("name", common.DATASETS)
def test_splits_of_the_miniatures(name, tmp_path):
    """One user for test, then a tenth, at least one of two, for valid."""
    _, _, splits = prepared(name, tmp_path, "--test-size", 1, "--train-size", 99)
    test, *tuned = by_hash(name, EXPECTED[name]["users"])
    valid = tuned[:1] if len(tuned) > 1 else []
    users = {split: [line["user"] for line in rows] for split, rows in splits.items()}
    assert users == {"test": [test], "valid": valid, "train": tuned[len(valid):]}


def test_pog_with_its_own_titles(tmp_path):
    rows = [f"i{k},c1,//img/{k}.jpg,红色, 标题 {k}\n" for k in "12346"]
    write(tmp_path / "raw/pog/item_data.txt", "".join(rows))
    shutil.copy(RAW / "pog/user_data.txt", tmp_path / "raw/pog")
    _, items, splits = prepared("pog", tmp_path, raw=tmp_path / "raw")
    assert items["i2"] == "红色, 标题 2"
    assert {line["user"] for line in splits["train"] + splits["valid"]} == {"a1", "a3"}


def test_english_titles_apart_from_the_events_are_not_replaced_by_chinese_ones(tmp_path):
    shutil.copytree(RAW / "pog", tmp_path / "raw/pog/release")
    titles = tmp_path / "raw/pog/release/pog_translated_titles.csv"
    titles.rename(tmp_path / "raw/pog" / titles.name)
    write(tmp_path / "raw/pog/release/item_data.txt", "a1,1,x,Kleid\n")
    read = prepared("pog", tmp_path / "out", raw=tmp_path / "raw")
    assert read[1:] == prepared("pog", tmp_path / "plain")[1:]


@pytest.mark.skipif(not (REAL / "movielens").exists(), reason="the real MovieLens file is not at hand")
def test_movielens_as_it_is(tmp_path):
    row = prepared("movielens", tmp_path, raw=REAL)[0]["splits"]["test"]
    assert (row["users"], row["samples"], row["positives"]) == (614, 5540, 1228)


# ---------------------------------------------------------------------------------------------------- generated files


def movielens(folder, rows, items=50):
    """A raw MovieLens folder of rows (user, item, stars, time)."""
    films = [f"{k},Film {k},Drama\n" for k in range(items)]
    ratings = ["%s,%s,%s,%s\n" % row for row in rows]
    write(folder / "movielens/movies.csv", "movieId,title,genres\n" + "".join(films))
    write(folder / "movielens/ratings.csv", "userId,movieId,rating,timestamp\n" + "".join(ratings))
    return folder


def some_rows(users=300, each=20, items=50, seed=0):
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        for _ in range(each):
            rows.append((f"u{user}", rng.randrange(items), rng.choice([1, 2, 3, 4, 5]), rng.randrange(30)))
    return rows


SIZES = ("--test-size", 500, "--train-size", 600)


def test_the_same_whatever_the_order_of_the_rows_the_bound_or_the_process(tmp_path):
    rows = some_rows()
    first, items, splits = prepared("movielens", tmp_path / "a", *SIZES, raw=movielens(tmp_path, rows))
    users = [line["user"] for split in ("test", "valid", "train") for line in splits[split]]
    assert users == by_hash("movielens", set(users))  # so no user is in two splits
    finetune = len(splits["valid"]) + len(splits["train"])
    assert len(splits["valid"]) == finetune // 10 > 1 and first["short"] == {}
    command = [sys.executable, SCRIPT, "movielens", "--raw", tmp_path, *SIZES, "--out", tmp_path / "b"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([*map(str, command)], env=environment, check=True, capture_output=True, timeout=100)
    assert read_meta(tmp_path / "b/movielens") == first
    assert read_splits(tmp_path / "b/movielens") == splits
    bound = prepared("movielens", tmp_path / "d", *SIZES, "--max-rows", 6500, raw=tmp_path)
    assert bound[1:] == (items, splits) and bound[0]["share_of_users"] == 0.5
    assert prepared("movielens", tmp_path / "e", *SIZES, "--seed", 1, raw=tmp_path)[2] != splits
    random.Random(1).shuffle(rows)
    shuffled = prepared("movielens", tmp_path / "c", *SIZES, raw=movielens(tmp_path, rows))
    assert shuffled[1:] == (items, splits) and shuffled[0]["dropped"] == first["dropped"]


def test_too_small_a_bound_is_said_and_first_is_of_all_events(tmp_path):
    rows = some_rows()
    movielens(tmp_path, rows)
    assert run("movielens", "--raw", tmp_path, "--out", tmp_path, "--overwrite")[0] == 2  # raw files
    code, _, err = run("movielens", "--raw", tmp_path, "--out", tmp_path / "x", "--max-rows", 1000)
    assert code == 0 and "--max-rows" in err
    meta = read_meta(tmp_path / "x/movielens")
    assert meta["share_of_users"] < 0.2
    assert meta["short"]["test_size"] == meta["splits"]["test"]["samples"]
    for item, first in read_items(tmp_path / "x/movielens", "first").items():
        assert first == min(time for _, film, _, time in rows if str(film) == item)


def test_users_are_sampled_uniformly_with_complete_histories(tmp_path):
    """Events by date, so each user is spread over the file; the bound keeps one user in sixteen or fewer."""
    users, each = 20_000, 5
    articles = [f"{k},Item {k}\n" for k in range(100)]
    rows = []
    for day in range(each):
        rows += [f"2020-01-0{day + 1},c{user},{(user + 7 * day) % 100}\n" for user in range(users)]
    write(tmp_path / "hm/articles.csv", "article_id,detail_desc\n" + "".join(articles))
    write(tmp_path / "hm/transactions_train.csv", "t_dat,customer_id,article_id\n" + "".join(rows))
    sizes = ("--test-size", 10 ** 6, "--train-size", 0, "--max-rows", 12_000)
    meta, _, splits = prepared("hm", tmp_path / "out", *sizes, raw=tmp_path)
    kept = [int(line["user"][1:]) for line in splits["test"]]
    assert meta["share_of_users"] == 1 / 16 and 1100 < len(kept) < 1400
    observed = np.bincount(np.array(kept) * 10 // users, minlength=10)  # by place in the file
    assert np.sum((observed - len(kept) / 10) ** 2 / (len(kept) / 10)) < 27.9  # chi-square, 9 degrees: p = 0.001
    for line in splits["test"]:
        own = [str((int(line["user"][1:]) + 7 * day) % 100) for day in range(each)]
        assert line["history"] == own[:3]
        assert liked_and_not(line)[0] == set(own[3:])


def test_caps_histories_and_candidate_order(tmp_path):
    rows = []
    for user in range(200):
        rows += [(f"u{user}", item, 5 if item < 25 else 1, item) for item in range(50)]
    _, _, splits = prepared("movielens", tmp_path / "out", raw=movielens(tmp_path, rows))
    indices = []
    for line in splits["test"]:
        assert line["history"] == [str(item) for item in range(3, 23)]  # the latest 20 of 23
        disliked = ties("movielens", line["user"], *map(str, range(25, 50)))[:10]
        assert liked_and_not(line) == ({"23", "24"}, set(disliked))
        indices += np.flatnonzero(line["labels"]).tolist()
    spread = np.std(range(12)) / len(indices) ** 0.5
    assert abs(np.mean(indices) - 5.5) < 4 * spread  # the order tells nothing


def test_next_item_ranking(tmp_path):
    rows = some_rows(users=400, each=30, items=1000)
    touched = {(user, str(item)) for user, item, _, _ in rows}
    movielens(tmp_path, rows, 1000)
    _, _, splits = prepared("movielens", tmp_path / "out", "--positives", 1, "--negatives", 99, raw=tmp_path)
    drawn = []
    for line in splits["test"]:
        liked, negatives = liked_and_not(line)
        assert len(liked) == 1 and len(negatives) == 99
        for item in negatives:
            assert (line["user"], item) not in touched
        drawn += map(int, negatives)
    observed = np.bincount(np.array(drawn) // 100, minlength=10)
    expected = len(drawn) / 10
    assert np.sum((observed - expected) ** 2 / expected) < 27.9


# ------------------------------------------------------------------------------------------------------ what is there


def seeds_of(folder):
    """The seed in meta.json, after a check that no other folder is left beside it."""
    assert os.listdir(folder.parent) == [folder.name]
    return read_meta(folder)["job"]["seed"]


def test_prepared_twice_is_left_alone_and_replaced_only_when_asked(tmp_path):
    movielens(tmp_path / "raw", some_rows())
    command = ("movielens", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    folder = tmp_path / "out/movielens"
    assert run(*command)[0] == 0
    before = os.stat(folder / "meta.json").st_mtime_ns
    assert run(*command)[0] == 0
    assert os.stat(folder / "meta.json").st_mtime_ns == before
    code, _, err = run(*command, "--seed", 1)
    assert code == 2 and "seed" in err and "--overwrite" in err and seeds_of(folder) == 2025
    assert run(*command, "--seed", 1, "--overwrite")[0] == 0 and seeds_of(folder) == 1
    ratings = tmp_path / "raw/movielens/ratings.csv"
    os.utime(ratings, (0, 0))  # the same size, another time
    code, _, err = run(*command, "--seed", 1)
    assert code == 2 and "raw" in err


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("file, content", [("notes.txt", "hello"), ("meta.json", '{"format": 1, "domain": "food"}')])
def test_a_folder_of_the_user_s_own_is_never_replaced(tmp_path, file, content, overwrite):
    write(tmp_path / "yelp" / file, content)
    code, _, err = run("cds", "yelp", "--raw", RAW, "--out", tmp_path, *overwrite)
    assert code == 2 and str(tmp_path / "yelp") in err and "--overwrite" not in err
    assert (tmp_path / "yelp" / file).read_text() == content
    assert os.listdir(tmp_path) == ["yelp"]  # it is said before the first dataset is made


def test_a_symbolic_link_is_followed_twice_in_a_row(tmp_path):
    (tmp_path / "disk/yelp").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/yelp").symlink_to(tmp_path / "disk/yelp")
    for overwrite in ([], ["--overwrite"], ["--overwrite"]):
        prepared("yelp", tmp_path / "out", *overwrite)
        assert (tmp_path / "out/yelp").is_symlink() and (tmp_path / "disk/yelp/meta.json").exists()


@pytest.mark.parametrize("module, function, call", [
    (json, "dumps", 1), (common, "write_json", 1), (os, "rename", 1)])
def test_stopped_half_way_nothing_is_lost(tmp_path, monkeypatch, module, function, call):
    prepared("yelp", tmp_path)
    usual = getattr(module, function)
    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return usual(*args, **kwargs)
    command = ("yelp", "--raw", RAW, "--out", tmp_path, "--overwrite", "--seed", 1)
    with monkeypatch.context() as patched:
        patched.setattr(module, function, stop)
        assert run(*command)[0] == 130
    assert seeds_of(tmp_path / "yelp") == 2025
    assert run(*command)[0] == 0 and seeds_of(tmp_path / "yelp") == 1


@pytest.mark.parametrize("seed, code", [(1, 2), (2025, 0)])
def test_another_process_that_ends_first_is_not_undone(tmp_path, monkeypatch, seed, code):
    """The other one makes the whole dataset while this one writes its last file."""
    command = [sys.executable, SCRIPT, "yelp", "--raw", str(RAW), "--out", str(tmp_path), "--seed", str(seed)]
    usual = common.write_json
    states = []

    def write_late(path, value):
        usual(path, value)
        subprocess.run(command, check=True, capture_output=True, timeout=100)
        states.append(os.stat(tmp_path / "yelp/meta.json").st_mtime_ns)
    monkeypatch.setattr(common, "write_json", write_late)
    assert run("yelp", "--raw", RAW, "--out", tmp_path)[0] == code
    assert seeds_of(tmp_path / "yelp") == seed
    assert os.stat(tmp_path / "yelp/meta.json").st_mtime_ns == states[0]


def test_a_demo_model_of_another_seed_is_not_taken(tmp_path, monkeypatch):
    def train(folder, seed):
        write(folder / "seed", str(seed))
    monkeypatch.setattr(prepare_data, "train_demo_model", train)
    assert run("demo", "--out", tmp_path)[0] == run("demo", "--out", tmp_path)[0] == 0
    assert run("demo", "--out", tmp_path, "--seed", 7)[0] == 2
    assert run("demo", "--out", tmp_path, "--seed", 7, "--overwrite")[0] == 0
    assert (tmp_path / "demo-model/seed").read_text() == "7"
    assert read_meta(tmp_path / "demo-model").keys() == {"format", "job"}


# --------------------------------------------------------------------------------------------------- what a field says


@pytest.mark.parametrize("time, text, seconds", [
    (prepare_data.us_time, "11/15/2019 12:00:00 AM", 1573776000),
    (prepare_data.us_time, "11/15/2019 1:02:03 PM ", 1573822923),
    (prepare_data.us_time, "11/15/2019 12:59:59 PM", 1573822799),
    (prepare_data.time_of, "2009-05-04", 1241395200),
    (prepare_data.time_of, "2009-05-04T23:08:57Z", 1241478537),
    (prepare_data.time_of, "2009-05-04 23:08:57", 1241478537),
    (prepare_data.time_of, "1969-12-31", -86400),
    (prepare_data.time_of, "-86400", -86400),
    (prepare_data.goodreads_time, "Fri Aug 25 13:55:02 -0700 2017", 1503694502),
])
def test_times(time, text, seconds):
    assert time(text) == seconds


@pytest.mark.parametrize("title, text", [
    ("x<y and other inequalities", "x<y and other inequalities"), ("Size <L", "Size <L"),
    ("USB <Type-C & A> Cable", "USB <Type-C & A> Cable"), ("I &lt;3 you", "I <3 you"), ("", ""),
    ("The HTML &lt;table&gt; Tag Explained", "The HTML <table> Tag Explained"), ("AT&amp;amp;T phone", "AT&T phone"),
    ('<span class="a-size">Blue</span> <b>Train</b>', "Blue Train"), ("A<script>var x = 1 < 2;</script>B", "A B"),
    ("WIFI&ETHERNET", "WIFI&ETHERNET"), ("USB&amp;microUSB", "USB&microUSB"), ("it&#39;s &eacute;", "it's é"),
])
def test_amazon_titles(title, text):
    assert prepare_data.amazon_item(("A1", title)) == ("A1", text)


@pytest.mark.parametrize("title, text", [
    ("Gumboy - Crazy Adventures\x99", "Gumboy - Crazy Adventures™"), ("Assassin\x92s Creed", "Assassin’s Creed"),
    ("PokÃ©mon", "Pokémon"), ("三国", "三国"), ("Déjà vu", "Déjà vu"), ("\xa0Two \x85", "Two …"),
])
def test_steam_titles(title, text):
    assert prepare_data.steam_item(["10", title, "game"]) == ("10", text)


# --------------------------------------------------------------------------------------------------- odd and bad files

MOVIES, STARS, NEWS, READS = "movies.csv", "ratings.csv", "train/news.tsv", "train/behaviors.tsv"
PLAYS = "userid-timestamp-artid-artname-traid-traname.tsv"
REVIEWS, SHOPS = "yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json"
POG, STEAM, LENS = "pog_translated_titles.csv", "App_ID_Info.txt", "MicroLens-50k_titles.csv"
CDS = "CDs_and_Vinyl.json.gz"
PENS_HEADER = b"News ID\tCategory\tTopic\tHeadline\tNews body\tTitle entity\tEntity content\r\n"


def changed(tmp_path, name, file, old, new):
    """(exit code, standard error) of preparing a miniature in which some bytes of a file are others; old None: all."""
    shutil.copytree(RAW / name, tmp_path / "raw" / name)
    path = tmp_path / "raw" / name / file
    data = path.read_bytes()
    assert old is None or old in data
    path.write_bytes(new if old is None else data.replace(old, new))
    code, _, err = run(name, "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    return code, err


@pytest.mark.parametrize("name, file, old, new", [
    # not what it should be
    ("movielens", STARS, None, b""), ("movielens", STARS, None, b"userId,movieId,rating,timestamp\n"),
    ("movielens", STARS, None, random.Random(0).randbytes(5000)), ("movielens", STARS, b"rating", b"stars"),
    ("movielens", STARS, b",5.0,", b",five,"), ("movielens", STARS, b",5.0,", b",50,"), ("mind", READS, b"-1", b""),
    ("mind", READS, b"11/1", b"13/4"), ("steam", "train_game.txt", b",", b";"), ("yelp", REVIEWS, b"2018-", b"on "),
    ("yelp", REVIEWS, b"{", b"["), ("yelp", REVIEWS, None, b"[" * 100_000 + b"\n"), ("lastfm", PLAYS, None, b"\0" * 99),
    ("cds", CDS, None, (RAW / "cds" / CDS).read_bytes()[:150]),
    # quotes, encodings
    ("movielens", MOVIES, b"15,Casino", b'15,"Casino'), ("movielens", MOVIES, b'The (1995)"', b"The (1995)"),
    ("movielens", MOVIES, "Émile".encode(), "Émile".encode("cp1252")), ("hotelrec", "HotelRec.txt", b"ann", b"Jos\xe9"),
    ("pog", "user_data.txt", b"a1", "\ufeffa1".encode("utf-16")),
    # too many fields
    ("lastfm", PLAYS, b"Bj\xc3\xb6rk", b"Bj\xc3\xb6rk\tDC"), ("movielens", STARS, b"7,1,3.5,1000", b"7,1,3.5,1000,x"),
    ("mind", NEWS, b"N1\t", b"N1\tx\tx\tx\tx\tx\tx\tx\tx\t"),
    # a second byte order mark
    ("movielens", STARS, b"8,1,5.0,10", b"\xef\xbb\xbfuserId,movieId,rating,timestamp"),
])
def test_bad_file_is_one_line_that_names_it(tmp_path, name, file, old, new):
    code, err = changed(tmp_path, name, file, old, new)
    assert code == 2 and file in err.splitlines()[-1]
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name, file, old, new, item, text", [
    ("netflix", "movie_titles.csv", "Amélie".encode("latin-1"), "Amélie".encode(), "3", "title: Amélie"),
    ("netflix", "movie_titles.csv", b"1,2003,", b"\xef\xbb\xbf1,2003,", "1", "title: Dinosaur Planet, year: 2003"),
    ("mind", NEWS, b"N1\t", b"\xef\xbb\xbfN1\t", "N1", "First"),
    ("pens", "news.tsv", b"Two", b'"""Two"" of two"', "N2", '"Two" of two'),
    ("pens", "news.tsv", b"Two", b'"Two" and "three"', "N2", '"Two" and "three"'),
    ("movielens", MOVIES, b"1,Toy Story (1995),Comedy", b'"1","Toy Story (1995)","Comedy"', "1", "Toy Story (1995)"),
    ("movielens", MOVIES, b"Heat", b"Heat" + b" " * 200_000, "16", "Heat (1995)"),
    ("cds", CDS, None, gzip.decompress((RAW / "cds" / CDS).read_bytes()), "C4", "Blue"),
    ("yelp", SHOPS, None, gzip.compress((RAW / "yelp" / SHOPS).read_bytes()), "p4", "Taco Town"),
    # files joined, each with its header
    ("movielens", STARS, b"8,1,5.0,10", b"userId,movieId,rating,timestamp\n8,1,5.0,10", "1", "Toy Story (1995)"),
    ("movielens", MOVIES, b"\n16,", b"\nmovieId,title,genres\n16,", "16", "Heat (1995)"),
    ("pog", POG, b"\ni2", b"\nitem_id,title,title_en\ni2", "i2", "Hat"),
    ("pens", "news.tsv", PENS_HEADER, PENS_HEADER * 2, "N1", "One"),
    # a header that is not there loses no row
    ("pens", "news.tsv", PENS_HEADER, b"", "N1", "One"),
    ("pog", POG, b"item_id,title,title_en\n", b"", "i1", "Dress, red"),
    # blanks at the end of a line, or around an id
    ("steam", "train_game.txt", b",30\n", b",30 \t\n", "30", "三国"),
    ("steam", STEAM, b"30,", b"30 ,", "30", "三国"), ("pog", "user_data.txt", b"i3,o1", b"i3 ,o1", "i3", "Shoes"),
    ("movielens", STARS, b"7,12,4.0", b"7 , 12,4.0", "12", 'He said "Hi" twice'),
    ("lastfm", PLAYS, b"user_1\t", b"user_1 \t", "t01", "track_name: Song 1, artist_name: Björk"),
    ("yelp", REVIEWS, b'"y1"', b'" y1\\t"', "p1", 'Pizza "Roma"'),
])
def test_odd_file_is_read_as_it_was_meant(tmp_path, name, file, old, new, item, text):
    code, err = changed(tmp_path, name, file, old, new)
    assert code == 0, err
    assert read_items(tmp_path / "out" / name)[item] == text
    _, _, splits = prepared(name, tmp_path / "usual")
    assert read_splits(tmp_path / "out" / name) == splits


@pytest.mark.parametrize("name, file, old, new, line, texts", [
    ("movielens", MOVIES, b"15,Casino (1995)", b'15,"Film of the year\n10,000 people watched"', 7,
     {"15": "Film of the year 10,000 people watched"}),
    ("pog", POG, "i2,帽,Hat\ni3,鞋,Shoes".encode(), 'i2,帽,"Hat\ni3,鞋,Shoes"'.encode(), 3, {"i2": "Hat i3,鞋,Shoes"}),
    ("microlens", LENS, b'"Line', b'"Line,\none', 6, {"5": "Line, one break"}),
])
def test_texts_of_several_lines_are_read_and_said(tmp_path, name, file, old, new, line, texts):
    code, err = changed(tmp_path, name, file, old, new)
    assert code == 0, err
    said = [row for row in err.splitlines() if file in row and f"line {line}" in row]
    assert len(said) == 1 and " 1 " in said[0]
    items = read_items(tmp_path / "out" / name)
    assert items == {**items, **texts}


@pytest.mark.parametrize("films, loud", [(20, True), (40, False)])
def test_where_over_half_is_dropped_a_line_says_so(tmp_path, films, loud):
    movielens(tmp_path, some_rows(items=50), films)  # of 50 films
    code, _, err = run("movielens", "--raw", tmp_path, "--out", tmp_path / "cut")
    dropped = read_meta(tmp_path / "cut/movielens")["dropped"]["events whose item has no text"]
    assert code == 0 and (dropped > 3000) == loud
    assert (str(dropped) in err) == loud


def test_what_cannot_be_read_beside_the_files_is_no_obstacle(tmp_path):
    """Like a folder that may not be read, a link whose target's name is too long cannot be looked into."""
    shutil.copytree(RAW / "yelp", tmp_path / "yelp")
    (tmp_path / "yelp/lost+found").symlink_to("x" * 300)
    prepared("yelp", tmp_path / "out", raw=tmp_path)


@pytest.mark.parametrize("bad, code", [(3, 0), (4, 2)])
def test_up_to_one_percent_of_malformed_rows_is_counted(tmp_path, bad, code):
    path = movielens(tmp_path, some_rows(users=10, each=31)) / "movielens/ratings.csv"
    table = path.read_text().splitlines()
    table[9:9 + bad] = ["1,2,3"] * bad  # from line 10 on
    path.write_text("\n".join([*table[:8], "", "  ", *table[8:]]))  # two blank lines, which are not rows
    got, _, err = run("movielens", "--raw", tmp_path, "--out", tmp_path / "out")
    assert got == code and f"{bad} of 310 rows" in err and "line 12: '1,2,3'" in err
    if code == 0:
        count = read_meta(tmp_path / "out/movielens")["rows"]["events"]["ratings.csv"]
        assert (count["rows"], count["malformed"]) == (310, 3)


@pytest.mark.parametrize("args, says", [
    (["movie"], "movie"), (["movielens", "--seed", "x"], "--seed"), (["yelp", "--max-history", "0"], "--max-history"),
    (["mind", "--raw", "/nowhere"], "msnews"), (["mind", "--from-recbench", "/nowhere"], "kaggle"),
    (["yelp", "--test-size", "0", "--train-size", "0"], "no samples")])
def test_bad_command(tmp_path, args, says):
    code, _, err = run("--raw", RAW, "--out", tmp_path, *args)
    assert code == 2 and says in err and not os.listdir(tmp_path)


@pytest.mark.parametrize("name, file", [
    ("movielens", STARS), ("mind", NEWS), ("netflix", "combined_data_4.txt")])
def test_all_files_are_looked_for_before_any_work(tmp_path, name, file):
    shutil.copytree(RAW / "yelp", tmp_path / "yelp")
    shutil.copytree(RAW / name, tmp_path / name)
    (tmp_path / name / file).unlink()
    code, _, err = run("yelp", name, "--raw", tmp_path, "--out", tmp_path / "out")
    source = prepare_data.SOURCES[name]
    assert code == 2 and Path(file).name in err and source.home in err
    assert not (tmp_path / "out").exists()


def test_of_mind_s_two_folders_none_is_guessed(tmp_path):
    for folder in ("MINDsmall_dev", "MINDsmall_train"):
        shutil.copytree(RAW / "mind/train", tmp_path / "raw/mind" / folder)
    code, _, err = run("mind", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and "MINDsmall_dev" in err and "MINDsmall_train" in err
    shutil.rmtree(tmp_path / "raw/mind/MINDsmall_dev")
    read = prepared("mind", tmp_path / "out", raw=tmp_path / "raw")
    assert read[1:] == prepared("mind", tmp_path / "plain")[1:]


def test_files_one_folder_deeper_are_found_and_packed_ones_named(tmp_path):
    folder = tmp_path / "deep/movielens"
    shutil.copytree(RAW / "movielens", folder / "ml-latest-small")
    deep = prepared("movielens", tmp_path / "out", raw=tmp_path / "deep")
    assert deep[1:] == prepared("movielens", tmp_path / "plain")[1:]
    shutil.copytree(folder / "ml-latest-small", folder / "ml-25m")
    code, _, err = run("movielens", "--raw", tmp_path / "deep", "--out", tmp_path / "x")
    assert code == 2 and "ml-25m" in err and "ml-latest-small" in err
    write(tmp_path / "packed/movielens/ml-latest-small.zip", "PK")
    code, _, err = run("movielens", "--raw", tmp_path / "packed", "--out", tmp_path / "x")
    assert code == 2 and "ml-latest-small.zip" in err


# --------------------------------------------------------------------------------------------------------------- fuzz


def mutated(data, rng):
    """Bytes of a raw file, damaged: bytes flipped, lines cut or mixed up, columns swapped, encodings broken."""
    rows = data.splitlines(keepends=True) or [b""]
    row = rng.randrange(len(rows))
    for separator in (b"\t", b",", b": ", b" "):
        if separator in rows[row]:
            break
    parts = rows[row].split(separator)
    kind = rng.randrange(8)
    if kind == 0:
        data = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 1:
        return data[:rng.randrange(len(data))]
    if kind == 2:
        return data.decode("latin-1").encode(rng.choice(["utf-16", "utf-8", "utf-32-be"]))
    if kind == 3:
        rng.shuffle(parts)
        rows[row] = separator.join(parts)
    elif kind == 4:
        rows[row] = rows[row][:rng.randrange(len(rows[row]))] + b"\n"
    elif kind == 5:
        rng.shuffle(rows)
    elif kind == 6:
        rows = [line for line in rows if rng.random() < 0.7]
    else:
        odd = [b'"', b"\0", b"\xff\xfe", b"[", b"9" * 400, b"\\ud800", b"NaN", b"null"]
        rows[row] = rng.choice(odd).join(parts)
    return b"".join(rows)


def fuzz(name, tmp_path, turns):
    files = [path for path in sorted((RAW / name).rglob("*")) if path.is_file()]
    outcomes = set()
    for turn in range(turns):
        rng = random.Random(f"{name} {turn}")
        raw = tmp_path / str(turn)
        shutil.copytree(RAW / name, raw / name)
        path = rng.choice(files)
        data = path.read_bytes()
        packed = path.suffix == ".gz" and rng.random() < 0.8
        data = gzip.decompress(data) if packed else data
        if rng.random() < 0.7:  # so many rows that a malformed one is under 1%
            head, *rest = data.splitlines(keepends=True)
            data = head + b"".join(rest) * 40
        data = mutated(data, rng)
        spoilt = raw / path.relative_to(RAW)
        spoilt.write_bytes(gzip.compress(data) if packed else data)
        code, _, err = run(name, "--raw", raw, "--out", raw / "out", "--test-size", 5, "--train-size", 99)
        outcomes.add(code)
        if code == 0:
            assert read_meta(raw / "out" / name)["splits"]
        else:
            assert code == 2 and err.splitlines()[-1].startswith("error: "), (turn, err)
            assert not os.listdir(raw / "out")
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
    files = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table(columns), path)


def recbench(folder, name, **changes):
    """Files in the authors' layout: numbers for ids, a null text, repeats, one-class users, users out of order.

    changes: {file: {column of Yelp: values}} that are other ones.
    """
    user, item, history, label, text, *more = prepare_data.RECBENCH[name].split()
    long = [1, 2, 3, 4] * 6
    files = {
        "items": {item: [1, 2, 3, 4, 2], text: ["One", "old", None, "Four", " Two  x "]},
        "users": {user: [7, 8, 9, 6, 7], history: [[4], [1, 1], [], long, [1, 2, 3]]},
        "test": {user: [8, 7, 8, 8], item: [1, 3, 1, 2], label: [1, 0, 1, 0]},
        "finetune": {user: [9, 6], item: [4, 4], label: [1, 1]}}
    for key in more:
        files["items"][key] = ["a", "b", "c", None, "e"]
    for file, columns in files.items():
        parquet(folder / f"{file}.parquet", {**columns, **changes.get(file, {})})
    return text, *more


def converted(tmp_path, name="yelp", **changes):
    """(exit code, standard error, folder) of --from-recbench; changes: as recbench takes them."""
    recbench(tmp_path / "in" / name, name, **changes)
    code, _, err = run(name, "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")
    return code, err, tmp_path / "out" / name


@pytest.mark.parametrize("name", common.DATASETS)
def test_from_recbench(name, tmp_path):
    attributes = recbench(tmp_path / "in" / name, name)
    (tmp_path / "in" / name / "valid_user_set_0.1.txt").write_text("\ufeff6 \n")
    code, _, err = run(name, "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, err
    folder = tmp_path / "out" / name
    latest = ["1", "2", "3", "4"] * 5
    assert read_splits(folder) == {
        "test": [{"user": "8", "history": ["1", "1"], "candidates": ["1", "1", "2"], "labels": [1, 1, 0]},
                 {"user": "7", "history": ["1", "2", "3"], "candidates": ["3"], "labels": [0]}],
        "train": [{"user": "9", "history": [], "candidates": ["4"], "labels": [1]}],
        "valid": [{"user": "6", "history": latest, "candidates": ["4"], "labels": [1]}]}
    texts = {"1": "One", "2": " Two  x ", "3": "", "4": "Four"}
    if len(attributes) == 2:
        first, second = attributes
        texts["1"] = f"{first}: One, {second}: a"
        texts["2"] = f"{first}:  Two  x , {second}: e"
        texts["4"] = f"{first}: Four"
    assert read_items(folder) == texts
    meta = read_meta(folder)
    assert meta["items without text"] == 1 and meta["repeated candidates"] == 1
    assert meta["job"]["from_recbench"] is True
    assert len(common.read_dataset(tmp_path / "out", name).splits["test"]) == 2


def test_from_recbench_without_a_list_of_valid_users(tmp_path, monkeypatch):
    code, err, folder = converted(tmp_path)
    assert code == 0, err
    assert [line["user"] for line in lines(folder / "valid.jsonl")] == by_hash("yelp", ["9", "6"])[:1]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("yelp", "--from-recbench", tmp_path / "in", "--out", tmp_path / "new")
    assert code == 2 and "pyarrow" in err


def test_from_recbench_reads_bytes_and_whole_floats(tmp_path):
    """A column of ids with a gap in it is one of floats."""
    name = [b"One", b"old", None, "Vi\u1ec7t".encode(), b" Two  x "]
    items = {"business_id": [1.0, 2.0, 3.0, 4.0, 2.0], "name": name}
    test = {"user_id": [8.0, 7.0, 8.0, 8.0], "click": [1.0, 0.0, 1.0, 0.0]}
    code, err, folder = converted(tmp_path, items=items, test=test)
    assert code == 0, err
    assert read_items(folder) == {"1": "One", "2": " Two  x ", "3": "", "4": "Vi\u1ec7t"}
    assert [line["user"] for line in lines(folder / "test.jsonl")] == ["8", "7"]


@pytest.mark.parametrize("file, column, values", [
    ("items", "name", [["a"]] * 5), ("items", "name", [decimal.Decimal("1.5")] * 5), ("items", "name", [b"\xff"] * 5),
    ("items", "business_id", [datetime.date(2020, 1, 1)] * 5), ("test", "click", [2, 1, 0, 1]),
    ("finetune", "click", [None, 1]), ("test", "business_id", [1, 98, 1, 2]), ("finetune", "user_id", [9, 5])])
def test_from_recbench_refuses_what_it_would_misread(tmp_path, file, column, values):
    code, err, folder = converted(tmp_path, **{file: {column: values}})
    assert code == 2 and f"{file}.parquet" in err and not folder.exists()


def test_from_recbench_of_another_dataset_or_damaged(tmp_path):
    recbench(tmp_path / "in/mind", "yelp")
    recbench(tmp_path / "in/hm", "hm")
    (tmp_path / "in/hm/users.parquet").write_bytes(b"PAR1")
    for name in ("mind", "hm"):
        code, _, err = run(name, "--from-recbench", tmp_path / "in", "--out", tmp_path / "out")
        assert code == 2 and str(tmp_path / "in" / name) in err
