"""Raw files of the benchmark's fifteen datasets -> one standard format.

    python prepare_data.py --list                                  the datasets, their raw files, where to get them
    python prepare_data.py movielens --raw raw --out data          reads raw/movielens/, writes data/movielens/
    python prepare_data.py mind hm steam --raw raw --out data      several, each with the sizes of its role in the paper
    python prepare_data.py movielens --test-size 2000 --train-size 3000 --raw raw --out data
    python prepare_data.py yelp --positives 1 --negatives 99 --raw raw --out data      next-item ranking
    python prepare_data.py mind --from-recbench recbench-md --out data                 the authors' own samples
    python prepare_data.py demo --out data                         small made-up datasets, no download

Written per dataset: items.jsonl {"id", "text"}; train.jsonl, valid.jsonl and test.jsonl, one line per user {"user",
"history" (oldest first), "candidates", "labels" (1 liked, 0 not)}; meta.json (rows read, malformed, dropped and why;
sha256). Unusable rows are counted over whole files, unusable users and candidates among those users that were examined
to reach the sizes.

In reading order: what is to be made, and is it there already; the raw formats; reading their rows; a uniform sample of
users with complete histories, in bounded memory; a user's history and candidates, by kind of dataset; splits and their
files; the authors' own samples; the demo.
Every random choice is a hash of (seed, dataset, user, item): the same on every machine.
"""
import csv
import functools
import gzip
import hashlib
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
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import common
from common import UserError


def arguments(argv):
    parser = common.Parser(__doc__, "prepare_data.py")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="datasets (see --list), or demo")
    add("--list", action="store_true", help="print the datasets, their raw files and home pages")
    add("--raw", default="raw", help="folder of the raw files: RAW/<dataset>/, plain or .gz")
    add("--from-recbench", metavar="DIR", type=Path, help="convert the authors' DIR/<dataset>/*.parquet instead")
    add("--out", default="data", type=common.output_folder,
        help="folder to write <dataset>/ into (--data of the other scripts)")
    add("--test-size", type=common.whole_number, metavar="SAMPLES",
        help="if not given: 20000 for the paper's test sets, else 0")
    add("--train-size", type=common.whole_number, metavar="SAMPLES",
        help="of train and valid together; if not given: 100000 for the paper's fine-tune sets, else 0")
    add("--max-history", type=common.positive_number, default=20,
        help="latest items of a history to keep")
    add("--positives", type=common.positive_number,
        help="positives per user; if given, negatives are drawn at random (if not: see --list)")
    add("--negatives", type=common.positive_number,
        help="negatives per user, drawn from items never touched (if not given: see --list)")
    add("--max-rows", type=common.positive_number, default=20_000_000, help="events kept in memory")
    add("--seed", type=common.whole_number, default=2025, help="seed of everything random")
    add("--overwrite", action="store_true", help="replace outputs made with other arguments")
    args = parser.parse_args(argv)
    if not args.list and not args.names:
        raise UserError("name the datasets to prepare, or demo; --list shows them")
    for name in args.names:
        if name not in SOURCES and name != "demo":
            raise UserError(f"unknown dataset {name!r}; there are {', '.join(SOURCES)}, demo")
    sizes = {args.test_size, args.train_size, args.positives, args.negatives}
    if sizes != {None} and (args.from_recbench or "demo" in args.names):
        raise UserError("the demo's and --from-recbench's samples are fixed: no sizes, --positives or --negatives")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.list:
        list_datasets()
        return
    names = []
    for name in args.names:
        names += [*common.DEMO, "demo-model"] if name == "demo" else [name]
    # what is missing or in the way is reported before any long work: first what is known without reading
    plans, to_do = [], []
    for name in dict.fromkeys(names):  # each once
        folder = Path(args.out, name)
        found = found_job(folder)
        plans.append((folder, found, *plan(name, args)))
    for folder, found, job, paths in plans:
        if paths:
            job["raw"] = raw_hashes(paths)
        if not args.overwrite and common.job_status(folder, job, found, finished=True) == "finished":
            print(f"{folder} is already prepared with these arguments")
        else:
            to_do.append((folder, job, paths))
    for folder, job, paths in to_do:
        prepare(folder, job, paths)


