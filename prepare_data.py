"""Raw files of the benchmark's fifteen datasets -> one standard format.

    python prepare_data.py --list                                  the datasets, their raw files, where to get them
    python prepare_data.py movielens --raw raw --out data          reads raw/movielens/, writes data/movielens/
    python prepare_data.py mind hm steam --raw raw --out data      several, each with the sizes of its role in the paper
    python prepare_data.py movielens --test-size 2000 --train-size 3000 --raw raw --out data
    python prepare_data.py yelp --positives 1 --negatives 99 --raw raw --out data      next-item ranking
    python prepare_data.py mind --from-recbench recbench-md --out data                 the authors' own samples
    python prepare_data.py demo --out data                         small made-up datasets, no download

Written per dataset: items.jsonl {"id", "text"[, "first": seconds since 1970, the item's first event in the raw data]};
train.jsonl, valid.jsonl and test.jsonl, one line per user {"user", "history" (oldest first), "candidates", "labels" (1
liked, 0 not)}; meta.json (the job, rows read, malformed, dropped and why). Unusable rows are counted over whole files,
unusable users and candidates among those users that were examined to reach the sizes.

In reading order: what is to be made, and is it there; what a field says; the raw formats; reading their rows; a uniform
sample of users with complete histories, in bounded memory; a user's history and candidates, by kind of dataset; splits
and their files; the authors' own samples; the demo.
Every random choice is a hash of (seed, dataset, user, item): the same on every machine.
"""
import calendar
import csv
import functools
import gzip
import html
import json
import os
import random
import re
import shutil
import sys
import zlib
from array import array
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import common
from common import UserError


def arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="datasets (see --list), or demo")
    add("--list", action="store_true", help="print the datasets, their raw files and home pages")
    add("--raw", default="raw", help="folder of the raw files: RAW/<dataset>/, plain or .gz (default: %(default)s)")
    add("--from-recbench", metavar="DIR", type=Path, help="convert the authors' DIR/<dataset>/*.parquet instead")
    add("--out", default="data", help="folder to write <dataset>/ into (default: %(default)s)")
    add("--test-size", type=int, metavar="SAMPLES", help="default: 20000 for the paper's test sets, else 0")
    add("--train-size", type=int, metavar="SAMPLES",
        help="of train and valid together; default: 100000 for the paper's fine-tune sets, else 0")
    add("--max-history", type=common.positive_int, default=20,
        help="latest items of a history to keep (default: %(default)s)")
    add("--positives", type=common.positive_int,
        help="positives per user; if given, negatives are drawn at random (default: see --list)")
    add("--negatives", type=common.positive_int,
        help="negatives per user, drawn from items never touched (default: see --list)")
    add("--max-rows", type=common.positive_int, default=20_000_000,
        help="events kept in memory (default: %(default)s)")
    add("--seed", type=int, default=2025, help="seed of everything random (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace outputs made with other arguments")
    args = parser.parse_args(argv)
    unknown = set(args.names) - {*SOURCES, "demo"}
    if unknown:
        parser.error(f"unknown dataset {', '.join(unknown)}; there are {', '.join(SOURCES)}, demo")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.list or not args.names:
        list_datasets()
        return
    names = []
    for name in args.names:
        names += [*common.DEMO, "demo-model"] if name == "demo" else [name]
    to_do = []  # what is missing or in the way is reported before any long work
    for name in names:
        folder = Path(args.out, name)
        job, paths = plan(name, args)
        if not is_prepared(folder, job, args.overwrite):
            to_do.append((folder, job, paths))
    for folder, job, paths in to_do:
        prepare(folder, job, paths, args.overwrite)


def list_datasets():
    """Print the table of the benchmark, the raw files expected in RAW/<dataset>/ and where to get them."""
    for name, row in common.DATASETS.items():
        source = SOURCES[name]
        item_files = " or ".join(table.files for table in source.items)
        print(f"{name}: {row}\n  {source.home}\n  items: {item_files}\n  events: {source.events.files}")


# ---------------------------------------------------------------------------------------- what to make, and is it there


def plan(name, args):
    """(the job: what the dataset is made of; the paths of its raw files, {name: path}).

    A raw file counts by its size and its time of modification: hashes of 50 GB would take longer than reading them.
    Raises UserError where files are missing.
    """
    job = {"dataset": name, "seed": args.seed}
    if name not in SOURCES:  # of the demo
        return {**job, "users": DEMO_USERS}, {}
    job["max_history"] = args.max_history
    if args.from_recbench:
        paths = find_recbench(args.from_recbench / name)
        job["from_recbench"] = True
    else:
        paths = find_raw(name, args.raw)
        row = common.DATASETS[name]
        job.update(
            kind=row.kind,
            positives=args.positives or row.positives,
            negatives=args.negatives or row.negatives,
            next_item=bool(args.positives or args.negatives),
            max_rows=args.max_rows,
            test_size=20_000 if row.test else 0,
            train_size=100_000 if row.finetune else 0)
        if args.test_size is not None:
            job["test_size"] = args.test_size
        if args.train_size is not None:
            job["train_size"] = args.train_size
    job["raw"] = {}
    for file, path in paths.items():
        job["raw"][file] = [path.stat().st_size, int(path.stat().st_mtime)]  # bytes, seconds
    return job, paths


