"""Raw files of the benchmark's fifteen datasets -> one standard format.

    python prepare_data.py --list                                  the datasets, their raw files, where to get them
    python prepare_data.py movielens --raw raw --out data          reads raw/movielens/, writes data/movielens/
    python prepare_data.py mind hm steam --raw raw --out data      several, each with the sizes of its role in the paper
    python prepare_data.py movielens --test-size 2000 --train-size 3000 --raw raw --out data
    python prepare_data.py yelp --positives 1 --negatives 99 --raw raw --out data      next-item ranking
    python prepare_data.py mind --from-recbench recbench-md --out data                 the authors' own samples
    python prepare_data.py demo --out data                         small made-up datasets, no download

Written per dataset: items.jsonl {"id", "text"}; train.jsonl, valid.jsonl and test.jsonl, one line a user {"user",
"history" (oldest first), "candidates", "labels" (1 liked, 0 not)}; meta.json (what was read; what was dropped and why:
events of the whole files, then of the users that were looked at until the sizes were reached; sha256).

Files of any size are read as a stream. Kept are all rows of the users whose hash is below a threshold; when they
exceed --max-rows the threshold is halved. Users are then taken in the order of their hashes, for test first, then for
valid and train: a uniform sample of users with complete histories, whatever the order of the rows. Every random choice
is a hash of (seed, dataset, user, item): the same on every machine and for every --max-rows.
"""
import contextlib
import csv
import functools
import gc
import gzip
import hashlib
import html
import io
import json
import operator
import os
import random
import re
import shutil
import sys
import zlib
from collections import Counter, namedtuple
from datetime import datetime, timezone
from itertools import chain, groupby, islice, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError

NEUTRAL, HISTORY = -1, 2  # labels beside 0 and 1: three stars; the history of an impression (its item: a list of ids)
int8, int64 = (functools.partial(np.fromiter, dtype=dtype) for dtype in (np.int8, np.int64))
EVENT = np.dtype([("user", "i8"), ("item", "i4"), ("time", "i8"), ("label", "i1")])  # the hash of a user
MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError)

# -------------------------------------------------------------------------------------------------- what a field says


def clean(text):
    """White space collapsed, "" for null, half surrogate pairs (from JSON escapes) replaced."""
    return " ".join("" if text is None else str(text).encode("utf-8", "replace").decode().split())


def no_markup(title):
    """An Amazon title: entities resolved, tags removed; "" for those that are a page's script."""
    title = html.unescape(clean(title))
    title = re.sub(r"<(script|style)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)|</?[a-z!][^<>]*(>|$)", " ", title, flags=re.I)
    return "" if "getTime()" in title else clean(title)


def once_encoded(title):
    """A Steam title, UTF-8 that was taken for latin-1 and encoded again, put right; the original where that fails."""
    try:
        return clean(title.encode("latin-1").decode("utf-8"))
    except UnicodeError:
        return clean(title)


def hotel(url):
    """Name and place in a TripAdvisor address "...-Reviews-NAME-PLACE.html", whose words are joined by "_"."""
    stem = url.split("-Reviews-", 1)[1].removesuffix(".html").replace("_", " ")
    return described(("hotel_name", "hotel_location"), stem.rsplit("-", 1))


def described(names, values):
    """The text of an item: its attribute, or "name: value, name: value" of two; "" where the first is blank."""
    values = list(map(clean, values))
    if len(names) == 1 or not values[0]:
        return values[0]
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True) if value)


@functools.lru_cache(1 << 12)
def liking(stars):
    """1, 0 or NEUTRAL for more than, less than or exactly three of five stars."""
    if not 0 <= float(stars) <= 5:
        raise ValueError(f"{stars} stars")
    return 1 if float(stars) > 3 else 0 if float(stars) < 3 else NEUTRAL


