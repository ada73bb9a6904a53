"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    python transfer_matrix.py --model ... --dry-run | grep finetune.py | parallel      (then: | grep evaluate.py | parallel)
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows are the base model (zero-shot), the model fine-tuned on each source, and on joined sources (a+b: joint training);
columns are the test sets and their mean. Each training is a finetune.py command line and each cell an evaluate.py command
line, printed before it runs; what is there already is not run again. Below OUT: runs/<source>/, cells/<source>/ and
matrix.json (everything), matrix.csv (a line a cell), matrix.md (tables and notes, also printed), matrix.svg (a heat map).
"""
import argparse
import contextlib
import csv
import html
import io
import math
import os
import re
import shlex
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np

import common
import evaluate
import finetune
from common import UserError, say

ZERO = "zero-shot"
ITEMS = 1000  # item texts of a dataset that its mean embedding is taken over
BETTER, WORSE = "+", "-"

# A training or a cell: the module whose command line it is, its arguments, and the file that shows it to be there.
Piece = namedtuple("Piece", "module argv result")


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", metavar="SOURCE", help="datasets to train on, one row each; a+b: trained on both")
    add("--targets", nargs="+", metavar="TARGET", help="datasets to test on, one column each")
    add("--out", metavar="DIR", help="folder of the matrix")
    add("--metric", choices=[name for name in common.METRIC_NAMES if name != "logloss"], default="auc", help="in the cells")
    add("--k", nargs="+", type=common.positive, default=[1, 3, 5], help="of the reciprocal rank average RRA@K")
    add("--dry-run", action="store_true", help="print one command line a missing piece, trainings first, and run nothing")
    add("--finetune-args", default="", metavar="'...'", help="more arguments for finetune.py")
    add("--evaluate-args", default="", metavar="'...'", help="more arguments for evaluate.py")
    add("--compare", nargs="+", metavar="DIR", help="print one table over several matrices: models by setting")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if not args.compare:
        lacking = [f"--{name}" for name in ("model", "sources", "targets", "out") if not getattr(args, name)]
        if lacking:
            parser.error(f"{', '.join(lacking)} must be given (or --compare)")
        if args.model in common.BASELINES:
            parser.error(f"{args.model} cannot be fine-tuned: a matrix needs a model")
        joined = ["+".join(common.check_names(source.split("+"))) for source in args.sources]
        args.sources = by_domain([s for s in joined if "+" not in s]) + list(dict.fromkeys(s for s in joined if "+" in s))
        args.targets = by_domain(args.targets)
    return args


def by_domain(names):
    """Names, none twice, grouped by domain; domains, and datasets within them, in the order given."""
    names = common.check_names(names)
    domains = [common.dataset(name).domain for name in names]
    return sorted(names, key=lambda name: domains.index(common.dataset(name).domain))


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        print(compare(args.compare))
        return 0
    trainings = {source: training(args, source) for source in args.sources}
    cells = {(s, t): cell(args, s, t) for s in [ZERO, *args.sources] for t in args.targets}
    if args.dry_run:
        for piece in [*trainings.values(), *cells.values()]:
            if args.overwrite or not is_there(piece):
                print(command_line(piece))
        return 0
    failed = []
    for source in [ZERO, *args.sources]:
        if source in trainings and not perform(args, trainings[source]):
            failed += [f"training on {source}"]
            continue
        failed += [f"{source} on {t}" for t in args.targets if not perform(args, cells[source, t])]
    matrix = analyse(args, {key: piece.result for key, piece in cells.items()
                            if not {f"training on {key[0]}", f"{key[0]} on {key[1]}"} & set(failed)})
    try:
        matrix["foresight"] = foresight(args, matrix)
    except (UserError, RuntimeError) as error:  # RuntimeError: torch, out of memory
        say(f"the datasets' similarity cannot be had: {error}")
        failed.append("similarity of the datasets")
    matrix["failed"] = failed
    matrix["notes"] = notes(matrix)
    common.write_json(Path(args.out, "matrix.json"), matrix)
    redraw(args.out)
    return 1 if failed else 0

# ------------------------------------------------------------------------------------------------------ command lines


def training(args, source):
    """The command line of a row's training."""
    out = Path(args.out, "runs", source)
    return Piece(finetune, ["--model", args.model, "--train", *source.split("+"), "--out", str(out), *shared_flags(args),
                            *shlex.split(args.finetune_args)], out / "run.json")