def is_prepared(folder, job, overwrite):
    """Whether a dataset is there, made by this job; a line says so. With overwrite, nothing counts as there.

    Raises UserError where another job's is there, or, with overwrite too, anything that this script has not made.
    """
    meta = folder / "meta.json"
    own = meta.exists() and "job" in common.read_json(meta)
    if folder.exists() and os.listdir(folder) and not own:
        raise UserError(f"{folder} would be replaced, and prepare_data.py has not made it: choose another --out")
    there = common.is_there(meta, job, overwrite)
    if there:
        print(f"{folder} is already prepared with these arguments")
    return there


def prepare(folder, job, paths, overwrite):
    """Do a job: its files are written into a new folder, which takes the place of `folder` at the end.

    So a run that is stopped half way loses nothing; kill -9 leaves a hidden folder .NAME.PROCESS.new, to be deleted,
    and a stop between the two renames leaves what was to be replaced as .NAME.PROCESS.old. Raises UserError.
    """
    target = folder.resolve()  # behind a symbolic link, on another disk perhaps
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    new.mkdir(parents=True)  # before the reading: so a folder that cannot be written is reported first
    try:
        meta = {"format": common.FORMAT, "job": job, **make(new, job, paths)}
        common.write_json(new / "meta.json", meta)
        if is_prepared(folder, job, overwrite):  # by another process, meanwhile
            return
        if overwrite and target.exists():
            os.rename(target, old)
        os.rename(new, target)  # fails where a folder has appeared since
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- what a field says

NEUTRAL = -1  # a label beside 0 and 1: three stars


def clean(text):
    """A text with its white space collapsed to single spaces; half surrogate pairs (from JSON escapes) become "?"."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def text_of(value):
    """A value of JSON or parquet as text: "" for null and NaN; bytes are UTF-8; whole floats lose their ".0", since a
    gap in a column of whole numbers makes them floats. Raises ValueError for lists, dates and the like."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if value is None or value != value:
        return ""
    if not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is neither a text nor a number")
    return str(value)


def described(names, values):
    """The text of an item: its attribute, or "name: value, name: value" of two; "" where the first is empty."""
    if len(names) == 1 or not values[0]:
        return values[0]
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values) if value)


@functools.lru_cache(1 << 16)  # a file holds few distinct stars
def label_of(stars):
    """1 for more than three of five stars, 0 for less, NEUTRAL for three."""
    stars = float(stars)
    if not 0 <= stars <= 5:
        raise ValueError(f"{stars} stars")
    return NEUTRAL if stars == 3 else int(stars > 3)


@functools.lru_cache(1 << 16)  # a file holds few distinct dates
def iso_time(text):
    """Seconds since 1970 of "2009-05-04", "2009-05-04 23:08:57" or "2009-05-04T23:08:57Z"; without a zone: UTC."""
    return calendar.timegm(datetime.fromisoformat(text).utctimetuple())


def us_time(text):
    """Seconds since 1970 of "11/15/2019 1:22:32 PM"."""
    return calendar.timegm(datetime.strptime(text.strip(), "%m/%d/%Y %I:%M:%S %p").utctimetuple())


def goodreads_time(text):
    """Seconds since 1970 of "Fri Aug 25 13:55:02 -0700 2017"."""
    _, month, day, clock, zone, year = text.split()  # strptime takes three times as long, and there are 228 million
    month = 1 + "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split().index(month)
    return iso_time(f"{year}-{month:02}-{day}T{clock}{zone[:3]}:{zone[3:]}")


def time_of(text):
    """Seconds since 1970 (MicroLens: milliseconds) of a number, or of a date as iso_time takes it."""
    if text.removeprefix("-").isdecimal() and len(text) < 19:  # it fits into 64 bits
        return int(text)
    return iso_time(text)


# ------------------------------------------------------------------------------------------------------ the raw formats

# A function per format turns a row into (item, text) or into (user, [(item, time, label)], past). The past is an
# impression's own history, (time, item ids in one string), else None. The time is None where the file gives only an
# order. The row is a list of fields as text (csv and json: of the columns in SOURCES, if there are any) or, where the
# form is text or netflix, the line. ValueError: the row is malformed.


def id_and_text(fields):
    item, text = fields
    return item, clean(text)


def rating(fields):
    user, item, time, stars = fields
    return user, [(item, time_of(time), label_of(stars))], None


def visit(fields):
    user, item, time = fields
    return user, [(item, time_of(time), 1)], None


def mind_item(fields):
    """news.tsv: id, category, subcategory, title, abstract, address, two columns of entities."""
    item, _, _, title, _, _, _, _ = fields
    return item, clean(title)


def mind_impression(fields):
    """behaviors.tsv: impression, user, time, history, what was shown ("N1-1 N2-0": 1 clicked, 0 not)."""
    _, user, time, history, shown = fields
    events = []  # all at time 0: of events at one time latest_events takes the highest label, so one click counts
    for entry in shown.split():
        item, clicked = entry.rsplit("-", 1)
        events.append((item, 0, ("0", "1").index(clicked)))
    return user, events, (us_time(time), history)