@functools.lru_cache(1 << 16)
def iso_time(text):
    """Seconds since 1970 of "2009-05-04", "2009-05-04 23:08:57" or "2009-05-04T23:08:57Z"; no zone: UTC."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def us_time(text):
    """Seconds since 1970 of "11/15/2019 1:22:32 PM"."""
    return int(datetime.strptime(text + " +0000", "%m/%d/%Y %I:%M:%S %p %z").timestamp())


def goodreads_time(text):
    """Seconds since 1970 of "Fri Aug 25 13:55:02 -0700 2017"."""
    _, month, day, clock, zone, year = text.split()
    month = 1 + "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split().index(month)
    return iso_time(f"{year}-{month:02}-{day}T{clock}{zone}")


# ------------------------------------- columns of some rows -> (ids, texts), or events (users, items, times, labels);
# one of MALFORMED on the way says that a row is malformed; times None: the order of the rows counts


def texts(*names, of=None):
    return lambda ids, *columns: (ids, list(map(of, columns[0])) if of else
                                  [described(names, values) for values in zip(*columns)])


def ratings(time, label=liking):
    return lambda users, items, times, stars: (users, items, int64(map(time, times)), int8(map(label, stars)))


def visits(time):
    return lambda users, items, times: (users, items, int64(map(time, times)), np.ones(len(users), np.int8))


def lists(separator):
    """Users, each with the list of their items in order."""
    def events(users, items, *_):
        items = [line.split(separator) for line in items]
        users = list(chain.from_iterable(map(repeat, users, map(len, items))))
        return users, list(chain.from_iterable(items)), None, np.ones(len(users), np.int8)
    return events


def impressions(shown):
    """An impression is its history, as one event, and candidates, all at time 0: clicked anywhere is clicked."""
    def events(users, times, histories, *columns):
        rows = [row for user, time, history, *rest in zip(users, map(us_time, times), histories, *columns)
                for row in [(user, history, time, HISTORY), *((user, item, 0, label) for item, label in shown(*rest))]]
        users, items, times, labels = zip(*rows)
        return users, items, int64(times), int8(labels)
    return events


def mind_shown(line):
    return [(entry[:-2], {"-1": 1, "-0": 0}[entry[-2:]]) for entry in line.split()]


def pens_shown(clicked, skipped):
    return [(item, 1) for item in clicked.split()] + [(item, 0) for item in skipped.split()]


# ---------------------------------------- lines of a file -> as many lines that csv can split; blank ones are left out


def headless(lines):
    return chain(("\n" for _ in islice(lines, 1)), lines)


def first_commas(count):
    """The first commas become tabs: those after them are text, or part a list."""
    return lambda lines: (line.replace(",", "\t", count) for line in lines)


def netflix_titles(lines):
    return (line.replace(",NULL,", ",,", 1).replace(",", "\t", 2) for line in lines)


def netflix_ratings(lines):
    """Lines "user,stars,date" after a line "MOVIE:" -> "MOVIE,user,stars,date"."""
    movie = ""
    for line in lines:
        if line.rstrip().endswith(":"):
            movie, line = line.rstrip()[:-1], ""
        yield f"{movie},{line}" if line.strip() else "\n"


# --------------------------------------------------------------------------------------------- the fifteen raw formats

# fields: names in the header or the JSON object, or positions. columns: see above. edit: lines -> lines.
Table = namedtuple("Table", "files form fields columns edit encoding", defaults=(iter, "utf-8-sig"))
Source = namedtuple("Source", "home items events")  # items: the tables to choose from, the first that is there
CSV, COMMA, TAB, JSON = {}, {"quoting": csv.QUOTE_NONE}, {"quoting": csv.QUOTE_NONE, "delimiter": "\t"}, None


def amazon(category):
    return Source("https://nijianmo.github.io/amazon/",
                  [Table([f"meta_{category}.json"], JSON, ("asin", "title"), texts(of=no_markup))],
                  Table([f"{category}.json"], JSON, ("reviewerID", "asin", "unixReviewTime", "overall"), ratings(int)))


SOURCES = {
    "mind": Source("https://msnews.github.io/",
        [Table(["news.tsv"], TAB, (0, 3), texts("title"))],
        Table(["behaviors.tsv"], TAB, (1, 2, 3, 4), impressions(mind_shown))),
    "pens": Source("https://msnews.github.io/pens.html",
        [Table(["news.tsv"], TAB, (0, 3), texts("title"), headless)],
        Table(["train.tsv", "valid.tsv"], TAB, (0, 6, 1, 4, 5), impressions(pens_shown), headless)),
    "goodreads": Source("https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
        [Table(["goodreads_book_works.json"], JSON, ("best_book_id", "original_title"), texts("title"))],
        Table(["goodreads_interactions_dedup.json"], JSON, ("user_id", "book_id", "date_added", "is_read"),
              ratings(goodreads_time, {"True": 1, "False": 0}.__getitem__))),
    "books": amazon("Books"),
    "movielens": Source("https://grouplens.org/datasets/movielens/",
        [Table(["movies.csv"], CSV, ("movieId", "title"), texts("title"))],
        Table(["ratings.csv"], COMMA, ("userId", "movieId", "timestamp", "rating"), ratings(int))),
    "microlens": Source("https://github.com/westlake-repl/MicroLens",
        [Table(["MicroLens-50k_titles.csv"], CSV, ("item", "title"), texts("title"))],
        Table(["MicroLens-50k_pairs.csv"], COMMA, ("user", "item", "timestamp"), visits(int))),
    "netflix": Source("https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data",
        [Table(["movie_titles.csv"], TAB, (0, 2, 1), texts("title", "year"), netflix_titles, "latin-1")],
        Table([f"combined_data_{part}.txt" for part in (1, 2, 3, 4)], COMMA, (1, 0, 3, 2), ratings(iso_time),
              netflix_ratings)),
    "cds": amazon("CDs_and_Vinyl"),
    "lastfm": Source("http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
        [Table(["userid-timestamp-artid-artname-traid-traname.tsv"], TAB, (4, 5, 3),
               texts("track_name", "artist_name"))],
        Table(["userid-timestamp-artid-artname-traid-traname.tsv"], TAB, (0, 4, 1), visits(iso_time))),
    "hm": Source("https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations",
        [Table(["articles.csv"], CSV, ("article_id", "detail_desc"), texts("detail_desc"))],
        Table(["transactions_train.csv"], COMMA, ("customer_id", "article_id", "t_dat"), visits(iso_time))),
    "pog": Source("https://github.com/wenyuer/POG",
        [Table(["pog_translated_titles.csv"], CSV, (0, 2), texts("title_en"), headless),
         Table(["item_data.txt"], TAB, (0, 3), texts("title"), first_commas(3))],
        Table(["user_data.txt"], COMMA, (0, 1, 2), lists(";"))),
    "electronics": amazon("Electronics"),
    "steam": Source("https://github.com/YangLiangwei/SCGRec",
        [Table(["App_ID_Info.txt"], CSV, (0, 1), texts(of=once_encoded))],
        Table(["train_game.txt"], TAB, (0, 1), lists(","), first_commas(1))),
    "hotelrec": Source("https://github.com/Diego999/HotelRec",
        [Table(["HotelRec.txt"], JSON, ("hotel_url", "hotel_url"), texts(of=hotel))],
        Table(["HotelRec.txt"], JSON, ("author", "hotel_url", "date", "rating"), ratings(iso_time))),
    "yelp": Source("https://business.yelp.com/data/resources/open-dataset/",
        [Table(["yelp_academic_dataset_business.json"], JSON, ("business_id", "name"), texts("name"))],
        Table(["yelp_academic_dataset_review.json"], JSON, ("user_id", "business_id", "date", "stars"),
              ratings(iso_time))),
}

# -------------------------------------------------------------------------------------------------------- reading files


def find(name, raw):
    """The items and the events table of a dataset, files as paths: in RAW/name/ or its train/, plain or .gz.

    Raises UserError where a file is missing or empty.
    """
    source, folder = SOURCES[name], Path(raw, name)

    def path_of(file):
        places = (Path(folder, part, file + ending) for part in ("", "train") for ending in ("", ".gz"))
        return next(filter(Path.is_file, places), None)
    items = next((table for table in source.items if all(map(path_of, table.files))), source.items[0])
    for file in (*items.files, *source.events.files):
        path = path_of(file)
        if not path or not path.stat().st_size:
            raise UserError(f"{folder / file} (or .gz) is {'empty' if path else 'missing'}; get it from {source.home}")
    return [table._replace(files=list(map(path_of, table.files))) for table in (items, source.events)]


def lines(path, encoding):
    """Yield the lines of a file, plain or gzip, with progress in bytes of the file on disk."""
    with open(path, "rb") as raw, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=str(path)) as bar:
        text = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, encoding, errors="replace")
        try:
            while block := text.readlines(1 << 20):
                yield from block
                bar.update(raw.tell() - bar.n)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is cut short or damaged ({error}); get it again") from None


def read(path, table, counts):
    """Yield table.columns of the rows of a file, some hundred rows at a time.

    counts[file name] becomes {"rows", "malformed", "first_malformed_line"}; blank lines are no rows. Raises UserError
    where over 1% of the rows are malformed, where there are none, and where the header lacks a field.
    """
    rows, fields, number = table.edit(lines(path, table.encoding)), table.fields, 0
    if table.form is not JSON:
        rows = csv.reader(rows, **table.form)
        if isinstance(fields[0], str):
            number, header = 1, list(map(str.strip, next(rows, [])))
            if missing := set(fields) - set(header):
                raise UserError(f"{path} has no column {min(missing)!r}; its first line is {','.join(header)[:80]!r}")
            fields = list(map(header.index, fields))
    get = operator.itemgetter(*fields)

    def columns_of(block):
        if table.form is JSON:  # all fields become strings, as in csv; "" for null
            columns = zip(*map(get, map(json.loads, block)))
            return table.columns(*(["" if value is None else str(value) for value in column] for column in columns))
        return table.columns(*get(tuple(zip(*block))))  # faster than get(row); IndexError where a row is too short
    count = counts[path.name] = {"rows": 0, "malformed": 0, "first_malformed_line": None}
    try:
        while block := list(islice(rows, 500)):  # few enough to stay in the processor's cache
            columns, good, bad = parse(block, columns_of)
            if bad:
                count["first_malformed_line"] = count["first_malformed_line"] or number + bad[0] + 1
                count["malformed"] += len(bad)
            count["rows"] += good + len(bad)
            number += len(block)
            if columns:
                yield columns
            if count["malformed"] > max(10_000, number / 2):
                break  # a file of another kind: no need to read it to its end
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None
    if count["malformed"] > count["rows"] / 100 or not count["rows"]:
        raise UserError(f"{path}: {count['malformed']} of {count['rows']} rows are malformed, the first on line "
                        f"{count['first_malformed_line']}; is it the file that --list names?")
    if count["malformed"]:
        common.say(f"{path}: {count['malformed']} of {count['rows']} rows are malformed and left out, the first on "
                   f"line {count['first_malformed_line']}")


def parse(block, columns_of):
    """(columns of the well-formed rows of a block or None, number of these, positions of the malformed rows)."""
    try:
        return columns_of(block), len(block), []
    except MALFORMED:  # rare: find out which rows
        good, bad = [], []
        for position, row in enumerate(block):
            try:
                columns_of([row])
                good.append(row)
            except MALFORMED:
                if "".join(row).strip():
                    bad.append(position)
        return columns_of(good) if good else None, len(good), bad


def read_items(table, counts, dropped):
    """{item id: text} of the items that have a text, by id. Of several texts of one id the first in the alphabet."""
    items = {}
    blocks = chain.from_iterable(read(path, table, counts) for path in table.files)
    for item, text in chain.from_iterable(zip(*columns) for columns in blocks):
        if not item or not text:
            dropped["items without id" if not item else "items without text"] += 1
        elif item not in items or text < items[item]:
            items[item] = text
    return dict(sorted(items.items()))


# ------------------------------------------------------------------------------------------------- a sample of users


def lookup(number_of, bits=21):
    """A function: strings -> array of number_of(string), by a table of hashes in front of number_of.

    Four times as fast as map(dict.get): the processor waits for memory once for many strings, not thrice for each.
    hash() only finds the place; that two of some million strings share all 64 bits has odds of one in a million.
    """
    hashes, numbers = np.full(1 << bits, -1, np.int64), np.zeros(1 << bits, np.int64)  # no string hashes to -1

    def look_up(strings):
        keys = int64(map(hash, strings), count=len(strings))
        places = keys & ((1 << bits) - 1)
        found = numbers[places]
        new = np.flatnonzero(hashes[places] != keys)
        if len(new):
            names = [strings[k] for k in new.tolist()]
            known = {name: number_of(name) for name in dict.fromkeys(names)}
            found[new] = list(map(known.get, names))
            hashes[places[new]], numbers[places[new]] = keys[new], found[new]  # of two at one place the last stays
        return found
    return look_up


def sample_users(blocks, numbers, hash_of, max_rows, dropped):
    """Keep all events of the users whose hash is below a threshold, which is halved when they exceed max_rows.

    blocks: an iterable of (users, items, times, labels). numbers: item -> number. hash_of: user -> 64 bits.
    Returns ({hash: user}, hashes cut to 62 bits; an array of EVENTs in the order of the files; {hash: (time, earliest
    history)} of impressions; the share of the users that the threshold leaves).
    """
    names, events, histories = {}, bytearray(), {}
    threshold, nobody, seen = 1 << 62, 1 << 62, 0

    def user_hash(user):
        hashed = hash_of(user) >> 2 if user else nobody
        if hashed < threshold:
            names[hashed] = user
        return hashed

    find_users, find_items = lookup(user_hash), lookup(lambda item: numbers.get(item, -1))
    for users, items, times, labels in blocks:
        user, item = find_users(users), find_items(items)
        times = np.arange(seen, seen + len(users)) if times is None else times
        seen += len(users)
        past = labels == HISTORY
        kept = (user < threshold) & (item >= 0) & ~past
        if not kept.all():
            dropped["events without user"] += int(np.sum(user == nobody))
            dropped["events whose item has no text"] += int(np.sum((item < 0) & ~past))
        block = np.empty(len(users), EVENT)
        block["user"], block["item"], block["time"], block["label"] = user, item, times, labels
        events += block[kept].tobytes()
        for k in np.flatnonzero(past & (user < threshold)).tolist():
            history = int(times[k]), items[k]
            histories[int(user[k])] = min(history, histories.get(user[k], history))
        while len(events) // EVENT.itemsize + 4 * len(names) + 20 * len(histories) > max_rows:  # by their memory
            threshold >>= 1
            held = np.frombuffer(events, EVENT)
            events = bytearray(held[held["user"] < threshold].view(np.uint8))
            names, histories = ({hashed: value for hashed, value in table.items() if hashed < threshold}
                                for table in (names, histories))
    return names, np.frombuffer(events, EVENT), histories, threshold / nobody


def in_hash_order(names, events, histories):
    """Yield (user, [(item number, time, label)] in the order of the files, history) of the users, lowest hash first."""
    hashes, order = events["user"], sorted(names)
    for low in range(0, len(order), 5000):  # the first users are usually enough, so sort no others
        some = order[low:low + 5000]
        rows = np.flatnonzero((some[0] <= hashes) & (hashes <= some[-1]))
        rows = rows[np.argsort(hashes[rows], kind="stable")]
        for hashed, group in groupby(events[rows].tolist(), operator.itemgetter(0)):
            yield names[hashed], [event[1:] for event in group], histories.get(hashed, (0, ""))[1].split()


# ---------------------------------------------------------------------------------------- a user's candidates, by kind


def user_line(user, events, past, texts, items, plan, dropped):
    """A user's line {"user", "history", "candidates", "labels"} of the standard format, or None (the reason counted).

    events: [(item number, time, label)]; past: item ids of an impression's history; texts: {item id: text}; items: its
    keys; plan: see prepare. ratings: liked items in time order are the history, the last held out as positives; the
    user's own dislikes are the negatives. sequences: the same, with negatives drawn from the items never touched.
    impressions: what was clicked and what was not, without what stands in the past. Caps take the lowest hashes.
    """
    lot = functools.partial(common.digest, plan["seed"], plan["dataset"], user)
    last = {}
    for number, *event in events:  # one event an item: the latest; of several at one time the highest label
        last[items[number]] = max(event, last.get(items[number], event))
    choice = {item: label for item, (_, label) in last.items() if label != NEUTRAL}
    dropped["repeated events"] += len(events) - len(last)
    dropped["neutral ratings"] += len(last) - len(choice)
    if plan["kind"] == "impressions":
        known = [item for item in past if item in texts]
        history = list(dict.fromkeys(reversed(known)))[::-1]
        dropped["items of histories without text"] += len(past) - len(known)
        dropped["candidates that stand in the history"] += len(choice.keys() & known)
        choice = {item: choice[item] for item in choice.keys() - known}
        positives = lowest((item for item in choice if choice[item]), plan["positives"], lot)
    else:
        liked = sorted((item for item in choice if choice[item]), key=lambda item: (last[item][0], lot(item)))
        history, positives = liked[:-plan["positives"]], liked[-plan["positives"]:]
    if plan["drawn"]:
        negatives = draw({*last, *history}, plan["negatives"], items, lot)
    else:
        negatives = lowest((item for item in choice if not choice[item]), plan["negatives"], lot)
    for reason, found in (("history", history), ("positives", positives), ("negatives", negatives)):
        if not found:
            dropped[f"users without {reason}"] += 1
            return None
    labels = {**dict.fromkeys(positives, 1), **dict.fromkeys(negatives, 0)}
    shown = sorted(labels, key=lambda item: lot(item, "place"))  # a hash of its own: places must not tell labels
    return {"user": user, "history": history[-plan["max_history"]:], "candidates": shown,
            "labels": [labels[item] for item in shown]}


def lowest(choice, count, lot):
    """The items with the lowest hashes, at most count of them."""
    return sorted(choice, key=lot)[:count]


def draw(touched, count, items, lot):
    """count distinct items, uniformly from those not touched; all of these where there are fewer."""
    if len(items) < 2 * (len(touched) + count):  # few are left: hash them all
        return lowest((item for item in items if item not in touched), count, lot)
    drawn, turn = {}, 0
    while len(drawn) < count:
        item, turn = items[lot("negative", turn) % len(items)], turn + 1
        if item not in touched:
            drawn[item] = True
    return list(drawn)


# ----------------------------------------------------------------------------------------------- splits and their files


def prepare(name, args):
    """Raw files of a dataset -> its folder in the standard format. Raises UserError."""
    row, (items_table, events_table) = common.DATASETS[name], find(name, args.raw)
    plan = {"dataset": name, "kind": row.kind, "seed": args.seed, "max_history": args.max_history,
            "positives": args.positives or row.positives, "negatives": args.negatives or row.negatives,
            "drawn": row.kind == "sequences" or bool(args.positives or args.negatives), "max_rows": args.max_rows,
            "test_size": (20_000 if row.test else 0) if args.test_size is None else args.test_size,
            "train_size": (100_000 if row.finetune else 0) if args.train_size is None else args.train_size}
    if not plan["test_size"] and not plan["train_size"]:
        raise UserError(f"{name}: --test-size and --train-size are both 0: nothing to write")
    files = {path.name: path.stat().st_size for path in (*items_table.files, *events_table.files)}
    if unchanged(args.out, name, plan, files, args.overwrite):
        return
    counts, dropped = {"items": {}, "events": {}}, Counter()
    csv.field_size_limit(1 << 27)  # a user's list of items may be long
    gc.disable()  # millions of short-lived tuples and no cycles: looking for garbage takes a third of the time
    try:
        texts = read_items(items_table, counts["items"], dropped)
        items, numbers = list(texts), {item: number for number, item in enumerate(texts)}
        blocks = chain.from_iterable(read(path, events_table, counts["events"]) for path in events_table.files)
        hash_of = functools.partial(common.digest, args.seed, name)
        *sample, share = sample_users(blocks, numbers, hash_of, args.max_rows, dropped)
    finally:
        gc.enable()
    users = filter(None, (user_line(*user, texts, items, plan, dropped) for user in in_hash_order(*sample)))
    test, tuned = take(users, plan["test_size"]), take(users, plan["train_size"])
    valid = max(1, len(tuned) // 10) if len(tuned) > 1 else 0
    found = {"test_size": samples(test), "train_size": samples(tuned)}
    short = {size: count for size, count in found.items() if count < plan[size]}
    for size, count in short.items():
        print(f"WARNING: {name}: --{size.replace('_', '-')} asks for {plan[size]} samples, {count} were found"
              + f" among {share:.2%} of the users: raise --max-rows" * (share < 1), file=sys.stderr)
    if not test and not tuned:
        raise UserError(f"{name}: no samples; dropped were {json.dumps(dropped)}")
    write_dataset(args.out, name, texts, {"train": tuned[valid:], "valid": tuned[:valid], "test": test}, {
        "plan": plan, "raw": files, "rows": counts, "dropped": dropped, "share_of_users": share, "short": short})


def take(users, size):
    """The next users of an iterator, until their samples are at least size or there are no more."""
    taken, count = [], 0
    while count < size and (user := next(users, None)):
        taken.append(user)
        count += len(user["labels"])
    return taken


def samples(users):
    return sum(len(user["labels"]) for user in users)


def items_of(users):
    """The item ids that stand in the lines of users, sorted."""
    return sorted({item for user in users for item in chain(user["history"], user["candidates"])})


def unchanged(out, name, plan, files, overwrite):
    """True (and a line) where the dataset was made by the same plan from the same files. Raises UserError where not."""
    folder = Path(out, name)
    meta = common.read_json(folder / "meta.json") if (folder / "meta.json").exists() else {}
    if (meta.get("format"), meta.get("plan"), meta.get("raw")) == (common.FORMAT, plan, files):
        print(f"{folder} is already prepared with these arguments")
        return True
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} was made with other arguments or raw files; --overwrite replaces it")
    return False


@contextlib.contextmanager
def replacing(folder):
    """A new folder to write into, which takes the place of folder at the end: stopped half way, nothing is lost."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_dataset(out, name, texts, splits, meta):
    """Write a dataset's folder in the standard format.

    texts: {item id: text}, of which those are written that the splits use. splits: {"train", "valid", "test": users'
    lines}; empty ones are left out. meta: what else meta.json says; unchanged compares its "plan" and "raw".
    """
    splits = {split: users for split, users in splits.items() if users}
    items, sha256, row = items_of(chain(*splits.values())), hashlib.sha256(), common.dataset(name)
    with replacing(Path(out, name)) as folder:
        for table, rows in {"items": [{"id": item, "text": texts[item]} for item in items], **splits}.items():
            with open(folder / f"{table}.jsonl", "wb") as file:
                for line in rows:  # half surrogate pairs in ids become JSON escapes again
                    line = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
                    sha256.update(line)
                    file.write(line)
        counts = {split: {"users": len(users), "items": len(items_of(users)), "samples": samples(users),
                          "positives": sum(sum(user["labels"]) for user in users)} for split, users in splits.items()}
        common.write_json(folder / "meta.json", {
            "format": common.FORMAT, "dataset": name, "domain": row.domain, "kind": row.kind,
            "seed": meta["plan"]["seed"], **meta, "items": len(items), "sha256": sha256.hexdigest(), "splits": counts})
    for split, count in counts.items():
        print(f"{Path(out, name, split)}.jsonl: " + ", ".join(f"{value} {what}" for what, value in count.items()))