def cell(args, source, target):
    """The command line of a cell."""
    out, adapter = Path(args.out, "cells", source), ["--adapter", str(Path(args.out, "runs", source))]
    return Piece(evaluate, ["--model", args.model, *(adapter if source != ZERO else []), "--test", target, "--out", str(out),
                            *shared_flags(args), *shlex.split(args.evaluate_args)], out / f"{target}.json")


def shared_flags(args):
    """The shared flags that are not at their defaults, as they were given."""
    parser, flags = argparse.ArgumentParser(), []
    common.shared_arguments(parser)
    for key, default in vars(parser.parse_args([])).items():
        if (value := getattr(args, key)) != default:
            flags += ["--" + key.replace("_", "-"), *([] if value is True else [str(value)])]
    return flags


def command_line(piece):
    """A piece as a line for a shell."""
    return shlex.join(["python", os.path.relpath(piece.module.__file__), *piece.argv])


def is_there(piece):
    """Whether a piece is finished; finetune.py writes run.json at the start, too."""
    return piece.result.exists() and common.read_json(piece.result).get("finished", True)


def perform(args, piece):
    """Run a piece, from where a killed run stopped; returns whether it succeeded.

    One that is there is called too, for its script to refuse results of other arguments or data, but prints nothing.
    """
    heard = None
    try:
        heard = io.StringIO() if is_there(piece) and not args.overwrite else None
        if not heard:
            print(f"$ {command_line(piece)}", flush=True)
        with contextlib.redirect_stdout(heard or sys.stdout), contextlib.redirect_stderr(heard or sys.stderr):
            code = common.run(piece.module.main, piece.argv)
    except Exception as error:  # out of memory or a fault of ours: the other cells are still worth having
        code, heard = 1, io.StringIO(f"error: {type(error).__name__}: {error}")
    if code == 130:
        sys.exit(code)
    if code:
        say((heard.getvalue().strip() + "\n" if heard else "") + f"failed, left empty: {command_line(piece)}")
    return not code

# ----------------------------------------------------------------------------------------------------------- analysis


def analyse(args, there):
    """The matrix (see the README for its fields) from the results at {(source, target): path}."""
    results = {key: common.read_json(path) for key, path in there.items()}
    samples = {key: (results[key][args.metric], draw(args, key[1], there[key], results[key])) for key in there
               if results[key][args.metric] is not None}  # (value, bootstrap draws)
    domains = {name: common.dataset(name).domain for s in args.sources for name in [*args.targets, *s.split("+")]}
    rows = []
    for source in [ZERO, *args.sources]:
        run = common.read_run(Path(args.out, "runs", source)) if (source, args.targets[0]) in there and source != ZERO else {}
        train = run.get("train_chain", [] if source == ZERO else source.split("+"))
        average = lambda targets: estimate([samples.get((source, t)) for t in targets], [samples.get((ZERO, t)) for t in targets],
                                           source == ZERO)
        row = {"source": source, "train": train, "training": {key: run.get(key) for key in (
            "steps", "samples", "seconds", "best", "curve", "unstable", "valid")} if run else None, "cells": {}}
        for target in args.targets:
            result = results.get((source, target))
            if (entry := average([target])) is not None:
                entry["ci"] = result["ci"][args.metric]  # as evaluate.py printed it
                entry.update({key: result[key] for key in ("n_users", "n_samples", "collapsed", "data_sha256")})
                row["cells"][target] = {"setting": common.setting_of(train, target), **entry}
        row["mean"] = average(args.targets)
        row["unseen"] = average([t for t in args.targets if t not in train])
        row["by_domain"] = {d: average([t for t in args.targets if domains[t] == d]) for d in dict.fromkeys(map(domains.get, args.targets))}
        rows.append(row)
    single = {row["source"]: {t: row["cells"].get(t, {}).get("value") for t in args.targets}
              for row in rows[1:] if "+" not in row["source"] and row["cells"]}
    compared = [c for row in rows[1:] for c in row["cells"].values() if c["gain_ci"]]
    return {"model": common.MODELS.get(args.model, args.model), "type": args.type, "metric": args.metric, "targets": args.targets,
            "domains": domains, "rows": rows, "rra": {str(k): common.reciprocal_rank_average(single, k) for k in args.k},
            "marks": {"compared": len(compared), **{mark: sum(c["mark"] == mark for c in compared) for mark in (BETTER, WORSE)},
                      "by_chance": 0.05 * len(compared)}, "foresight": None, "seed": args.seed, "versions": common.versions()}