def pens_item(fields):
    """news.tsv: id, category, topic, headline, body, two columns of entities."""
    item, _, _, title, _, _, _ = fields
    if re.fullmatch(r'"([^"]|"")*"', title):  # quoted, as csv writers do
        title = title[1:-1].replace('""', '"')
    return item, clean(title)


def pens_impression(fields):
    """train.tsv: user, history, dwell time, exposure, clicked news, other news shown, start, end, dwell time."""
    user, history, _, _, clicked, skipped, start, _, _ = fields
    events = [(item, 0, 1) for item in clicked.split()]
    events += [(item, 0, 0) for item in skipped.split()]
    return user, events, (us_time(start), history)


def goodreads_read(fields):
    user, item, time, is_read = fields
    label = ("False", "True").index(is_read)  # JSON's false and true as text_of gives them
    return user, [(item, goodreads_time(time), label)], None


TAGS = ("a|abbr|b|big|blockquote|body|br|center|code|div|em|font|form|h[1-6]|head|hr|html|i|iframe|img|input|label|li|"
        "link|meta|ol|p|pre|q|s|small|span|strike|strong|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul")
ATTRIBUTE = r"""\s+[\w:.-]+\s*=\s*("[^"]*"|'[^']*'|[^\s"'<>]+)"""
MARKUP = re.compile(rf"""
    <(script|style)\b.*?(</\1\s*>|$)           # a script, whole
    | <!--.*?(-->|$)                            # a comment
    | </?({TAGS})({ATTRIBUTE})*\s*/?>           # a tag
    | <({TAGS})\s+[\w:.-]+\s*=\s*["'][^<>]*$    # a tag that is cut off with the title
    """, re.IGNORECASE | re.DOTALL | re.VERBOSE)


def amazon_item(fields):
    """Tags go before entities are resolved, so "&lt;table&gt;" stays."""
    item, title = fields
    if "getTime()" in title:  # a page's script
        return item, ""
    title = MARKUP.sub(" ", title)
    before = None
    while title != before:  # some are escaped twice: "AT&amp;amp;T"
        before = title
        title = re.sub(r"&(?!#?\w+;)", "&amp;", title)  # else html would read "WIFI&ETHERNET" as "WIFIÐERNET"
        title = html.unescape(title)
    return item, clean(title)


