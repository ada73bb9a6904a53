"""Raw files of the benchmark's fifteen datasets -> one standard format.

    python prepare_data.py --list                                  what there is, the raw files expected, where to get them
    python prepare_data.py movielens --raw raw --out data          reads raw/movielens/, writes data/movielens/
    python prepare_data.py mind hm steam --raw raw --out data      several, with the sizes of their role in the paper
    python prepare_data.py movielens --test-size 2000 --train-size 3000 --raw raw --out data
    python prepare_data.py yelp --positives 1 --negatives 99 --raw raw --out data      next-item ranking
    python prepare_data.py mind --from-recbench recbench-md --out data                 the authors' own samples
    python prepare_data.py demo --out data                         small made-up datasets, no download

Written per dataset: items.jsonl {"id", "text"}; train.jsonl, valid.jsonl and test.jsonl, one line a user {"user",
"history" (oldest first), "candidates", "labels" (1 liked, 0 not)}; meta.json (what was read, dropped and why; sha256).

Files of any size are read once, as a stream. Kept are all rows of the users whose hash is below a threshold; when they
exceed --max-rows the threshold is halved. Users are then taken in the order of their hashes, for test first, then for
valid and train: a uniform sample of users with complete histories, whatever the order of the rows. Every random choice
is a hash of (seed, dataset, user, item), so it is the same on every machine and for every --max-rows.
"""
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
import re
import shutil
import sys
import zlib
from array import array
from collections import Counter, namedtuple
from datetime import datetime, timezone
from itertools import chain, compress, islice, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError

NEUTRAL, HISTORY = -1, 2  # labels beside 0 and 1: a rating of 3; an impression's history (its item is the id list)
MALFORMED = (ValueError, IndexError, KeyError, TypeError, RecursionError, OverflowError)

# ------------------------------------------------------------------------------------- what one field or row says


def clean(text):
    """An item's text: white space collapsed, "" for null, half surrogate pairs (from JSON escapes) replaced."""
    return " ".join("" if text is None else str(text).encode("utf-8", "replace").decode().split())


def no_markup(title):
    """An Amazon title: entities resolved, tags removed. Some titles are the script of a page: left blank."""
    text = html.unescape(clean(title))
    text = re.sub(r"<(script|style)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)|</?[a-z!][^<>]*(>|$)", " ", text, flags=re.I)
    return "" if "getTime()" in text else clean(text)


def once_encoded(title):
    """A Steam title: UTF-8 that was read as latin-1 and encoded again, put right; the original where that fails."""
    try:
        return clean(title.encode("latin-1").decode("utf-8"))
    except UnicodeError:
        return clean(title)


def described(**parts):
    """"name: value, name: value", for texts of two attributes: without the second where it is blank, "" without the first."""
    parts = {name: clean(value) for name, value in parts.items()}
    return ", ".join(f"{name}: {value}" for name, value in parts.items() if value) if next(iter(parts.values())) else ""


def hotel(url):
    """The text of a TripAdvisor address "...-Reviews-NAME-PLACE.html", words joined by "_"."""
    name, place = url.split("-Reviews-", 1)[1].removesuffix(".html").replace("_", " ").rsplit("-", 1)
    return described(hotel_name=name, hotel_location=place)


def ident(value):
    """An id as a string; "" for null."""
    return "" if value is None else str(value).strip()


@functools.lru_cache(1 << 12)
def liking(rating):
    """1, 0 or NEUTRAL for a rating of 0 to 5 stars (above, below, exactly 3). ValueError for anything else."""
    stars = float(rating)
    if not 0 <= stars <= 5:
        raise ValueError(f"a rating of {rating}")
    return 1 if stars > 3 else 0 if stars < 3 else NEUTRAL