def draw(args, target, path, result):
    """Bootstrap draws of a cell's metric. Seeded by the target: paired within a column, independent between columns."""
    arrays = evaluate.read_scores(path.with_suffix(".scores.jsonl"), args.data, target, result["split"], result["n_users"])
    return common.bootstrap(*arrays, [args.metric], seed=common.digest(args.seed, target))[args.metric]


def estimate(samples, zero, is_zero=False):
    """Mean of cells [(value, draws)] and its difference from the zero-shot cells of the same targets, with intervals.

    Returns {value, ci, gain, gain_ci, mark}, None where a cell is empty. The mark is set where the gain's 95% interval
    (paired bootstrap over the same users) excludes zero.
    """
    if not samples or None in samples:
        return None
    value, draws = (np.mean([sample[i] for sample in samples], 0) for i in (0, 1))
    entry = {"value": float(value), "ci": common.interval(draws), "gain": None, "gain_ci": None, "mark": ""}
    if is_zero or None in zero:
        return entry
    base, base_draws = (np.mean([sample[i] for sample in zero], 0) for i in (0, 1))
    low, high = entry["gain_ci"] = common.interval(draws - base_draws)
    return {**entry, "gain": float(value - base), "mark": BETTER if low > 0 else WORSE if high < 0 else ""}


def foresight(args, matrix):
    """Does likeness of source and target go with the gain over zero-shot? Pairs source != target, rank correlations."""
    gains = {(row["source"], t): c["gain"] for row in matrix["rows"][1:] if "+" not in row["source"]
             for t, c in row["cells"].items() if t != row["source"] and c["gain"] is not None}
    alike = similarity(args, sorted({name for pair in gains for name in pair})) if gains else {}
    pairs = [{"source": s, "target": t, **alike[" ".join(sorted((s, t)))], "gain": gain} for (s, t), gain in gains.items()]
    column = lambda key: [pair[key] for pair in pairs]
    return {"pairs": pairs, **{key: rank_correlation(column(key), column("gain")) for key in ("cosine", "overlap")}}