def list_datasets():
    """Print the table of the benchmark, the raw files expected in RAW/<dataset>/ and where to get them."""
    for name, row in common.DATASETS.items():
        source = SOURCES[name]
        roles = "test" if row.test else "fine-tune"
        if row.test and row.finetune:
            roles = "test and fine-tune"
        items = " or ".join(table.files for table in source.items)
        print(f"{name:12} {row.domain:12} {roles:19} {row.kind:12} {row.positives:3} positives "
              f"{row.negatives:4} negatives")
        print(f"{'':12} {source.home}")
        print(f"{'':12} items: {items}")
        print(f"{'':12} events: {source.events.files}")


# ---------------------------------------------------------------------------------------- what to make, and is it there


def plan(name, args):
    """(the job of a dataset, but for the hashes of its raw files; the paths of these, {name: path}).

    The job says what the dataset is made of. Raises UserError where files are missing.
    """
    job = {"dataset": name, "seed": args.seed}
    if name not in SOURCES:  # of the demo
        return {**job, "users": DEMO_USERS}, {}
    job["max_history"] = args.max_history
    if args.from_recbench:
        return {**job, "from_recbench": True}, find_recbench(args.from_recbench / name)
    row = common.DATASETS[name]
    paths = find_raw(name, args.raw)
    job["kind"] = row.kind
    job["positives"] = args.positives or row.positives
    job["negatives"] = args.negatives or row.negatives
    job["next_item"] = bool(args.positives or args.negatives)
    job["max_rows"] = args.max_rows
    job["test_size"], job["train_size"] = args.test_size, args.train_size
    if args.test_size is None:
        job["test_size"] = 20_000 if row.test else 0
    if args.train_size is None:
        job["train_size"] = 100_000 if row.finetune else 0
    if not job["test_size"] and not job["train_size"]:
        raise UserError(f"{name}: --test-size and --train-size are both 0: nothing to write")
    return job, paths


def raw_hashes(paths):
    """{name: {"size", "sha256"}} of raw files {name: path}: no edit goes unseen."""
    raw = {}
    for path in tqdm(sorted(paths.values()), desc="sha256 of the raw files", unit=" files"):
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        raw[path.name] = {"size": path.stat().st_size, "sha256": sha256}
    return raw


def found_job(folder):
    """The job of a folder that would be replaced, None where there is no folder, or an empty one.

    {} where the folder is not what that job has written: of another version, or a file is gone or (of a dataset)
    edited. Raises UserError where it holds anything that this script has not written: it would be deleted.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not names:
        return None
    meta = common.read_json(folder / "meta.json") if "meta.json" in names else {}
    own = meta.get("files", []) if isinstance(meta, dict) else []
    for name in names:
        if name not in own:
            raise UserError(f"{folder} would be replaced, but it holds {name}, which prepare_data.py did not write; "
                            "choose another --out")
    edited = "sha256" in meta and meta["sha256"] != common.data_sha256(folder.parent, folder.name)
    if edited or len(names) < len(own) or meta.get("format") != common.FORMAT:
        return {}
    return common.job_in(folder / "meta.json")


def prepare(folder, job, paths):
    """Do a job: its files are written into a new folder, which takes the place of `folder` at the end.

    So a run that is stopped half way loses nothing. Raises UserError.
    """
    name = job["dataset"]
    target = folder.resolve()  # behind a symbolic link, on another disk perhaps
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(new, ignore_errors=True)  # what a killed run left
    new.mkdir(parents=True)  # before the reading: so a folder that cannot be written is reported first
    if name == "demo-model":
        train_demo_model(new, job["seed"])
        meta = {"job": job}
    else:
        report = {}
        if name in common.DEMO:
            items, splits = demo_dataset(name, job["seed"])
        elif "from_recbench" in job:
            items, splits = read_recbench(paths, job)
        else:
            items, splits, report = read_dataset(paths, job)
        meta = {**write_dataset(new, items, splits, job), **report}
    files = sorted(path.name for path in new.iterdir())
    common.write_json(new / "meta.json", {"format": common.FORMAT, **meta, "files": [*files, "meta.json"]})
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- what a field says

NEUTRAL = -1  # a label beside 0 and 1: three stars


def clean(text):
    """A text with its white space collapsed to single spaces; half surrogate pairs (from JSON escapes) become "?"."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def text_of(value):
    """A value of JSON or parquet as text; "" for null, NaN, lists and objects."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and value == value else ""


def described(names, values):
    """The text of an item: its attribute, or "name: value, name: value" of two; "" where the first is empty."""
    if len(names) == 1 or not values[0]:
        return values[0]
    return ", ".join(f"{name}: {value}" for name, value in zip(names, values) if value)


def label_of(stars):
    """1 for more than three of five stars, 0 for less, NEUTRAL for three."""
    stars = float(stars)
    if not 0 <= stars <= 5:
        raise ValueError(f"{stars} stars")
    if stars == 3:
        return NEUTRAL
    return int(stars > 3)


def seconds_of(moment):
    """Seconds since 1970 of a datetime; without a zone: UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(moment.timestamp())