@functools.lru_cache(1 << 16)
def iso_time(text):
    """Seconds since 1970 of "2009-05-04", "2009-05-04 23:08:57" or "2009-05-04T23:08:57Z", in UTC where no zone is given."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


@functools.lru_cache(1 << 16)
def us_time(text):
    """Seconds since 1970 of "11/15/2019 10:22:32 AM" (MIND and PENS; strptime takes five times as long)."""
    date, clock, half = text.split()
    (month, day, year), (hour, minute, second) = map(int, date.split("/")), map(int, clock.split(":"))
    hour = hour % 12 + {"AM": 0, "PM": 12}[half]
    return int(datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc).timestamp())


MONTHS = {name: f"{number:02}" for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}


def goodreads_time(text):
    """Seconds since 1970 of "Fri Aug 25 13:55:02 -0700 2017"."""
    _, month, day, clock, zone, year = text.split()
    return iso_time(f"{year}-{MONTHS[month]}-{day}T{clock}{zone}")


# ------------------------------------------------- columns of a block of rows -> (ids, texts), or events: (users, items,
# times, labels). One of MALFORMED on the way says that a row is malformed. Times None: the order of the rows counts.


def idents(ids):
    return list(map(ident, ids))


def texts(of=clean):
    """Columns of ids and titles -> ids and texts."""
    return lambda ids, titles: (idents(ids), list(map(of, titles)))


def netflix_texts(rows):
    """id, year (or NULL), title, which may hold commas."""
    rows = [(row[0], ",".join(row[2:] or row[2]), row[1].replace("NULL", "")) for row in rows]
    return [ident(row[0]) for row in rows], [described(title=title, year=year) for _, title, year in rows]


def track_texts(ids, tracks, artists):
    return idents(ids), [described(track_name=track, artist_name=artist) for track, artist in zip(tracks, artists)]


def pog_texts(rows):
    """item, category, picture, title (Chinese), which may hold commas."""
    return [ident(row[0]) for row in rows], [clean(",".join(row[3:] or row[3])) for row in rows]


def ratings(time, ids=list):
    """Columns of users, items, times and stars -> events."""
    return lambda users, items, times, stars: (ids(users), ids(items), int64(map(time, times)), int8(map(liking, stars)))


def shelved(users, books, is_read, times):
    """Goodreads: a book on the shelf was read (1) or not (0)."""
    return idents(users), idents(books), int64(map(goodreads_time, times)), int8(map({True: 1, False: 0}.get, is_read))


def visits(time):
    """Columns of users, items and times -> events."""
    return lambda users, items, times: (users, items, int64(map(time, times)), int8(repeat(1, len(users))))


def lists(users, items):
    """Users, each with the list of their items in order -> events without times."""
    counts = list(map(len, items))
    return list(chain.from_iterable(map(repeat, users, counts))), list(chain.from_iterable(items)), None, \
        int8(repeat(1, sum(counts)))


def impressions(users, times, histories, shown):
    """Impressions -> the history as one event (its item is the text of the history) and the candidates, at time 0.

    shown: for each impression a list of (item, 0 or 1). At equal times 1 wins: what was clicked anywhere is clicked.
    """
    events = [event for user, time, history, candidates in zip(users, map(us_time, times), histories, shown)
              for event in [(user, history, time, HISTORY), *((user, item, 0, label) for item, label in candidates)]]
    users, items, times, labels = zip(*events)
    return users, items, int64(times), int8(labels)


def mind_impressions(users, times, histories, shown):
    """Candidates "N1-1 N2-0 ...": clicked (1) or not (0)."""
    click = {"1": 1, "0": 0}
    shown = [[(item, click[label]) for item, label in (entry.rsplit("-", 1) for entry in line.split())] for line in shown]
    return impressions(users, times, histories, shown)


def pens_impressions(users, histories, clicked, skipped, times):
    shown = [[(item, 1) for item in yes.split()] + [(item, 0) for item in no.split()] for yes, no in zip(clicked, skipped)]
    return impressions(users, times, histories, shown)


def int64(values):
    return np.fromiter(values, np.int64)


def int8(values):
    return np.fromiter(values, np.int8)


# --------------------------------------------------------------------------------------------- the fifteen raw formats

CSV, COMMA, TAB, JSON = {}, {"quoting": csv.QUOTE_NONE}, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, None

# A table: its files; the form of a row; the fields wanted (names in the header or in the JSON object; positions; () for
# the whole row); what makes columns of them. header: a first line to skip. prefix: Netflix's "MOVIE:" lines.
Table = namedtuple("Table", "files form fields columns header encoding prefix", defaults=(False, "utf-8-sig", False))
Source = namedtuple("Source", "home items events")  # items: tables to choose from, the first whose files are there


def amazon(category):
    return Source("https://nijianmo.github.io/amazon/",
                  [Table([f"meta_{category}.json"], JSON, ("asin", "title"), texts(no_markup))],
                  Table([f"{category}.json"], JSON, ("reviewerID", "asin", "unixReviewTime", "overall"), ratings(int, idents)))


SOURCES = {
    "mind": Source("https://msnews.github.io/",
                   [Table(["news.tsv"], TAB, (0, 3), texts())],
                   Table(["behaviors.tsv"], TAB, (1, 2, 3, 4), mind_impressions)),
    "pens": Source("https://msnews.github.io/pens.html",
                   [Table(["news.tsv"], TAB, (0, 3), texts(), header=True)],
                   Table(["train.tsv", "valid.tsv"], TAB, (0, 1, 4, 5, 6), pens_impressions, header=True)),
    "goodreads": Source("https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
                        [Table(["goodreads_book_works.json"], JSON, ("best_book_id", "original_title"), texts())],
                        Table(["goodreads_interactions_dedup.json"], JSON,
                              ("user_id", "book_id", "is_read", "date_added"), shelved)),
    "books": amazon("Books"),
    "movielens": Source("https://grouplens.org/datasets/movielens/",
                        [Table(["movies.csv"], CSV, ("movieId", "title"), texts())],
                        Table(["ratings.csv"], COMMA, ("userId", "movieId", "timestamp", "rating"), ratings(int))),
    "microlens": Source("https://github.com/westlake-repl/MicroLens",
                        [Table(["MicroLens-50k_titles.csv"], CSV, ("item", "title"), texts())],
                        Table(["MicroLens-50k_pairs.csv"], COMMA, ("user", "item", "timestamp"), visits(int))),
    "netflix": Source("https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data",
                      [Table(["movie_titles.csv"], COMMA, (), netflix_texts, encoding="latin-1")],
                      Table([f"combined_data_{part}.txt" for part in (1, 2, 3, 4)], COMMA, (1, 0, 3, 2), ratings(iso_time),
                            prefix=True)),
    "cds": amazon("CDs_and_Vinyl"),
    "lastfm": Source("http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
                     [Table(["userid-timestamp-artid-artname-traid-traname.tsv"], TAB, (4, 5, 3), track_texts)],
                     Table(["userid-timestamp-artid-artname-traid-traname.tsv"], TAB, (0, 4, 1), visits(iso_time))),
    "hm": Source("https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations",
                 [Table(["articles.csv"], CSV, ("article_id", "detail_desc"), texts())],
                 Table(["transactions_train.csv"], COMMA, ("customer_id", "article_id", "t_dat"), visits(iso_time))),
    "pog": Source("https://github.com/wenyuer/POG",
                  [Table(["pog_translated_titles.csv"], CSV, (0, 2), texts(), header=True),
                   Table(["item_data.txt"], COMMA, (), pog_texts)],
                  Table(["user_data.txt"], COMMA, (0, 1, 2),
                        lambda users, items, outfits: lists(users, [line.split(";") for line in items]))),
    "electronics": amazon("Electronics"),
    "steam": Source("https://github.com/YangLiangwei/SCGRec",
                    [Table(["App_ID_Info.txt"], CSV, (0, 1), texts(once_encoded))],
                    Table(["train_game.txt"], COMMA, (),
                          lambda rows: lists([row[0] for row in rows], [row[1:] or row[1] for row in rows]))),
    "hotelrec": Source("https://github.com/Diego999/HotelRec",
                       [Table(["HotelRec.txt"], JSON, ("hotel_url", "author"),
                              lambda urls, authors: (idents(urls), list(map(hotel, urls))))],
                       Table(["HotelRec.txt"], JSON, ("author", "hotel_url", "date", "rating"), ratings(iso_time, idents))),
    "yelp": Source("https://business.yelp.com/data/resources/open-dataset/",
                   [Table(["yelp_academic_dataset_business.json"], JSON, ("business_id", "name"), texts())],
                   Table(["yelp_academic_dataset_review.json"], JSON, ("user_id", "business_id", "date", "stars"),
                         ratings(iso_time, idents))),
}


# -------------------------------------------------------------------------------------------------------- reading files


def find(folder, name, home):
    """The path of a raw file: in the folder or its train/ (MIND), plain or .gz. Raises UserError with the home page."""
    for path in (folder / name, folder / f"{name}.gz", folder / "train" / name, folder / "train" / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder / name} (or .gz) is missing; get it from {home}")


def raw_files(name, raw):
    """The tables of a dataset with the paths of their files: [(items table, paths), (events table, paths)].

    Raises UserError where a file is missing or empty.
    """
    source, folder = SOURCES[name], Path(raw, name)
    for choice, items in enumerate(source.items, 1):
        try:
            found = [(table, [find(folder, file, source.home) for file in table.files]) for table in (items, source.events)]
            break
        except UserError:
            if choice == len(source.items):
                raise
    for path in chain(*(paths for _, paths in found)):
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; get it from {source.home}")
    return found


def lines(path, encoding):
    """Yield the lines of a file, plain or gzip, with progress in bytes of the file on disk."""
    with open(path, "rb") as raw, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=str(path)) as bar:
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            text = io.TextIOWrapper(file, encoding=encoding, errors="replace")
            while block := text.readlines(1 << 20):
                yield from block
                bar.update(raw.tell() - bar.n)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is cut short or damaged ({error}); get it again") from None


def netflix_lines(lines):
    """Lines "user,rating,date" under a line "MOVIE:" -> lines "MOVIE,user,rating,date", and blanks for the others."""
    movie = ""
    for line in lines:
        head = line.strip()
        if head.endswith(":"):
            movie, line = head[:-1], "\n"
        yield f"{movie},{line}" if line.strip() else line


def read(path, table, counts):
    """Yield columns (what table.columns makes of them) of the rows of a file, some hundred rows at a time.

    counts[file name] becomes {"rows", "malformed", "first_malformed_line"}; blank lines are no rows. Raises UserError
    where over 1% of the rows are malformed, where there are none, and where the header lacks a field.
    """
    rows = lines(path, table.encoding)
    if table.prefix:
        rows = netflix_lines(rows)
    if table.form is not None:
        rows = csv.reader(rows, **table.form)
    count = counts[path.name] = {"rows": 0, "malformed": 0, "first_malformed_line": None}
    try:
        cells, number = cells_of(path, table, rows)
        while block := list(islice(rows, 500)):  # few enough to stay in the processor's cache
            columns, bad, blank = parse(block, cells, table.columns)
            if bad and not count["malformed"]:
                count["first_malformed_line"] = number + bad[0] + 1
            count["malformed"] += len(bad)
            count["rows"] += len(block) - blank
            number += len(block)
            if columns:
                yield columns
            if count["malformed"] > max(10_000, number / 2):
                break  # a file of another kind: no need to read it to its end
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None
    if count["malformed"] > count["rows"] / 100:
        raise UserError(f"{path}: {count['malformed']} of {count['rows']} rows are malformed, the first on line "
                        f"{count['first_malformed_line']}; is it the file that --list names?")
    if not count["rows"]:
        raise UserError(f"{path} holds no rows")


def cells_of(path, table, rows):
    """(row -> tuple of the wanted fields, lines read: 1 for a header, else 0)."""
    if table.form is JSON:
        get = operator.itemgetter(*table.fields)
        return lambda line: get(json.loads(line)), 0
    fields = table.fields
    named = bool(fields) and isinstance(fields[0], str)
    header = [cell.strip() for cell in next(rows, [])] if named or table.header else []
    if named:
        if missing := [field for field in fields if field not in header]:
            raise UserError(f"{path} has no column {missing[0]!r}; its first line is {','.join(header)[:80]!r}")
        fields = [header.index(field) for field in fields]
    return operator.itemgetter(*fields) if fields else lambda row: (row,), int(named or table.header)


def parse(block, cells, columns):
    """(columns of the well-formed rows of a block or None, positions of the malformed rows, number of blank lines)."""
    try:
        return columns(*zip(*map(cells, block))), [], 0
    except MALFORMED:  # rare: find out which rows
        good, bad, blank = [], [], 0
        for position, row in enumerate(block):
            try:
                columns(*zip(cells(row)))
                good.append(row)
            except MALFORMED:
                bad, blank = (bad + [position], blank) if "".join(row).strip() else (bad, blank + 1)
        return columns(*zip(*map(cells, good))) if good else None, bad, blank


def read_items(table, paths, counts, dropped):
    """(ids in their own order, texts) of the items with a text. Of several texts of one id the first in the alphabet."""
    items = {}
    for item, text in chain.from_iterable(zip(*columns) for path in paths for columns in read(path, table, counts)):
        if not item or not text:
            dropped["items without id" if not item else "items without text"] += 1
        elif item not in items or text < items[item]:
            items[item] = text
    ids = sorted(items)
    return ids, [items[item] for item in ids]


# ------------------------------------------------------------------------------------------------- a sample of users

Sample = namedtuple("Sample", "users hashes columns histories halvings")


def sample_users(blocks, numbers, hash_of, max_rows, dropped):
    """Read all events once and keep those of the users whose hash is below a threshold: all of them, in bounded memory.

    blocks: an iterable of (users, items, times, labels). numbers: {item id: number}. hash_of: user -> 64 bits. When the
    kept rows exceed max_rows, the threshold is halved (a user counts as four rows, for the weight of the name). Returns a Sample:
    names and hashes of the users, columns (user, item, time, label) of the kept events in the order of the files, for
    impressions {user: (time, earliest history)}, and how often the threshold was halved.
    """
    users, hashes, histories, threshold, held, position = {}, array("Q"), {}, 1 << 64, 0, 0
    columns = [array("i"), array("i"), array("q"), array("b")]  # 17 bytes an event
    hash_of = functools.lru_cache(1 << 18)(hash_of)  # for the users that are not kept
    for names, items, times, labels in blocks:
        user = np.fromiter(map(users.get, names, repeat(-1)), np.int32, len(names))
        for place in np.flatnonzero(user < 0).tolist():
            name = names[place]
            if not name:
                dropped["events without user"] += 1
            elif name in users:
                user[place] = users[name]
            elif hash_of(name) < threshold:
                user[place] = users[name] = len(users)
                hashes.append(hash_of(name))
        if times is None:
            times = np.arange(position, position + len(names))
        position += len(names)
        item = np.fromiter(map(numbers.get, items, repeat(-1)), np.int32, len(names))
        for place in np.flatnonzero(labels == HISTORY).tolist():
            if user[place] >= 0:
                held += remember(histories, names[place], int(times[place]), items[place])
        dropped["events whose item is not in the item file"] += int(np.sum((item < 0) & (labels != HISTORY)))
        kept = (user >= 0) & (item >= 0) & (labels != HISTORY)
        for column, values in zip(columns, (user, item, times, labels)):
            column.frombytes(values[kept].tobytes())
        while len(columns[0]) + held + 4 * len(users) > max_rows:
            threshold >>= 1
            users, hashes, columns, histories = evict(users, hashes, columns, histories, threshold)
            held = sum(text.count(" ") + 1 for _, text in histories.values())
    halvings = 65 - threshold.bit_length()
    return Sample(list(users), np.asarray(hashes), [np.asarray(column) for column in columns], histories, halvings)


def remember(histories, user, time, text):
    """Keep the earliest history of a user (at equal times the first in the alphabet); returns the items held more."""
    before = histories.get(user)
    if before and before <= (time, text):
        return 0
    histories[user] = time, text
    return text.count(" ") - before[1].count(" ") if before else text.count(" ") + 1


def evict(users, hashes, columns, histories, threshold):
    """Users, hashes, columns and histories of the users whose hash is below the threshold, numbered anew."""
    stays = np.asarray(hashes) < np.uint64(threshold)
    rows = stays[np.asarray(columns[0])]
    number = np.cumsum(stays, dtype=np.int32) - 1
    users = {name: number for number, name in enumerate(compress(users, stays))}
    columns = [array(column.typecode, np.asarray(column)[rows].tobytes()) for column in columns]
    columns[0] = array("i", number[np.asarray(columns[0])].tobytes())
    return (users, array("Q", np.asarray(hashes)[stays].tobytes()), columns,
            {name: history for name, history in histories.items() if name in users})


def in_hash_order(sample):
    """Yield (user, [(item number, time, label)] in the order of the files, history) of each user, lowest hash first."""
    users, items, times, labels = sample.columns
    order = np.argsort(users, kind="stable")
    ends = np.cumsum(np.bincount(users, minlength=len(sample.users)))
    for number in np.argsort(sample.hashes, kind="stable").tolist():
        rows = order[ends[number - 1] if number else 0:ends[number]]
        name = sample.users[number]
        yield name, list(zip(items[rows].tolist(), times[rows].tolist(), labels[rows].tolist())), \
            sample.histories.get(name, (0, ""))[1].split()


# ---------------------------------------------------------------------------------------- a user's candidates, by kind


def user_line(user, events, past, ids, plan, dropped):
    """A user's line {"user", "history", "candidates", "labels"} of the standard format, or None (the reason counted).

    events: [(item number, time, label)]; past: item numbers of an impression's history; ids: number -> item id; plan:
    see prepare. ratings: liked items in time order are the history, the last ones held out as positives; the user's own
    dislikes are the negatives. sequences: the same, with negatives drawn from the items that the user never touched.
    impressions: what was clicked and what was not, without what stands in the past. Caps take the lowest hashes.
    """
    lot = functools.partial(common.digest, plan["seed"], plan["dataset"], user)
    last = {}
    for item, time, label in events:  # one event an item: the latest; of several at one time the highest label
        if item not in last or (time, label) > last[item]:
            last[item] = time, label
    dropped["repeated events"] += len(events) - len(last)
    dropped["neutral ratings"] += sum(label == NEUTRAL for _, label in last.values())
    if plan["kind"] == "impressions":
        history = list(dict.fromkeys(reversed(past)))[::-1]
        dropped["candidates that stand in the history"] += len(last.keys() & set(history))
        choice = {item: label for item, (_, label) in last.items() if item not in set(history)}
        positives = lowest([item for item in choice if choice[item] == 1], plan["positives"], ids, lot)
    else:
        choice = {item: label for item, (_, label) in last.items()}
        liked = in_time_order({item: time for item, (time, label) in last.items() if label == 1}, ids, lot)
        history, positives = liked[:-plan["positives"]], liked[-plan["positives"]:]
    if plan["drawn"]:
        negatives = draw({*last, *history}, plan["negatives"], ids, lot)
    else:
        negatives = lowest([item for item in choice if choice[item] == 0], plan["negatives"], ids, lot)
    for reason, items in (("history", history), ("positives", positives), ("negatives", negatives)):
        if not items:
            dropped[f"users without {reason}"] += 1
            return None
    labels = {**dict.fromkeys(positives, 1), **dict.fromkeys(negatives, 0)}
    shown = sorted(labels, key=lambda item: lot(ids[item], "place"))  # a hash of its own: the order must not tell labels
    return {"user": user, "history": [ids[item] for item in history[-plan["max_history"]:]],
            "candidates": [ids[item] for item in shown], "labels": [labels[item] for item in shown]}


def lowest(items, count, ids, lot):
    """The items with the lowest hashes, at most count of them."""
    return sorted(items, key=lambda item: lot(ids[item]))[:count]


def in_time_order(times, ids, lot):
    """The items of {item: time} by (time, hash): ties favour neither newer ids nor later rows."""
    shared = {time for time, count in Counter(times.values()).items() if count > 1}
    return sorted(times, key=lambda item: (times[item], lot(ids[item]) if times[item] in shared else 0))


def draw(touched, count, ids, lot):
    """Distinct items, uniformly from those not touched: count of them, or all where there are fewer."""
    if len(ids) < 2 * (len(touched) + count):  # few are left: hash them all
        return lowest([item for item in range(len(ids)) if item not in touched], count, ids, lot)
    drawn, turn = {}, 0
    while len(drawn) < count:
        item = lot("negative", turn) % len(ids)
        turn += 1
        if item not in touched:
            drawn[item] = True
    return list(drawn)


# ------------------------------------------------------------------------------------------------ splits and their files


def prepare(name, raw, out, args):
    """Raw files of a dataset -> its folder in the standard format. Returns nothing; raises UserError."""
    row, tables = common.DATASETS[name], raw_files(name, raw)
    drawn = args.positives is not None or args.negatives is not None
    plan = {"dataset": name, "kind": row.kind, "seed": args.seed, "max_history": args.max_history,
            "positives": row.positives if args.positives is None else args.positives,
            "negatives": row.negatives if args.negatives is None else args.negatives,
            "drawn": drawn or row.kind == "sequences", "max_rows": args.max_rows,
            "test_size": (20_000 if row.test else 0) if args.test_size is None else args.test_size,
            "train_size": (100_000 if row.finetune else 0) if args.train_size is None else args.train_size}
    files = {path.name: path.stat().st_size for _, paths in tables for path in paths}
    if unchanged(out, name, plan, files, args.overwrite):
        return
    counts, dropped = {"items": {}, "events": {}}, Counter()
    (items_table, items_paths), (events_table, events_paths) = tables
    ids, texts = read_items(items_table, items_paths, counts["items"], dropped)
    numbers = {item: number for number, item in enumerate(ids)}
    blocks = chain.from_iterable(read(path, events_table, counts["events"]) for path in events_paths)
    sample = sample_users(blocks, numbers, functools.partial(common.digest, args.seed, name), args.max_rows, dropped)
    found = (user_line(user, events, known(past, numbers, dropped), ids, plan, dropped)
             for user, events, past in in_hash_order(sample))
    found = filter(None, found)
    splits, short = {"test": take(found, plan["test_size"])}, {}
    tuned = take(found, plan["train_size"])
    valid = max(1, len(tuned) // 10) if len(tuned) > 1 else 0
    splits |= {"valid": tuned[:valid], "train": tuned[valid:]}
    for flag, got in (("test_size", splits["test"]), ("train_size", tuned)):
        samples = sum(len(user["labels"]) for user in got)
        if samples < plan[flag]:
            short[flag] = samples
            print(f"WARNING: {name}: {plan[flag]} samples were asked for (--{flag.replace('_', '-')}), {samples} found"
                  + f"; raise --max-rows, which left {2 ** -sample.halvings:.2%} of the users" * bool(sample.halvings),
                  file=sys.stderr)
    if not any(splits.values()):
        raise UserError(f"{name}: no user qualifies in {', '.join(map(str, events_paths))}; dropped: {dict(dropped)}")
    write_dataset(out, name, {item: texts[numbers[item]] for item in used(splits)}, splits, {
        "domain": row.domain, "kind": row.kind, "seed": args.seed, "plan": plan, "raw": files, "rows": counts,
        "dropped": dict(dropped), "users_kept": 2 ** -sample.halvings, "short": short})


def known(past, numbers, dropped):
    """Item numbers of the ids that the item file has."""
    dropped["history entries whose item is not in the item file"] += sum(item not in numbers for item in past)
    return [numbers[item] for item in past if item in numbers]


def take(users, size):
    """The next users of an iterator, until their samples are at least size (or there are no more)."""
    taken, samples = [], 0
    while samples < size and (user := next(users, None)):
        taken.append(user)
        samples += len(user["labels"])
    return taken


def used(splits):
    """The item ids that stand in the splits, sorted."""
    return sorted({item for users in splits.values() for user in users for item in chain(user["history"], user["candidates"])})


def unchanged(out, name, plan, files, overwrite):
    """True (and a line) where the folder was made from the same plan and raw files. Raises UserError where from others."""
    folder = Path(out, name)
    if not folder.exists():
        return False
    try:
        meta = common.read_json(folder / "meta.json")
    except UserError:
        meta = {}
    if (meta.get("format"), meta.get("plan"), meta.get("raw")) == (common.FORMAT, plan, files):
        print(f"{folder} is already prepared with these arguments; nothing to do")
        return True
    if not overwrite:
        before = meta.get("plan") or {}
        other = [f"{key} {before.get(key)}, now {plan[key]}" for key in plan if before.get(key) != plan[key]]
        raise UserError(f"{folder} was prepared with other arguments or raw files ({'; '.join(other) or 'raw files differ'}); "
                        "--overwrite replaces it")
    return False


def write_dataset(out, name, items, splits, meta):
    """Write a dataset's folder in the standard format, under a temporary name that is renamed at the end.

    items: {id: text}, of which those are written that the splits use. splits: {"train", "valid", "test": list of
    {"user", "history", "candidates", "labels"}}, of which the empty ones are left out. meta: what else meta.json says.
    """
    folder, new, old = Path(out, name), Path(out, f".{name}.new"), Path(out, f".{name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    splits = {split: splits[split] for split in ("train", "valid", "test") if splits.get(split)}
    tables = {"items": [{"id": item, "text": items[item]} for item in used(splits)], **splits}
    sha256 = hashlib.sha256()
    for table, rows in tables.items():
        sha256.update(f"{table}\n".encode())
        with open(new / f"{table}.jsonl", "wb") as file:
            for row in rows:  # half surrogate pairs in ids stay what they are: JSON escapes
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
                sha256.update(line)
                file.write(line)
    meta = {"format": common.FORMAT, "dataset": name, **meta, "items": len(tables["items"]), "splits": {
        split: {"users": len(users), "items": len(used({split: users})),
                "samples": sum(len(user["labels"]) for user in users), "positives": sum(sum(user["labels"]) for user in users)}
        for split, users in splits.items()}, "sha256": sha256.hexdigest()}
    common.write_json(new / "meta.json", meta)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
    for split, row in meta["splits"].items():
        print(f"{folder}/{split}.jsonl: {row['users']} users, {row['items']} items, {row['samples']} samples, "
              f"{row['positives']} positives")


# ------------------------------------------------------------------------------------------- the authors' own samples

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


def from_recbench(name, folder, out, args):
    """The benchmark's official samples (Kaggle: qijiong/recbench-md), sample for sample, in the standard format.

    folder holds items, users, test and finetune.parquet, and valid_user_set_0.1.txt (else 10% of the users by hash).
    Kept as they are: duplicates, users of one class, positives that stand in the history. Where a user or an item has
    several rows the last one counts, as in the authors' code. Raises UserError.
    """
    user, item, history, label, *attributes = RECBENCH[name].split()
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*")) if path.is_file()}
    if not {"items.parquet", "users.parquet"} <= files.keys() or not {"test.parquet", "finetune.parquet"} & files.keys():
        raise UserError(f"{folder} lacks items.parquet, users.parquet, or both test.parquet and finetune.parquet; "
                        "get it from https://www.kaggle.com/datasets/qijiong/recbench-md")
    plan = {"dataset": name, "from_recbench": True, "seed": args.seed, "max_history": args.max_history}
    if unchanged(out, name, plan, files, args.overwrite):
        return
    splits = {split: {} for split in ("test", "finetune")}
    for split, users in splits.items():
        if f"{split}.parquet" in files:
            for who, what, liked in parquet_rows(folder, split, (user, item, label)):
                line = users.setdefault(ident(who), {"user": ident(who), "history": None, "candidates": [], "labels": []})
                line["candidates"].append(ident(what))
                line["labels"].append(int(liked))
    for who, past in parquet_rows(folder, "users", (user, history)):
        for users in splits.values():
            if ident(who) in users:
                users[ident(who)]["history"] = [ident(one) for one in ([] if past is None else past)][-args.max_history:]
    tuned = splits.pop("finetune")
    if "valid_user_set_0.1.txt" in files:
        valid = set(Path(folder, "valid_user_set_0.1.txt").read_text(encoding="utf-8").split("\n"))
    else:
        valid = sorted(tuned, key=lambda who: common.digest(args.seed, name, who))
        valid = set(valid[:max(1, len(valid) // 10) if len(valid) > 1 else 0])
    splits = {"test": list(splits["test"].values()), "valid": [tuned[who] for who in tuned if who in valid],
              "train": [tuned[who] for who in tuned if who not in valid]}
    for line in chain(*splits.values()):
        if line["history"] is None:
            raise UserError(f"{folder}: user {line['user']} has samples and is not in users.parquet")
    items = dict.fromkeys(used(splits), "")
    for one, *values in parquet_rows(folder, "items", (item, *attributes)):
        if ident(one) in items:
            parts = {key: clean(value) for key, value in zip(attributes, values)}
            items[ident(one)] = ", ".join(f"{key}: {value}" for key, value in parts.items() if value) if len(parts) > 1 \
                else parts[attributes[0]]
    row = common.DATASETS[name]
    write_dataset(out, name, items, splits, {"domain": row.domain, "kind": row.kind, "seed": args.seed, "plan": plan,
                                             "raw": files})


def parquet_rows(folder, name, columns):
    """Yield the rows of a parquet file as tuples of the columns, in file order. Raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--from-recbench reads parquet files: pip install pyarrow") from None
    path = Path(folder, f"{name}.parquet")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(column).to_pylist() for column in columns))
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); it needs the columns {', '.join(columns)}") from None