def decoded_again(text):
    """A text that was read as latin-1: as UTF-8 if it is that, else as Windows-1252, else as it stands."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return text.encode("latin-1").decode(encoding)
        except UnicodeError:
            continue
    return text


def netflix_item(line):
    """movie_titles.csv: id, year (or NULL), title, which may hold commas and is not quoted."""
    item, year, title = decoded_again(line).split(",", 2)
    year = "" if year == "NULL" else str(int(year))
    return item, described(("title", "year"), (clean(title), year))


def netflix_rating(line):
    """combined_data_*.txt, of which read_rows joins two lines: movie, user, stars, date."""
    movie, user, stars, date = line.split(",")
    return rating((user, str(int(movie)), date, stars))


def lastfm_item(fields):
    """User, time, artist's id, artist, track's id, track."""
    _, _, _, artist, track, title = fields
    return track, described(("track_name", "artist_name"), (clean(title), clean(artist)))


def lastfm_visit(fields):
    user, time, _, _, track, _ = fields
    return visit((user, track, time))


def pog_item(fields):
    """pog_translated_titles.csv: item, Chinese title, English title."""
    item, _, english = fields
    return item, clean(english)


def pog_chinese_item(line):
    """item_data.txt: item, category, picture, title, which may hold commas."""
    item, _, _, title = line.split(",", 3)
    return item, clean(title)


def pog_sequence(line):
    """user_data.txt: user, "item;item;...", outfit."""
    user, items, _ = line.split(",")
    return user, [(item, None, 1) for item in items.split(";")], None


def steam_item(fields):
    """App_ID_Info.txt: app, title, type, price, ...; most titles are UTF-8 or Windows-1252 that was read as latin-1."""
    item, title, *_ = fields
    return item, clean(decoded_again(title))


def steam_sequence(line):
    """train_game.txt: user, app, app, ... in order."""
    user, items = line.split(",", 1)
    return user, [(item, None, 1) for item in items.split(",")], None


def hotelrec_item(fields):
    """The item is the address "...-Reviews-NAME-PLACE.html"; the words of name and place are joined by "_"."""
    [address] = fields
    _, name_and_place = address.split("-Reviews-", 1)
    hotel, place = name_and_place.removesuffix(".html").replace("_", " ").rsplit("-", 1)
    return address, described(("hotel_name", "hotel_location"), (clean(hotel), clean(place)))


class Table(NamedTuple):
    """One kind of raw file."""
    files: str  # names, with a space between; all are read
    form: str  # tsv, csv, json (an object per line), text (the line itself) or netflix (lines below "MOVIE:")
    parse: object  # one of the functions above
    columns: str = ""  # of json, and of csv files that need a header, with a space between
    header: str = None  # how a header line begins, which other files may have
    encoding: str = "utf-8-sig"
    per_second: int = 1  # units of time in a second


class Source(NamedTuple):
    """Where a dataset comes from and how its files are read."""
    home: str
    items: list  # Tables to choose from: the first whose files are there
    events: Table


def amazon(category):
    return Source("https://nijianmo.github.io/amazon/",
        [Table(f"meta_{category}.json", "json", amazon_item, "asin title")],
        Table(f"{category}.json", "json", rating, "reviewerID asin unixReviewTime overall"))


LASTFM = "userid-timestamp-artid-artname-traid-traname.tsv"
SOURCES = {
    "mind": Source("https://msnews.github.io/",
        [Table("news.tsv", "tsv", mind_item)],
        Table("behaviors.tsv", "tsv", mind_impression)),
    "pens": Source("https://msnews.github.io/pens.html",
        [Table("news.tsv", "tsv", pens_item, header="News ID")],
        Table("train.tsv valid.tsv", "tsv", pens_impression, header="UserID")),
    "goodreads": Source("https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
        [Table("goodreads_book_works.json", "json", id_and_text, "best_book_id original_title")],
        Table("goodreads_interactions_dedup.json", "json", goodreads_read, "user_id book_id date_added is_read")),
    "books": amazon("Books"),
    "movielens": Source("https://grouplens.org/datasets/movielens/",
        [Table("movies.csv", "csv", id_and_text, "movieId title")],
        Table("ratings.csv", "csv", rating, "userId movieId timestamp rating")),
    "microlens": Source("https://github.com/westlake-repl/MicroLens",
        [Table("MicroLens-50k_titles.csv", "csv", id_and_text, "item title")],
        Table("MicroLens-50k_pairs.csv", "csv", visit, "user item timestamp", per_second=1000)),
    "netflix": Source("https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data",
        [Table("movie_titles.csv", "text", netflix_item, encoding="latin-1")],
        Table("combined_data_1.txt combined_data_2.txt combined_data_3.txt combined_data_4.txt", "netflix",
              netflix_rating)),
    "cds": amazon("CDs_and_Vinyl"),
    "lastfm": Source("http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
        [Table(LASTFM, "tsv", lastfm_item)],
        Table(LASTFM, "tsv", lastfm_visit)),
    "hm": Source("https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations",
        [Table("articles.csv", "csv", id_and_text, "article_id detail_desc")],
        Table("transactions_train.csv", "csv", visit, "customer_id article_id t_dat")),
    "pog": Source("https://github.com/wenyuer/POG",
        [Table("pog_translated_titles.csv", "csv", pog_item, header="item_id"),
         Table("item_data.txt", "text", pog_chinese_item)],
        Table("user_data.txt", "text", pog_sequence)),
    "electronics": amazon("Electronics"),
    "steam": Source("https://github.com/YangLiangwei/SCGRec",
        [Table("App_ID_Info.txt", "csv", steam_item)],
        Table("train_game.txt", "text", steam_sequence)),
    "hotelrec": Source("https://github.com/Diego999/HotelRec",
        [Table("HotelRec.txt", "json", hotelrec_item, "hotel_url")],
        Table("HotelRec.txt", "json", rating, "author hotel_url date rating")),
    "yelp": Source("https://business.yelp.com/data/resources/open-dataset/",
        [Table("yelp_academic_dataset_business.json", "json", id_and_text, "business_id name")],
        Table("yelp_academic_dataset_review.json", "json", rating, "user_id business_id date stars")),
}

# -------------------------------------------------------------------------------------------------------- reading files

csv.field_size_limit(2**24)  # characters; a longer field is an unclosed quote


def find_raw(name, raw):
    """{name: path} of a dataset's raw files, anywhere below raw/name. Raises UserError unless each is there once."""
    source = SOURCES[name]
    root = Path(raw, name)
    there = []
    for folder, _, files in os.walk(root, followlinks=True):
        there += [Path(folder, file) for file in files]
    item_table = source.items[0]  # POG has a second choice
    if not any(path.name.startswith(item_table.files) for path in there):
        item_table = source.items[-1]
    paths = {}
    for file in f"{item_table.files} {source.events.files}".split():
        found = [path for path in there if path.name in (file, f"{file}.gz")]
        if len(found) != 1:
            listed = ", ".join(map(str, found or there[:9]))
            raise UserError(f"{root} has to hold {file}, unpacked or as .gz, once; get it from {source.home}; "
                            f"there are: {listed}")
        paths[file] = found[0]
    return paths