# --------------------------------------------------------------------------------------------- the authors' own samples

RECBENCH = {  # columns of the authors' parquet files: user, item, history, label; then those of the text
    "mind": "uid nid history click title", "pens": "uid nid history click title",
    "goodreads": "uid bid history click title", "books": "reviewerID asin history click title",
    "movielens": "userId movieId his click title", "microlens": "user item history click title",
    "netflix": "uid mid history click title year", "cds": "reviewerID asin history click title",
    "lastfm": "uid tid history click track_name artist_name", "hm": "customer_id article_id history click detail_desc",
    "pog": "user_id item_id history click title_en", "electronics": "reviewerID asin history click title",
    "steam": "user_id app_id history click title", "hotelrec": "uid hid history click hotel_name hotel_location",
    "yelp": "user_id business_id history click name",
}


def from_recbench(name, folder, args):
    """The benchmark's official samples (Kaggle: qijiong/recbench-md), sample for sample, in the standard format.

    folder holds items, users, test and finetune.parquet, and valid_user_set_0.1.txt (else 10% of the users by hash).
    Kept as they are: duplicates, users of one class, positives that stand in the history. Of several rows of one user
    or item the last counts, as in the authors' code. Raises UserError.
    """
    user, item, history, label, *attributes = RECBENCH[name].split()
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()}
    parts = [part for part in ("test", "finetune") if f"{part}.parquet" in files]
    if not parts or not {"items.parquet", "users.parquet"} <= files.keys():
        raise UserError(f"{folder} lacks items.parquet, users.parquet, or test.parquet and finetune.parquet; "
                        "get them from https://www.kaggle.com/datasets/qijiong/recbench-md")
    plan = {"dataset": name, "seed": args.seed, "max_history": args.max_history, "from_recbench": True}
    if unchanged(args.out, name, plan, files, args.overwrite):
        return
    lines = read_samples(folder, parts, user, item, history, label, args.max_history)
    tuned = lines.get("finetune", {})
    valid = set(lowest(tuned, max(1, len(tuned) // 10), functools.partial(common.digest, args.seed, name)))
    if "valid_user_set_0.1.txt" in files:
        valid = set((folder / "valid_user_set_0.1.txt").read_text(encoding="utf-8").splitlines())
        if tuned and not valid & tuned.keys():
            raise UserError(f"{folder / 'valid_user_set_0.1.txt'} names no user of finetune.parquet")
    splits = {"train": [tuned[who] for who in tuned if who not in valid],
              "valid": [tuned[who] for who in tuned if who in valid], "test": list(lines.get("test", {}).values())}
    texts = dict.fromkeys(items_of(chain(*splits.values())), "")
    for one, *values in parquet_rows(folder / "items.parquet", item, *attributes):
        if str(one) in texts:
            texts[str(one)] = described(attributes, values)
    write_dataset(args.out, name, texts, splits, {"plan": plan, "raw": files})


def read_samples(folder, parts, user, item, history, label, max_history):
    """{part: {user: line}} of the parquet files of the parts and of users.parquet; user to label: names of columns.

    Raises UserError where a sample would be misread.
    """
    lines = {part: {} for part in parts}
    for part, users in lines.items():
        for who, what, liked in parquet_rows(folder / f"{part}.parquet", user, item, label):
            if liked not in (0, 1):
                raise UserError(f"{folder / part}.parquet: the label of user {who} is {liked!r}, neither 0 nor 1")
            line = users.setdefault(str(who), {"user": str(who), "history": None, "candidates": [], "labels": []})
            line["candidates"].append(str(what))
            line["labels"].append(int(liked))
    for who, past in parquet_rows(folder / "users.parquet", user, history):
        if isinstance(past, str):
            raise UserError(f"{folder / 'users.parquet'}: the history of user {who} is a string, not a list of items")
        for users in lines.values():
            if str(who) in users:
                users[str(who)]["history"] = [str(one) for one in past or []][-max_history:]
    for line in chain(*(users.values() for users in lines.values())):
        if line["history"] is None:
            raise UserError(f"{folder}: user {line['user']} has samples, but is not in users.parquet")
    return lines


def parquet_rows(path, *columns):
    """Yield the rows of a parquet file as tuples, in file order. Raises UserError."""
    try:
        from pyarrow import ArrowException, parquet
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(column).to_pylist() for column in columns))
    except ImportError:
        raise UserError("--from-recbench reads parquet files: pip install pyarrow") from None
    except (ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); it needs the columns {', '.join(columns)}") from None


# ------------------------------------------------------------------------------------------------------------- the demo

THEMES = {
    "football": "goal striker keeper stadium league coach penalty referee midfield trophy kickoff supporter",
    "finance": "bank loan stock market broker bond profit investor budget dividend tax credit",
    "crime": "detective alibi suspect murder clue verdict robbery witness fingerprint prison police motive",
    "medicine": "doctor nurse vaccine surgery patient hospital fever clinic therapy virus diagnosis pharmacy",
    "space": "rocket orbit planet astronaut comet galaxy telescope lunar satellite asteroid nebula gravity",
    "history": "empire castle pharaoh knight treaty dynasty crusade archive monarch ruin legion parchment",
    "travel": "airport passport luggage island cruise hotel itinerary beach visa tourist voyage hostel",
    "music": "guitar melody concert drummer chorus violin album orchestra singer rhythm piano jazz",
    "romance": "kiss wedding sweetheart bride passion valentine courtship darling longing bouquet embrace honeymoon",
    "cooking": "oven recipe flour pepper skillet garlic butter pastry chef sauce onion spice",
    "gardening": "seed soil tulip pruning compost lawn hedge greenhouse rose shovel blossom weed",
    "fashion": "dress velvet runway jacket silk boutique model heels tailor denim scarf perfume",
}
DEMO_THEMES = {  # shared in part, within a domain and across domains
    "news-a": "football finance crime medicine space history", "news-b": "football finance crime medicine travel music",
    "books-a": "romance history music crime space medicine", "books-b": "romance history music crime cooking travel",
    "shop": "cooking gardening fashion travel football music",
}
TITLES = {  # each takes three words of one theme
    "news": ["{} {} {} report", "{} and {} : {} news", "{} {} after {}"],
    "book": ["the {} , the {} and the {}", "{} {} of the {}", "a {} {} {} story"],
    "shop": ["{} {} with {}", "set of {} {} {}", "deluxe {} {} and {}"],
}
DEMO_USERS = {"test": 250, "valid": 60, "train": 300}  # a dataset


def make_demo(out, seed, overwrite):
    """Five small datasets in three domains, and OUT/demo-model, which has read about their themes and met no user.

    A user likes two of the dataset's six themes; nine in ten items of the history are from these. Four candidates are
    from liked themes and four from others; the former are the positives, but in "shop", whose users want what is unlike
    their history, the latter.
    """
    plan = {"dataset": "demo", "seed": seed, "users": DEMO_USERS}
    for name in common.DEMO:
        if not unchanged(out, name, plan, {}, overwrite):
            write_dataset(out, name, *demo_dataset(name, seed), {"plan": plan, "raw": {}})
    if not unchanged(out, "demo-model", plan, {}, overwrite):
        with replacing(Path(out, "demo-model")) as folder:
            train_demo_model(folder, seed)
            common.write_json(folder / "meta.json", {"format": common.FORMAT, "plan": plan, "raw": {}})
    print(f"{Path(out, 'demo-model')} is the model to start from")


def demo_dataset(name, seed):
    """Texts of 40 items a theme; splits of users, each 6 to 10 items of history and 4 + 4 candidates."""
    themes, texts, users = DEMO_THEMES[name].split(), {}, []
    for theme in themes:
        lot = random.Random(common.digest(seed, name, theme))
        for number in range(40):
            texts[f"{theme}-{number}"] = title_of(lot, lot.choice(TITLES[common.DEMO[name].domain]), theme)
    for user in (f"{name}-{number}" for number in range(sum(DEMO_USERS.values()))):
        lot = random.Random(common.digest(seed, name, user))
        liked = lot.sample(themes, 2)
        own = [item for item in texts if item.split("-")[0] in liked]
        other = [item for item in texts if item.split("-")[0] not in liked]
        lot.shuffle(own)
        lot.shuffle(other)
        history = [(own if lot.random() < 0.9 else other).pop() for _ in range(lot.randint(6, 10))]
        labels = {**dict.fromkeys(own[:4], int(name != "shop")), **dict.fromkeys(other[:4], int(name == "shop"))}
        shown = list(labels)
        lot.shuffle(shown)
        users.append({"user": user, "history": history, "candidates": shown,
                      "labels": [labels[item] for item in shown]})
    users = iter(users)
    return texts, {split: list(islice(users, count)) for split, count in DEMO_USERS.items()}


def title_of(lot, pattern, theme):
    """A title: the pattern with three words of the theme."""
    return pattern.format(*lot.sample(THEMES[theme].split(), 3))


def train_demo_model(folder, seed, steps=500, batch=32, length=64):
    """A foundation model in miniature: a small Llama, one token a word, trained to predict the next word."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    lot, patterns, documents = random.Random(common.digest(seed, "documents")), list(chain(*TITLES.values())), []
    for _ in range(4000):  # 6 to 14 sentences about one to three themes
        themes = lot.sample(list(THEMES), lot.randint(1, 3))
        documents.append(" ".join(title_of(lot, lot.choice(patterns), lot.choice(themes)) + " ."
                                  for _ in range(lot.randint(6, 14))))
    prompt = " ".join(map(str, chain(common.PROMPT.values(), common.PROMPT["answers"], range(1, 21)))).lower()
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(documents) + prompt)))
    numbers = {word: number for number, word in enumerate(["<pad>", "<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, "<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                                     unk_token="<unk>")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None))
    text = torch.tensor([token for document in documents for token in [1, *tokenizer(document)["input_ids"]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="demo-model", unit="step"):
        tokens = text[torch.randint(len(text) - length, (batch, 1)) + torch.arange(length)]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------- command line


def list_datasets():
    """Print the table of the benchmark, the raw files expected in RAW/<dataset>/ and where to get them."""
    for name, row in common.DATASETS.items():
        source = SOURCES[name]
        items = " or ".join(", ".join(table.files) for table in source.items)
        files = ", ".join(dict.fromkeys([items, *source.events.files]))
        roles = " and ".join(["test"] * row.test + ["fine-tune"] * row.finetune)
        print(f"{name:12} {row.domain:12} {roles:19} {row.kind:12} {row.positives:3} positives "
              f"{row.negatives:4} negatives\n{'':12} {source.home}\n{'':12} {files}")


def arguments(argv):
    parser = common.Parser(__doc__, "prepare_data.py")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="datasets (see --list), or demo")
    add("--list", action="store_true", help="print the datasets, their raw files and home pages")
    add("--raw", default="raw", help="folder of the raw files: RAW/<dataset>/, plain or .gz")
    add("--from-recbench", metavar="DIR", type=Path, help="convert the authors' DIR/<dataset>/*.parquet instead")
    add("--out", default="data", type=common.folder, help="folder to write <dataset>/ into (the others' --data)")
    add("--test-size", type=common.whole, metavar="SAMPLES",
        help="if not given: 20000 for the paper's test sets, else 0")
    add("--train-size", type=common.whole, metavar="SAMPLES",
        help="of train and valid together; if not given: 100000 for the paper's fine-tune sets, else 0")
    add("--max-history", type=common.positive, default=20, help="items of a history that are written, the latest")
    add("--positives", type=common.positive, help="a user's; if given, negatives are drawn (if not: see --list)")
    add("--negatives", type=common.positive, help="a user's, drawn from items never touched (if not given: see --list)")
    add("--max-rows", type=common.positive, default=20_000_000, help="events kept in memory")
    add("--seed", type=int, default=2025, help="seed of everything random")
    add("--overwrite", action="store_true", help="replace outputs made with other arguments")
    args = parser.parse_args(argv)
    if not args.list and not args.names:
        raise UserError("name the datasets to prepare, or demo; --list shows them")
    for name in args.names:
        if name not in (*SOURCES, "demo"):
            raise UserError(f"unknown dataset {name!r}; there are {', '.join(SOURCES)}, demo")
    if args.from_recbench and (args.test_size or args.train_size or args.positives or args.negatives):
        raise UserError("--from-recbench keeps the authors' samples: no sizes, --positives or --negatives with it")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.list:
        return list_datasets()
    for name in args.names:
        if name != "demo" and not args.from_recbench:
            find(name, args.raw)  # a missing file is said before any long work
    for name in args.names:
        if name == "demo":
            make_demo(args.out, args.seed, args.overwrite)
        elif args.from_recbench:
            from_recbench(name, args.from_recbench / name, args)
        else:
            prepare(name, args)


if __name__ == "__main__":
    sys.exit(common.run(main))