# ------------------------------------------------------------------------------------------------------------- the demo


def make_demo(out, seed, overwrite):
    raise UserError("the demo is not built yet")


# ------------------------------------------------------------------------------------------------------ command line


def list_datasets():
    """Print the table of the benchmark, with the raw files expected under RAW/<dataset>/ and where to get them."""
    print(f"{'dataset':12} {'domain':12} {'test':5} {'tune':5} {'kind':12} {'pos':>4} {'neg':>4}  raw files; home page")
    for name, row in common.DATASETS.items():
        source = SOURCES[name]
        files = dict.fromkeys(chain(*(table.files for table in (*source.items, source.events))))
        print(f"{name:12} {row.domain:12} {'yes' if row.test else 'no':5} {'yes' if row.finetune else 'no':5} {row.kind:12} "
              f"{row.positives:4} {row.negatives:4}  {', '.join(files)}; {source.home}")


def at_least(least):
    """An argparse type: an integer not below least."""
    def integer(text):
        if int(text) < least:
            raise ValueError
        return int(text)
    return integer


def main(argv=None):
    """Run the command line. Returns the exit code; raises UserError."""
    parser = common.Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="datasets (see --list), or demo")
    parser.add_argument("--list", action="store_true", help="print the datasets, their raw files and home pages")
    parser.add_argument("--raw", default="raw", help="folder of the raw files: RAW/<dataset>/, plain or .gz")
    parser.add_argument("--from-recbench", metavar="DIR", help="convert the authors' parquet files DIR/<dataset>/ instead")
    parser.add_argument("--out", default="data", help="folder to write <dataset>/ into (the other scripts' --data)")
    parser.add_argument("--test-size", type=at_least(0), help="test samples (default: 20000 for test sets, else 0)")
    parser.add_argument("--train-size", type=at_least(0), help="samples of train and valid (100000 for fine-tune sets, else 0)")
    parser.add_argument("--max-history", type=at_least(1), default=20, help="latest items written of a history")
    parser.add_argument("--positives", type=at_least(1), help="positives a user; negatives are then drawn, see --negatives")
    parser.add_argument("--negatives", type=at_least(1), help="negatives a user, drawn from the items never touched")
    parser.add_argument("--max-rows", type=at_least(1), default=20_000_000, help="rows kept in memory")
    parser.add_argument("--seed", type=int, default=2025, help="of the choice of users, candidates and ties")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared with other arguments")
    args = parser.parse_args(argv)
    if args.list:
        return list_datasets()
    if not args.names:
        raise UserError("name the datasets to prepare, or demo; --list shows them")
    names = list(dict.fromkeys(args.names))
    for name in names:  # before any long work
        if name not in SOURCES and name != "demo":
            raise UserError(f"unknown dataset {name!r}; there are {', '.join(SOURCES)}, demo")
        if name != "demo" and not args.from_recbench:
            raw_files(name, args.raw)
    csv.field_size_limit(1 << 27)  # a user's list of items may be long
    gc.disable()  # a few million short-lived tuples and no cycles: collecting garbage takes a third of the time
    for name in names:
        if name == "demo":
            make_demo(args.out, args.seed, args.overwrite)
        elif args.from_recbench:
            from_recbench(name, Path(args.from_recbench, name), args.out, args)
        else:
            prepare(name, args.raw, args.out, args)


if __name__ == "__main__":
    sys.exit(common.run(main))