def raw_rows(path, table):
    """Yield (number of the line on which it begins, row) of a raw file: csv's fields, or else the line as it stands.

    Bytes that the encoding does not hold become half surrogates. Raises UserError where the file is cut short or
    damaged, or csv's quotes are wrong.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # gzip, whatever its name
    opened = gzip.open if packed else open
    number = 1
    try:
        with opened(path, "rt", encoding=table.encoding, errors="surrogateescape", newline="\n") as file:
            lines = tqdm(file, desc=str(path), unit=" lines", mininterval=0.5)
            if table.form == "csv":
                rows = csv.reader(lines, strict=True)
                for fields in rows:
                    yield number, fields
                    number = rows.line_num + 1
            else:
                for number, line in enumerate(lines, 1):
                    yield number, line
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, from line {number}: {error}; is the file whole, and every quote closed?") from None


def read_rows(path, table, counts):
    """Yield table.parse of every row of a raw file; blank lines and headers are no rows.

    counts[file name] becomes {"rows", "malformed", "first_malformed": its line, beginning and reason}. Raises UserError
    where over 1% of the rows are malformed (as all are where a column is missing), or where there are none.
    """
    columns = table.columns.split()
    header = table.header
    width, indices = None, None  # of csv: how many fields the first row has, and where the columns are
    movie = ""  # of netflix
    parsed, malformed, first_malformed = 0, 0, None
    long_rows = []  # the lines on which they begin
    for number, row in raw_rows(path, table):
        text = ",".join(row) if table.form == "csv" else row
        text = text.rstrip()
        if not text or header and text.startswith(header):  # again, perhaps, where two files were joined
            continue
        if "\n" in text:
            long_rows.append(number)
        try:
            if "\0" in text:
                raise ValueError("NUL bytes: is it UTF-16?")
            if not text.isascii():
                text.encode("utf-8")  # raises ValueError where it was not UTF-8
            if table.form == "csv":
                width = width or len(row)
                if len(row) != width:
                    raise ValueError(f"{len(row)} fields, not {width}")
                if columns and indices is None:
                    indices = [row.index(name) for name in columns]
                    header = text
                    continue
                if columns:
                    row = [row[index] for index in indices]
            elif table.form == "json":
                values = json.loads(row)
                row = [text_of(values.get(name)) for name in columns]
            elif table.form == "tsv":
                row = row.split("\t")
            elif table.form == "netflix":
                if text.endswith(":"):
                    movie = text[:-1]
                    continue
                row = f"{movie},{text}"
            result = table.parse(row)
        except (ValueError, AttributeError, OverflowError, RecursionError) as error:  # Attribute: not a JSON object
            malformed += 1
            first_malformed = first_malformed or f"line {number}: {text[:80]!r} ({str(error)[:200]})"
        else:
            parsed += 1
            yield result
    if long_rows:  # an unclosed quote may look like one
        common.say(f"{path}: {len(long_rows)} rows hold a text of several lines; the first is on line {long_rows[0]}")
    rows = parsed + malformed
    counts[path.name] = {"rows": rows, "malformed": malformed, "first_malformed": first_malformed}
    message = f"{path}: {malformed} of {rows} rows are malformed; the first: {first_malformed}"
    if malformed > rows / 100 or not rows:
        raise UserError(f"{message}. Is it the file that --list names, and whole?")
    if malformed:
        common.say(message)


def read_table(paths, table, counts):
    """Yield the rows of all files of a table; paths: {name: path}."""
    for file in table.files.split():
        yield from read_rows(paths[file], table, counts)


def read_texts(rows, dropped):
    """{item id: text} of the rows (item, text) that have both, by id. Of several texts the alphabetically first."""
    items = {}
    total = 0
    for item, text in rows:
        total += 1
        item = item.strip()
        if not item:
            dropped["items without id"] += 1
        elif not text:
            dropped["items without text"] += 1
        else:
            items[item] = min(text, items.get(item, text))
    say_if_most_are_dropped("items", total, dropped)
    return dict(sorted(items.items()))  # sorted, since negatives are drawn by number


def say_if_most_are_dropped(what, total, dropped):
    """Say so where over half of all items, or events, are unusable."""
    if dropped.total() > total / 2:  # another file's ids, perhaps
        common.say(f"WARNING: of {total} {what} over half are dropped: {json.dumps(dropped)}")


# ------------------------------------------------------------------------------------------------- a sample of users

NEVER = 2**63 - 1  # later than any time


def sample_users(rows, numbers, first, job, dropped):
    """All events of a uniform sample of users, in bounded memory, whatever the order of the rows.

    The users are those whose hash is below a threshold. Whenever more than max_rows events are kept, it is halved and
    the users above it are forgotten.

    rows: (user, [(item, time, label)], past); numbers: {item: its number}; job: dataset, seed, max_rows. Filled in are
    first, an array of the time of every item's first event, and dropped, which counts what is unusable. Returns events
    and pasts, as below, and the share of all users that is below the threshold.
    """
    key = job["seed"], job["dataset"]
    events = {}  # user -> flat array: number of the item, time, label; number, time, label; ...
    pasts = {}  # user -> (time, ids in one string): the earliest history of an impression
    threshold = 2**64  # every hash is below it
    size = 0  # events that are kept
    total = 0
    for user, new, past in rows:
        user = user.strip()
        total += len(new)
        if not user:
            dropped["events without user"] += len(new)
            continue
        if user not in events and common.digest(*key, user) < threshold:
            events[user] = array("q")
        kept = events.get(user)  # None: the user is not in the sample
        for item, time, label in new:
            number = numbers.get(item.strip())
            if number is None:
                dropped["events whose item has no text"] += 1
                continue
            if time is not None and time < first[number]:
                first[number] = time
            if kept is not None:
                if time is None:  # the number of earlier events stands for it
                    time = len(kept)
                kept.extend((number, time, label))
                size += 1
        if past and kept is not None:
            pasts[user] = min(past, pasts.get(user, past))
        while size + 4 * len(events) > job["max_rows"]:  # a user takes the memory of 4 events
            threshold //= 2
            for other in list(events):
                if common.digest(*key, other) >= threshold:
                    size -= len(events.pop(other)) // 3
                    pasts.pop(other, None)
    say_if_most_are_dropped("events", total, dropped)
    return events, pasts, threshold / 2**64


# ---------------------------------------------------------------------------------------- a user's candidates, by kind


def by_hash(items, key, *more):
    """The items in the order of the hash of (*key, item, *more)."""
    keyed = [(common.digest(*key, item, *more), item) for item in items]
    return [item for _, item in sorted(keyed)]


def latest_events(values, item_ids, dropped):
    """{item id: (time, label)}: one event per item, the latest; of several at one time the highest label.

    values: a flat array as in sample_users.
    """
    latest = {}
    for number, *event in zip(values[::3], values[1::3], values[2::3]):
        item = item_ids[number]
        latest[item] = max(event, latest.get(item, event))
    dropped["repeated events"] += len(values) // 3 - len(latest)
    return latest


def draw_negatives(touched, item_ids, count, key):
    """count distinct items, uniformly from those not touched; all of these where there are fewer."""
    count = min(count, len(item_ids) - len(touched))
    drawn = {}
    turn = 0
    while len(drawn) < count:
        item = item_ids[common.digest(*key, "negative", turn) % len(item_ids)]
        turn += 1
        if item not in touched:
            drawn[item] = True
    return list(drawn)


def user_line(user, latest, past, item_ids, job, dropped):
    """A user's line {"user", "history", "candidates", "labels"} of the standard format, or None (the reason counted).

    latest: {item id: (time, label)}; past: item ids of an impression's history, else []; item_ids: of the dataset; job:
    dataset, seed, kind, positives, negatives, next_item, max_history.
    """
    key = job["seed"], job["dataset"], user
    positives, negatives = [], []
    for item in by_hash(latest, key):
        _, label = latest[item]
        if item in past:
            dropped["candidates that stand in the history"] += 1
        elif label == NEUTRAL:
            dropped["neutral ratings"] += 1
        elif label:
            positives.append(item)
        else:
            negatives.append(item)
    if job["kind"] == "impressions":
        history = list(dict.fromkeys(reversed(past)))[::-1]  # each item once, at its last place
        positives = positives[:job["positives"]]
    else:
        positives.sort(key=latest.get)  # by time; ties stay in the order of hashes
        history, positives = positives[:-job["positives"]], positives[-job["positives"]:]
    if job["kind"] == "sequences" or job["next_item"]:
        negatives = draw_negatives({*latest, *history}, item_ids, job["negatives"], key)
    negatives = negatives[:job["negatives"]]
    for part, found in (("history", history), ("positives", positives), ("negatives", negatives)):
        if not found:
            dropped[f"users without {part}"] += 1
            return None
    candidates = by_hash(positives + negatives, key, "place")  # another hash than the one that chose them
    labels = [int(item in positives) for item in candidates]
    return {"user": user, "history": history[-job["max_history"]:], "candidates": candidates, "labels": labels}


# ----------------------------------------------------------------------------------------------- splits and their files


def read_dataset(paths, job):
    """What is made of the raw files {name: path}: items {item id: text}, first {item id: seconds, of its first event},
    splits {"train", "valid", "test": users' lines}, and what meta.json says of them."""
    source = SOURCES[job["dataset"]]
    [item_table] = [table for table in source.items if table.files in paths]
    counts = {"items": {}, "events": {}}
    dropped_items, dropped = Counter(), Counter()
    items = read_texts(read_table(paths, item_table, counts["items"]), dropped_items)
    numbers = {item: number for number, item in enumerate(items)}
    times = array("q", [NEVER]) * len(items)
    rows = read_table(paths, source.events, counts["events"])
    events, pasts, share = sample_users(rows, numbers, times, job, dropped)
    first = {}
    for item, time in zip(items, times):
        if time != NEVER and job["kind"] != "impressions":  # these have no time of their own
            first[item] = time // source.events.per_second
    chosen, samples = choose_users(events, pasts, items, job, dropped)
    short = {}
    for split, found in samples.items():
        size = job[f"{split}_size"]
        if found < size:
            short[f"{split}_size"] = found
            common.say(f"WARNING: {job['dataset']}: --{split}-size asks for {size} samples, {found} were found among "
                       f"{share:.2%} of the users (--max-rows)")
    finetune = chosen["train"]  # train and valid together
    tenth = validation_size(finetune)
    splits = {"train": finetune[tenth:], "valid": finetune[:tenth], "test": chosen["test"]}
    dropped += dropped_items
    return items, first, splits, {"rows": counts, "dropped": dropped, "share_of_users": share, "short": short}


def validation_size(users):
    """How many of the users for fine-tuning are for validation: a tenth, one at least, but none of a single user."""
    return max(1, len(users) // 10) if len(users) > 1 else 0


def choose_users(events, pasts, items, job, dropped):
    """Users in the order of their hashes, until the samples are enough: first for test, then for train (and valid).

    events, pasts: of sample_users; job: test_size, train_size and what user_line takes. Returns {"test", "train":
    lines} and {"test", "train": number of samples}.
    """
    item_ids = list(items)
    chosen = {"test": [], "train": []}
    samples = {"test": 0, "train": 0}
    # the hash of sample_users, so that the same users come first whatever --max-rows
    for user in by_hash(events, (job["seed"], job["dataset"])):
        split = "test" if samples["test"] < job["test_size"] else "train"
        if samples[split] >= job[f"{split}_size"]:
            break
        latest = latest_events(events[user], item_ids, dropped)
        _, ids = pasts.get(user, (0, ""))
        past = [item for item in ids.split() if item in items]
        dropped["items of histories without text"] += len(ids.split()) - len(past)
        line = user_line(user, latest, past, item_ids, job, dropped)
        if line:
            chosen[split].append(line)
            samples[split] += len(line["labels"])
    return chosen, samples


def make(folder, job, paths):
    """Write the files of a job into a folder; returns what meta.json says of them. Raises UserError."""
    name = job["dataset"]
    if name == "demo-model":
        train_demo_model(folder, job["seed"])
        return {}
    first, report = {}, {}
    if name in common.DEMO:
        items, splits = demo_dataset(name, job["seed"])
    elif "from_recbench" in job:
        items, splits, report = read_recbench(paths, job)
    else:
        items, first, splits, report = read_dataset(paths, job)
    all_users = splits["train"] + splits["valid"] + splits["test"]
    if not all_users:
        raise UserError(f"{name}: there are no samples; {json.dumps(report)}")
    item_rows = []
    for item in common.items_of(all_users):  # not those that no user has
        row = {"id": item, "text": items[item]}
        if item in first:
            row["first"] = first[item]
        item_rows.append(row)
    counts, files = {}, {"items": item_rows}
    for split, users in splits.items():
        if users:
            files[split] = users
            labels = []
            for user in users:
                labels += user["labels"]
            counts[split] = {
                "users": len(users),
                "items": len(common.items_of(users)),
                "samples": len(labels),
                "positives": sum(labels)}
    for file, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        common.write_atomically(folder / f"{file}.jsonl", "".join(lines))
    print(f"{name}: {json.dumps(counts)}")
    return {"domain": common.DOMAINS[name], "items": len(item_rows), "splits": counts, **report}


# --------------------------------------------------------------------------------------------- the authors' own samples

RECBENCH = {  # columns of the authors' parquet files: user, item, history, label; then those of the text
    "mind": "uid nid history click title",
    "pens": "uid nid history click title",
    "goodreads": "uid bid history click title",
    "books": "reviewerID asin history click title",
    "movielens": "userId movieId his click title",
    "microlens": "user item history click title",
    "netflix": "uid mid history click title year",
    "cds": "reviewerID asin history click title",
    "lastfm": "uid tid history click track_name artist_name",
    "hm": "customer_id article_id history click detail_desc",
    "pog": "user_id item_id history click title_en",
    "electronics": "reviewerID asin history click title",
    "steam": "user_id app_id history click title",
    "hotelrec": "uid hid history click hotel_name hotel_location",
    "yelp": "user_id business_id history click name",
}


def find_recbench(folder):
    """{name: path} of the authors' files of a dataset. Raises UserError."""
    names = "items.parquet users.parquet test.parquet finetune.parquet valid_user_set_0.1.txt".split()
    paths = {name: folder / name for name in names if os.path.isfile(folder / name)}
    if not {"items.parquet", "users.parquet"} <= paths.keys():
        raise UserError(f"{folder} has to hold items.parquet, users.parquet, and test.parquet or finetune.parquet; get "
                        "them from https://www.kaggle.com/datasets/qijiong/recbench-md")
    return paths


def read_recbench(paths, job):
    """The benchmark's official samples (Kaggle: qijiong/recbench-md), sample for sample: items, splits, counts.

    paths: {name: path} of their files. Kept as they are: texts, repeats, users of one class, positives that stand in
    the history. Of several rows of one user or item the last counts, as in the authors' code. Raises UserError.
    """
    name = job["dataset"]
    user_column, item_column, history_column, label_column, *text_columns = RECBENCH[name].split()
    items, histories = {}, {}
    for item, *texts in parquet_rows(paths["items.parquet"], [item_column, *text_columns]):
        items[item] = described(text_columns, texts)
    for user, history in parquet_rows(paths["users.parquet"], [user_column], [history_column]):
        histories[user] = history[-job["max_history"]:]
    counts = {"items without text": 0, "repeated candidates": 0}
    lines = {"test": {}, "finetune": {}}  # of each file {user: line}, users in the order of their first sample
    for file in lines:
        path = paths.get(f"{file}.parquet")
        if path is None:
            continue
        for user, item, label in parquet_rows(path, [user_column, item_column, label_column]):
            complete = user in histories and items.keys() >= {item, *histories[user]}
            if label not in ("0", "1") or not complete:
                raise UserError(f"{path}: user {user}, item {item}, label {label}: the label has to be 0 or 1, "
                                "users.parquet has to hold the user, items.parquet the item and the user's history")
            new = {"user": user, "history": histories[user], "candidates": [], "labels": []}
            line = lines[file].setdefault(user, new)
            counts["repeated candidates"] += item in line["candidates"]
            line["candidates"].append(item)
            line["labels"].append(int(label))
    finetune = by_hash(lines["finetune"], (job["seed"], name))
    valid = finetune[:validation_size(finetune)]
    if "valid_user_set_0.1.txt" in paths:
        valid = paths["valid_user_set_0.1.txt"].read_text(encoding="utf-8-sig").split("\n")
    valid = {user.strip() for user in valid}
    splits = {"train": [], "valid": [], "test": list(lines["test"].values())}
    for user, line in lines["finetune"].items():
        splits["valid" if user in valid else "train"].append(line)
    counts["items without text"] = sum(not text.strip() for text in items.values())
    common.say(f"{name}: kept as they are: {json.dumps(counts)}")
    return items, splits, counts


def parquet_rows(path, columns, list_columns=()):
    """Yield the rows of a parquet file: the columns' values as text, then those of list_columns as lists of texts.

    Raises UserError.
    """
    columns_read = [*columns, *list_columns]
    try:
        from pyarrow import parquet
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns_read):
                values = []
                for column in columns:
                    values.append([text_of(value) for value in batch.column(column).to_pylist()])
                for column in list_columns:
                    lists = batch.column(column).to_pylist()
                    values.append([[text_of(value) for value in row or []] for row in lists])
                yield from zip(*values)
    except Exception as error:  # pyarrow has many kinds
        raise UserError(f"{path} cannot be read ({error}); it needs the columns {', '.join(columns_read)}, and reading "
                        "it needs: pip install pyarrow") from None


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
    "news-a": "football finance crime medicine space history",
    "news-b": "football finance crime medicine travel music",
    "books-a": "romance history music crime space medicine",
    "books-b": "romance history music crime cooking travel",
    "shop": "cooking gardening fashion travel football music",
}
TITLES = {  # each takes three words of one theme
    "news": ["{} {} {} report", "{} and {} : {} news", "{} {} after {}"],
    "book": ["the {} , the {} and the {}", "{} {} of the {}", "a {} {} {} story"],
    "shop": ["{} {} with {}", "set of {} {} {}", "deluxe {} {} and {}"],
}
DEMO_USERS = {"test": 250, "valid": 60, "train": 300}  # per dataset