def similarity(args, names):
    """{"a b": {"cosine": of the mean item embeddings under the base model, "overlap": Jaccard index of the item texts'
    words}} of each pair of datasets in alphabetical order, from OUT/similarity.json where it holds just these."""
    path, model = Path(args.out, "similarity.json"), common.MODELS.get(args.model, args.model)
    of = {**{key: getattr(args, key) for key in ("chat_template", "pooling", "dtype", "max_length")}, "model": model,
          "prompt": common.load_prompt(args.prompt), "fingerprint": common.fingerprint(model),
          "data": {name: common.read_meta(args.data, name)["sha256"] for name in names}}
    if path.exists() and (known := common.read_json(path))["of"] == of:
        return known["pairs"]
    scorer, mean, words = common.load_scorer(argparse.Namespace(**{**vars(args), "type": "embed"})), {}, {}
    for name in names:
        items, _ = common.read_items(args.data, name)
        sample = sorted(items, key=lambda item: common.digest(name, item))[:ITEMS]
        ids, _ = common.embedding_tokens(scorer, [], [items[item] for item in sample])
        mean[name] = np.mean(common.embed_all(scorer, ids), 0)
        words[name] = set(re.findall(r"\w+", " ".join(items.values()).lower()))
    pairs = {f"{a} {b}": {"cosine": common.cosine(mean[a], mean[b]), "overlap": len(words[a] & words[b]) / len(words[a] | words[b])}
             for a in names for b in names if a < b}
    common.write_json(path, {"of": of, "pairs": pairs})
    return pairs


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, tied values at their average rank; None below 3 pairs or without spread."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place] if len(values) else np.zeros(0))
    if len(a) < 3 or min(np.ptp(r) for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])

# ------------------------------------------------------------------------------------------------------------- tables


def redraw(folder):
    """matrix.csv, .md and .svg from matrix.json alone; prints the tables."""
    matrix = common.read_json(Path(folder, "matrix.json"))
    text = markdown(matrix)
    common.write_atomically(Path(folder, "matrix.md"), text)
    common.write_atomically(Path(folder, "matrix.csv"), comma_separated(matrix))
    common.write_atomically(Path(folder, "matrix.svg"), draw_svg(matrix))
    print(f"\n{text}\n{folder}: matrix.json, matrix.csv, matrix.md, matrix.svg")


def markdown(matrix):
    """The matrix as three tables (metric; difference from zero-shot; averages, RRA, training) and its notes."""
    rows, targets, name = matrix["rows"], matrix["targets"], metric_name(matrix)
    entries = lambda row: [*(row["cells"].get(t) for t in targets), row["mean"]]
    value = lambda e: "" if e is None else f"{e.get('setting', '')} {e['value']:.3f}{e['mark']} {span(e['ci'])}".strip()
    gain = lambda e: "" if e is None or e["gain"] is None else f"{e['gain']:+.3f}{e['mark']} {span(e['gain_ci'])}"
    number = lambda x, digits=3: "" if x is None else f"{x:,.{digits}f}"
    values = [[f"{name}: trained on", *targets, "mean"], *([row["source"], *map(value, entries(row))] for row in rows)]
    gains = [["difference from zero-shot", *targets, "mean", "mean of unseen"],
             *([row["source"], *map(gain, [*entries(row), row["unseen"]])] for row in rows[1:])]
    head = ["trained on", *(f"{d} mean" for d in rows[0]["by_domain"]), *(f"RRA@{k}" for k in matrix["rra"]), "steps", "samples", "best at"]
    sums = [[row["source"], *(number(e and e["value"]) for e in row["by_domain"].values()),
             *(number(rra.get(row["source"])) for rra in matrix["rra"].values()),
             *(number(row["training"] and row["training"][key], 0) for key in ("steps", "samples")),
             number(row["training"] and row["training"]["best"]["step"], 0)] for row in rows]
    return "\n".join([f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based", "", *table(values), "", *table(gains), "",
                      *table([head, *sums]), "", *(f"- {note}" for note in matrix["notes"])]) + "\n"