@functools.lru_cache(1 << 16)  # a file holds few distinct dates
def iso_time(text):
    """Seconds since 1970 of "2009-05-04", "2009-05-04 23:08:57" or "2009-05-04T23:08:57Z"."""
    return seconds_of(datetime.fromisoformat(text))


def us_time(text):
    """Seconds since 1970 of "11/15/2019 1:22:32 PM"."""
    return seconds_of(datetime.strptime(text.strip(), "%m/%d/%Y %I:%M:%S %p"))


def goodreads_time(text):
    """Seconds since 1970 of "Fri Aug 25 13:55:02 -0700 2017"."""
    _, month, day, clock, zone, year = text.split()  # strptime takes three times as long, and there are 228 million
    month = 1 + "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split().index(month)
    return iso_time(f"{year}-{month:02}-{day}T{clock}{zone[:3]}:{zone[3:]}")


def time_of(text):
    """Seconds since 1970 (MicroLens: milliseconds) of a number, or of a date as iso_time takes it."""
    if text.isdecimal() and len(text) < 19:  # it fits into 64 bits
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
    while html.unescape(title) != title:  # some are escaped twice: "AT&amp;amp;T"
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
    """combined_data_*.txt, see netflix_rows: movie, user, stars, date."""
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
    if '"' in line:
        raise ValueError("a quote, and this file is no CSV")
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
    _, _, name_and_place = address.partition("-Reviews-")
    if "-" not in name_and_place:
        raise ValueError("no -Reviews-NAME-PLACE in the address")
    hotel, place = name_and_place.removesuffix(".html").replace("_", " ").rsplit("-", 1)
    return address, described(("hotel_name", "hotel_location"), (clean(hotel), clean(place)))


class Table(NamedTuple):
    """One kind of raw file."""
    files: str  # names, with a space between; all are read
    form: str  # tsv, csv, json (an object per line), netflix (see netflix_rows) or text (the line as it stands)
    parse: object  # one of the functions above
    columns: str = ""  # of csv and json, with a space between; none where a csv file may lack its header
    encoding: str = "utf-8"


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
        [Table("news.tsv", "tsv", pens_item)],
        Table("train.tsv valid.tsv", "tsv", pens_impression)),
    "goodreads": Source("https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
        [Table("goodreads_book_works.json", "json", id_and_text, "best_book_id original_title")],
        Table("goodreads_interactions_dedup.json", "json", goodreads_read, "user_id book_id date_added is_read")),
    "books": amazon("Books"),
    "movielens": Source("https://grouplens.org/datasets/movielens/",
        [Table("movies.csv", "csv", id_and_text, "movieId title")],
        Table("ratings.csv", "csv", rating, "userId movieId timestamp rating")),
    "microlens": Source("https://github.com/westlake-repl/MicroLens",
        [Table("MicroLens-50k_titles.csv", "csv", id_and_text, "item title")],
        Table("MicroLens-50k_pairs.csv", "csv", visit, "user item timestamp")),
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
        [Table("pog_translated_titles.csv", "csv", pog_item), Table("item_data.txt", "text", pog_chinese_item)],
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