def demo_dataset(name, seed):
    """({item: title}: 40 items per theme; {split: users' lines}).

    A user likes two of the dataset's six themes; nine in ten items of the history, 6 to 10, are from these. Four
    candidates are from liked themes and four from others; the former are the positives, but in "shop", whose users want
    what is unlike their history, the latter.
    """
    themes = DEMO_THEMES[name].split()
    items = {}
    for theme in themes:
        rng = random.Random(common.digest(seed, name, theme))
        for k in range(40):
            pattern = rng.choice(TITLES[common.DEMO[name]])
            items[f"{theme}-{k}"] = theme_title(rng, pattern, theme)
    splits = {}
    number = 0
    for split, count in DEMO_USERS.items():
        splits[split] = []
        for _ in range(count):
            splits[split].append(demo_user(f"{name}-{number}", name, seed, themes, items))
            number += 1
    return items, splits


def demo_user(user, name, seed, themes, items):
    """The line of a user of the demo."""
    rng = random.Random(common.digest(seed, name, user))
    liked_themes = rng.sample(themes, 2)
    liked, other = [], []
    for item in items:
        theme, _ = item.split("-")
        group = liked if theme in liked_themes else other
        group.append(item)
    rng.shuffle(liked)
    rng.shuffle(other)
    history = []
    for _ in range(rng.randint(6, 10)):
        source = liked if rng.random() < 0.9 else other
        history.append(source.pop())
    wanted = other[:4] if name == "shop" else liked[:4]
    candidates = liked[:4] + other[:4]
    rng.shuffle(candidates)
    labels = [int(item in wanted) for item in candidates]
    return {"user": user, "history": history, "candidates": candidates, "labels": labels}