def table(rows):
    """Lines of a Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def span(interval):
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def metric_name(matrix):
    return matrix["metric"].replace("_", " ").replace("auc", "AUC")


def notes(matrix):
    """What has to be said under the table: marks, intervals, warnings, foresight."""
    rows, marks, fore = matrix["rows"], matrix["marks"], matrix["foresight"]
    lines = [f"{BETTER} better, {WORSE} worse (negative transfer) than zero-shot: the 95% interval of the difference over the same users "
             f"excludes zero. {marks[BETTER]} better and {marks[WORSE]} worse of {marks['compared']} cells compared; by chance alone, "
             f"5% would be marked: {marks['by_chance']:.1f}.",
             "The intervals cover the choice of users, not the luck of a training run.",
             "Mean of unseen: over the targets that the row was not trained on. RRA@K: mean over targets of 1/rank of the source "
             "among all single sources but the target's own, 0 beyond rank K."]
    collapsed = [t for t, c in rows[0]["cells"].items() if c["collapsed"]]
    if collapsed:
        lines.append(f"Zero-shot collapse on {', '.join(collapsed)}: the base model's scores tell nothing about these users (group AUC "
                     "within 0.02 or so of chance).")
    for row in rows[1:]:
        run = row["training"] or {}
        if run.get("unstable"):
            lines.append(f"Unstable training on {row['source']}: the validation metric fell by more than 0.05 between evaluations.")
        if other := sorted(set(run.get("valid") or []) - set(row["train"])):
            lines.append(f"{row['source']}: labels of {', '.join(other)} chose the checkpoint (--valid), so it is not unseen.")
    if fore:
        rho = lambda key: "undefined" if fore[key] is None else f"{fore[key]:+.2f}"
        lines.append(f"Rank correlation with the difference from zero-shot over {len(fore['pairs'])} pairs source, target: cosine of mean "
                     f"item embeddings {rho('cosine')}, vocabulary overlap {rho('overlap')}.")
    return lines + [f"Failed, left empty: {', '.join(matrix['failed'])}."] * bool(matrix["failed"])


def comma_separated(matrix):
    """A line a cell, mean and domain average, for a spreadsheet."""
    out, bounds = io.StringIO(), lambda interval: interval or ["", ""]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["source", "target", "domain", "setting", matrix["metric"], "low", "high", "gain", "gain_low", "gain_high", "mark",
                     "users", "steps", "samples"])
    for row in matrix["rows"]:
        entries = [*((t, matrix["domains"][t], c) for t, c in row["cells"].items()), ("mean", "", row["mean"]),
                   *(("mean", domain, e) for domain, e in row["by_domain"].items())]
        for target, domain, e in entries:
            if e:
                run = row["training"] or {}
                writer.writerow([row["source"], target, domain, e.get("setting", ""), e["value"], *bounds(e["ci"]), e["gain"],
                                 *bounds(e["gain_ci"]), e["mark"], e.get("n_users", ""), run.get("steps", ""), run.get("samples", "")])
    return out.getvalue()


def compare(folders):
    """One table over several matrices: models by setting, and how much joint training with the target adds (H - G).

    A setting's number is the mean over the targets that have it in every matrix (so models are compared on the same),
    each the mean over its cells with that letter. H - G is over targets that have both.
    """
    matrices = [common.read_json(Path(folder, "matrix.json")) for folder in folders]
    if len({matrix["metric"] for matrix in matrices}) > 1:
        raise UserError(f"these matrices hold different metrics: {', '.join(m['metric'] for m in matrices)}")
    tables = []
    for matrix in matrices:
        cells = [(c["setting"], t, c["value"]) for row in matrix["rows"] for t, c in row["cells"].items()]
        tables.append({key: np.mean([v for *k, v in cells if tuple(k) == key]) for key in {(s, t) for s, t, _ in cells}})
    shared = set.intersection(*map(set, tables))
    targets = {s: sorted(t for letter, t in shared if letter == s) for s in sorted({letter for letter, _ in shared})}
    both = sorted(set(targets.get("G", [])) & set(targets.get("H", [])))
    mean = lambda cells, letter, names: sum(cells[letter, t] for t in names) / len(names)
    lines = [[f"{metric_name(matrices[0])} (targets)", *(f"{s} ({len(names)})" for s, names in targets.items()), f"H - G ({len(both)})"]]
    for folder, matrix, cells in zip(folders, matrices, tables):
        gap = f"{mean(cells, 'H', both) - mean(cells, 'G', both):+.3f}" if both else ""
        lines.append([f"{matrix['model']}, {matrix['type']} ({folder})", *(f"{mean(cells, s, t):.3f}" for s, t in targets.items()), gap])
    return "\n".join([*table(lines), *(f"{s}: {common.SETTINGS[s]}" for s in targets),
                      "Means over the targets that have a setting in every matrix; H - G over targets that have both."])

# ------------------------------------------------------------------------------------------------------------ picture

WIDTH, HEIGHT, GAP, LEFT, TOP = 92, 56, 12, 200, 132  # of a cell; between groups; where the cells begin
INK, GREY, NONE, BLUE, ORANGE = "#1f2328", "#59636e", (246, 246, 246), (33, 102, 172), (196, 92, 8)


def draw_svg(matrix):
    """The matrix as a heat map (SVG text): coloured by the difference from zero-shot, blue better, orange worse."""
    rows, targets, domains = matrix["rows"], matrix["targets"], matrix["domains"]
    groups = [domains[t] for t in targets]
    xs = places([*groups, None], WIDTH, LEFT)
    ys = places([row["source"] if row["source"] == ZERO else domains.get(row["source"]) for row in rows], HEIGHT, TOP)
    entries = [(x, y, row, t, row["cells"].get(t) if t else row["mean"]) for y, row in zip(ys, rows) for x, t in zip(xs, [*targets, None])]
    limit = max([0.05, *(math.ceil(abs(e["gain"]) * 20 - 1e-9) / 20 for *_, e in entries if e and e["gain"])])
    right, bottom = xs[-1] + WIDTH, ys[-1] + HEIGHT
    middle = (LEFT + xs[-2] + WIDTH) / 2
    out = [label(24, 36, f"What transfers: {metric_name(matrix)} of {matrix['model']}", 18, "start", weight="bold"),
           label(24, 56, f"{matrix['type']}-based scores; rows: fine-tuned on, columns: tested on", 12, "start", GREY),
           label(middle, 84, "tested on", 12, fill=GREY), label(24, (TOP + bottom) / 2, "trained on", 12, fill=GREY, turn=True)]
    for group in dict.fromkeys(groups):
        own = [x for x, g in zip(xs, groups) if g == group]
        out += [label((own[0] + own[-1] + WIDTH) / 2, 104, group, 11, fill=GREY), line(own[0], 109, own[-1] + WIDTH)]
    out += [label(x + WIDTH / 2, TOP - 8, t or "mean", 13, weight="bold" if t else "normal") for x, t in zip(xs, [*targets, None])]
    for y, row in zip(ys, rows):
        wrapped = textwrap.wrap(row["source"].replace("+", " + "), 22, max_lines=4, placeholder=" ...")
        wrapped += [domains[row["source"]]] if row["source"] in domains else []
        for i, part in enumerate(wrapped):
            out.append(label(LEFT - 10, y + HEIGHT / 2 + 4 + 14 * (i - (len(wrapped) - 1) / 2), part, 13 if i == 0 else 11, "end",
                             GREY if i and row["source"] in domains else INK))
    for x, y, row, target, e in entries:
        out += draw_cell(x, y, e, limit, f"trained on {row['source']}, tested on {target or 'all (mean)'}")
    return "\n".join(out)


def draw_cell(x, y, e, limit, about):
    return []


def places(groups, size, start):
    """Where things of one size begin that stand side by side, with a gap between groups."""
    steps = [size + GAP * (a != b) for a, b in zip(groups, groups[1:])]
    return [start + sum(steps[:i]) for i in range(len(groups))]


def label(*a, **k):
    return ""


def line(*a):
    return ""


if __name__ == "__main__":
    sys.exit(common.run(main))