def find_file(folder, file):
    """The path of a raw file in a folder, plain or .gz, or None."""
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    return None


def find_raw(name, raw):
    """{name: path} of a dataset's raw files, in raw/name or a folder below it.

    Of several folders the one for training counts (MINDsmall_train, MINDsmall_dev). Raises UserError where more are
    left, or where there is none.
    """
    source = SOURCES[name]
    root = Path(raw, name)
    item_table = source.items[0]  # POG has a second choice
    if not any(root.rglob(f"{item_table.files}*")):
        item_table = source.items[-1]
    files = [*item_table.files.split(), *source.events.files.split()]
    found = []
    for folder in (root, *sorted(root.rglob("*"))):
        if all(find_file(folder, file) for file in files):
            found.append(folder)
    found = [folder for folder in found if "train" in folder.name] or found
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} both hold the files: leave one of them in {root}")
    if not found:
        item_files = " or ".join(table.files for table in source.items)
        there = ", ".join(sorted(path.name for path in root.glob("*"))[:9])
        raise UserError(f"{root}, or one folder below it, has to hold {item_files}, {source.events.files}, "
                        f"unpacked or as .gz; get them from {source.home}; there are {there or 'no files'}")
    return {file: find_file(found[0], file) for file in files}


def raw_lines(path, encoding):
    """Yield the lines of a raw file, plain or .gz; bytes that its encoding does not hold become half surrogates.

    Raises UserError where the file is damaged or is UTF-16.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline="\n") as file:
            for line in tqdm(file, desc=str(path), unit=" lines", mininterval=0.5):
                if "\0" in line:
                    raise UserError(f"{path} holds NUL bytes: it has to be UTF-8, not UTF-16")
                yield line.removeprefix("\ufeff")  # a byte order mark, of the file or where two were joined
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); get it again") from None


def netflix_rows(lines):
    """Lines "user,stars,date" after a line "MOVIE:" -> "MOVIE,user,stars,date"; "" for what is no row."""
    movie = ""
    for line in lines:
        line = line.strip()
        if line.endswith(":"):
            movie, line = line[:-1], ""
        yield f"{movie},{line}" if line else ""


def csv_rows(path, lines):
    """Yield (number of the line on which it begins, fields) of every row of CSV. Raises UserError on wrong quotes."""
    rows = csv.reader(lines, strict=True)
    number = 1
    try:
        for fields in rows:
            if rows.line_num > number:  # a text that spans lines
                for more in ",".join(fields).split("\n")[1:]:
                    if re.match(r"\d+,", more) and more.count(",") + 1 >= len(fields):  # a row: the quote swallowed it
                        raise UserError(f"{path}, line {number}: a quote opened there closes on line {rows.line_num}")
            yield number, fields
            number = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: {error}; is a quote not closed?") from None


def is_header(path, table, row):
    """Whether the first row of a file is its header: of CSV with named columns always, else if it holds no digit.

    Raises UserError where a column is missing.
    """
    if table.form == "json":
        return False
    if not table.columns:
        return not re.search(r"\d", "".join(row))
    for name in table.columns.split():
        if name not in row:
            raise UserError(f"{path} has no column {name!r}; its first line is {','.join(row)[:80]!r}")
    return True


def fields_of(table, names, row, first):
    """What table.parse takes of a row. names: table.columns, split; first: the first row of the file.

    Raises ValueError on a malformed row.
    """
    if table.form == "json":
        values = json.loads(row)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return [text_of(values.get(name)) for name in names]
    if table.form == "csv":
        if len(row) != len(first):
            raise ValueError(f"{len(row)} fields, not {len(first)}")
        return [row[first.index(name)] for name in names] if names else row
    line = row.rstrip("\r\n")
    return line.split("\t") if table.form == "tsv" else line


def read_rows(path, table, counts):
    """Yield table.parse of every row of a raw file; blank lines are no rows.

    counts[file name] becomes {"rows", "malformed", "first_malformed": its line, beginning and reason}. Raises UserError
    where over 1% of the rows are malformed, where there are none, and where quotes or columns are wrong.
    """
    lines = raw_lines(path, table.encoding)
    if table.form == "netflix":
        lines = netflix_rows(lines)
    rows = csv_rows(path, lines) if table.form == "csv" else enumerate(lines, 1)
    names = table.columns.split()
    first, header = None, None
    count, malformed, first_malformed = 0, 0, None
    for number, row in rows:
        text = row if isinstance(row, str) else ",".join(row)
        text = text.rstrip()
        if not text:
            continue
        if first is None:
            first = row
            if is_header(path, table, row):
                header = text
                continue
        count += 1
        try:
            if text == header:
                raise ValueError("a second header row")
            if not text.isascii():
                text.encode("utf-8", "surrogateescape").decode("utf-8")  # raises ValueError where it was not UTF-8
            parsed = table.parse(fields_of(table, names, row, first))
        except (ValueError, RecursionError) as error:
            malformed += 1
            first_malformed = first_malformed or f"line {number}: {text[:80]!r} ({str(error)[:200]})"
            continue
        yield parsed
    counts[path.name] = {"rows": count, "malformed": malformed, "first_malformed": first_malformed}
    if not count:
        raise UserError(f"{path} is empty: it holds no rows")
    message = f"{path}: {malformed} of {count} rows are malformed; the first, on {first_malformed}"
    if malformed > count / 100:
        raise UserError(f"{message}. Is it the file that --list names?")
    if malformed:
        common.say(message)


def read_table(paths, table, counts):
    """Yield the rows of all files of a table; paths: {name: path}."""
    for file in table.files.split():
        yield from read_rows(paths[file], table, counts)


def read_texts(rows, dropped):
    """{item id: text} of the rows (item, text) that have both, by id. Of several texts the alphabetically first."""
    items = {}
    for item, text in rows:
        if not item:
            dropped["items without id"] += 1
        elif not text:
            dropped["items without text"] += 1
        else:
            items[item] = min(text, items.get(item, text))
    return dict(sorted(items.items()))  # sorted, since negatives are drawn by number


# ------------------------------------------------------------------------------------------------- a sample of users


def sample_users(rows, numbers, job, dropped):
    """All events of a uniform sample of users, in bounded memory, whatever the order of the rows.

    The users are those whose hash is below a threshold. Whenever more than max_rows events are kept, it is halved and
    the users above it are forgotten.

    rows: (user, [(item, time, label)], past); numbers: {item: its number}; job: dataset, seed, max_rows; dropped counts
    what is unusable. Returns events and pasts, as below, the share of all users that is below the threshold, and an
    item not in numbers, or None.
    """
    key = job["seed"], job["dataset"]
    events = {}  # user -> flat array: number of the item, time, label; number, time, label; ...
    pasts = {}  # user -> (time, ids in one string): the earliest history of an impression
    threshold = 2**64  # every hash is below it
    size = 0  # events that are kept
    unknown = None
    for user, new, past in rows:
        if not user:
            dropped["events without user"] += len(new)
            continue
        if user not in events and common.digest(*key, user) < threshold:
            events[user] = array("q")
        kept = events.get(user)  # None: the user is not in the sample
        for item, time, label in new:
            if item not in numbers:
                dropped["events whose item has no text"] += 1
                unknown = item
            elif kept is not None:
                if time is None:  # its place in the file stands for it
                    time = len(kept)
                kept.extend((numbers[item], time, label))
                size += 1
        if past and kept is not None:
            pasts[user] = min(past, pasts.get(user, past))
        while size + 4 * len(events) > job["max_rows"]:  # a user takes the memory of 4 events
            threshold //= 2
            for other in list(events):
                if common.digest(*key, other) >= threshold:
                    size -= len(events.pop(other)) // 3
                    pasts.pop(other, None)
    return events, pasts, threshold / 2**64, unknown


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
    for number, time, label in zip(values[::3], values[1::3], values[2::3]):
        item = item_ids[number]
        latest[item] = max((time, label), latest.get(item, (time, label)))
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
        elif label == 1:
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
    """Items {item id: text}, splits {"train", "valid", "test": users' lines}, and what meta.json says of them.

    paths: {name: path} of the raw files. Raises UserError where there is no sample.
    """
    name = job["dataset"]
    source = SOURCES[name]
    item_table = source.items[0] if source.items[0].files in paths else source.items[-1]
    counts = {"items": {}, "events": {}}
    dropped = Counter()
    items = read_texts(read_table(paths, item_table, counts["items"]), dropped)
    numbers = {item: number for number, item in enumerate(items)}
    rows = read_table(paths, source.events, counts["events"])
    events, pasts, share, unknown = sample_users(rows, numbers, job, dropped)
    chosen, missing = choose_users(events, pasts, items, job, dropped)
    finetune = chosen["train"]  # train and valid together
    more = f" among {share:.2%} of the users: raise --max-rows" if share < 1 else ""
    if not chosen["test"] and not finetune:
        examples = f"; an item of the events is {unknown!r}, of the items {list(items)[:1]}" if unknown else ""
        raise UserError(f"{name}: no samples{more}; dropped: {json.dumps(dropped)}{examples}")
    short = {}
    for split, lacking in missing.items():
        size = job[f"{split}_size"]
        if lacking > 0:
            short[f"{split}_size"] = size - lacking
            common.say(f"WARNING: {name}: --{split}-size asks for {size} samples, {size - lacking} were found{more}")
    valid = tenth_of(finetune)
    splits = {"train": finetune[valid:], "valid": finetune[:valid], "test": chosen["test"]}
    return items, splits, {"rows": counts, "dropped": dropped, "share_of_users": share, "short": short}


def tenth_of(users):
    """How many of the users for fine-tuning are for validation: a tenth, one at least, but none of a single user."""
    return max(1, len(users) // 10) if len(users) > 1 else 0


def choose_users(events, pasts, items, job, dropped):
    """Users in the order of their hashes, until the samples are enough: first for test, then for train (and valid).

    events, pasts: of sample_users; job: test_size, train_size and what user_line takes. Returns {"test", "train":
    lines} and {"test", "train": samples that are missing}, below 0 where the last user brought more.
    """
    item_ids = list(items)
    chosen = {"test": [], "train": []}
    missing = {"test": job["test_size"], "train": job["train_size"]}
    # the hash of sample_users, so that the same users come first whatever --max-rows
    for user in by_hash(events, (job["seed"], job["dataset"])):
        split = "test" if missing["test"] > 0 else "train"
        if missing[split] <= 0:
            break
        latest = latest_events(events[user], item_ids, dropped)
        _, ids = pasts.get(user, (0, ""))
        past = [item for item in ids.split() if item in items]
        dropped["items of histories without text"] += len(ids.split()) - len(past)
        line = user_line(user, latest, past, item_ids, job, dropped)
        if line:
            chosen[split].append(line)
            missing[split] -= len(line["labels"])
    return chosen, missing


def write_lines(path, rows):
    """Write a .jsonl file; half surrogate pairs in ids become JSON escapes again."""
    with open(path, "wb") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))


def write_dataset(folder, items, splits, job):
    """Write items.jsonl and the splits that are not empty; returns what meta.json says of them.

    items: {item id: text}, of which those are written that the splits use.
    """
    used = common.items_of(splits["train"] + splits["valid"] + splits["test"])
    write_lines(folder / "items.jsonl", [{"id": item, "text": items[item]} for item in used])
    name = job["dataset"]
    counts = {}
    for split, users in splits.items():
        if users:
            write_lines(folder / f"{split}.jsonl", users)
            labels = []
            for user in users:
                labels += user["labels"]
            counts[split] = {
                "users": len(users),
                "items": len(common.items_of(users)),
                "samples": len(labels),
                "positives": sum(labels)}
            print(f"{name}/{split}.jsonl: " + ", ".join(f"{value} {what}" for what, value in counts[split].items()))
    return {"domain": common.DOMAINS[name], "job": job, "items": len(used), "splits": counts,
            "sha256": common.data_sha256(folder.parent, folder.name)}


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
    names = ["items.parquet", "users.parquet", "test.parquet", "finetune.parquet", "valid_user_set_0.1.txt"]
    paths = {name: folder / name for name in names if (folder / name).is_file()}
    has_samples = "test.parquet" in paths or "finetune.parquet" in paths
    if "items.parquet" not in paths or "users.parquet" not in paths or not has_samples:
        raise UserError(f"{folder} lacks items.parquet or users.parquet, or has neither test.parquet nor "
                        "finetune.parquet; get them from https://www.kaggle.com/datasets/qijiong/recbench-md")
    return paths


def read_recbench(paths, job):
    """The benchmark's official samples (Kaggle: qijiong/recbench-md), sample for sample: items and splits.

    paths: {name: path} of their files. Kept as they are: texts, duplicates, users of one class, positives that stand in
    the history. Of several rows of one user or item the last counts, as in the authors' code. Raises UserError.
    """
    user_column, item_column, history_column, label_column, *text_columns = RECBENCH[job["dataset"]].split()
    items = {}
    for item, *values in parquet_rows(paths["items.parquet"], item_column, *text_columns):
        items[str(item)] = described(text_columns, [text_of(value) for value in values])
    histories = {}
    for user, history in parquet_rows(paths["users.parquet"], user_column, history_column):
        if history is not None and not isinstance(history, list):
            raise UserError(f"{paths['users.parquet']}: the history of user {user} is no list of items")
        item_ids = [str(item) for item in history or []]
        histories[str(user)] = item_ids[-job["max_history"]:]
    columns = user_column, item_column, label_column
    test = read_samples(paths.get("test.parquet"), histories, columns)
    finetune = read_samples(paths.get("finetune.parquet"), histories, columns)
    if not test and not finetune:
        raise UserError(f"{paths['items.parquet'].parent}: test.parquet and finetune.parquet hold no samples")
    both = test.keys() & finetune.keys()
    if both:
        common.say(f"WARNING: {len(both)} of the {len(test)} test users are in finetune.parquet, too")
    valid = valid_users(paths.get("valid_user_set_0.1.txt"), finetune, job)
    splits = {"train": [], "valid": [], "test": list(test.values())}
    for user, line in finetune.items():
        splits["valid" if user in valid else "train"].append(line)
    used = common.items_of(splits["train"] + splits["valid"] + splits["test"])
    unknown = [item for item in used if item not in items]
    if unknown:
        raise UserError(f"{paths['items.parquet']} lacks {len(unknown)} of {len(used)} items, such as {unknown[0]}")
    return items, splits


def read_samples(path, histories, columns):
    """{user: line}, users in the order of their first sample; {} without a file.

    columns: of user, item and label. Raises UserError where a label is neither 0 nor 1, or a user has no history.
    """
    lines = {}
    if path is None:
        return lines
    for user, item, label in parquet_rows(path, *columns):
        user = str(user)
        if label not in (0, 1):
            raise UserError(f"{path}: the label of user {user} is {label!r}, neither 0 nor 1")
        if user not in histories:
            raise UserError(f"users.parquet lacks user {user}, who has samples in {path}")
        new = {"user": user, "history": histories[user], "candidates": [], "labels": []}
        line = lines.setdefault(user, new)
        line["candidates"].append(str(item))
        line["labels"].append(int(label))
    return lines


def valid_users(path, finetune, job):
    """The users of the validation set: those that the authors' file names, or without it a tenth by hash."""
    if path is None:
        users = by_hash(finetune, (job["seed"], job["dataset"]))
        return set(users[:tenth_of(users)])
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    named = {line.strip() for line in lines}
    if finetune and not finetune.keys() & named:
        raise UserError(f"{path} names no user of finetune.parquet")
    return named


def parquet_rows(path, *columns):
    """Yield the rows of a parquet file as tuples, in file order. Raises UserError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("--from-recbench reads parquet files: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                values = [batch.column(column).to_pylist() for column in columns]
                yield from zip(*values)
    except (ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
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
    liked = [item for item in items if item.split("-")[0] in liked_themes]
    other = [item for item in items if item.split("-")[0] not in liked_themes]
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
    patterns = [pattern for patterns in TITLES.values() for pattern in patterns]
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
    numerals = [str(number) for number in range(1, 21)]
    text = " ".join(documents) + " ".join(prompt + numerals).lower()
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
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(common.run_script(main))