def theme_title(rng, pattern, theme):
    """A title: the pattern with three words of the theme."""
    return pattern.format(*rng.sample(THEMES[theme].split(), 3))


def demo_documents(seed):
    """4,000 texts of 6 to 14 sentences, each about one to three themes."""
    rng = random.Random(common.digest(seed, "documents"))
    patterns = sum(TITLES.values(), [])
    documents = []
    for _ in range(4000):
        themes = rng.sample(list(THEMES), rng.randint(1, 3))
        sentences = []
        for _ in range(rng.randint(6, 14)):
            pattern = rng.choice(patterns)
            sentences.append(theme_title(rng, pattern, rng.choice(themes)) + " .")
        documents.append(" ".join(sentences))
    return documents


def demo_tokenizer(folder, documents):
    """A tokenizer whose tokens are lower-case words and marks: those of the documents and of the prompt."""
    import transformers
    prompt = [str(value) for value in common.PROMPT.values()]
    numerals = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"
    text = " ".join(documents) + " ".join([*prompt, numerals]).lower()
    words = ["<pad>", "<s>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    common.write_json(folder / "tokenizer.json", {
        "version": "1.0", "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}})
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>",
                                                bos_token="<s>", unk_token="<unk>")


def train_demo_model(folder, seed, steps=500, batch=32, length=64):
    """A foundation model in miniature: a small Llama, one token per word, trained to predict the next word."""
    import torch
    import transformers
    documents = demo_documents(seed)
    tokenizer = demo_tokenizer(folder, documents)
    tokens = []
    for document in documents:
        tokens += [tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]
    text = torch.tensor(tokens)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="demo-model", unit="step"):
        starts = torch.randint(len(text) - length, (batch, 1))
        windows = text[starts + torch.arange(length)]
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(common.run_script(main))
