"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    ... --dry-run | grep finetune.py | parallel        then        ... --dry-run | grep evaluate.py | parallel
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows: the base model (zero-shot), the model fine-tuned on each source, and on joined sources (a+b). Columns: the test
sets and their means. A training is a finetune.py command line, a cell an evaluate.py command line, printed before it
runs; what is there is not run again. Writes OUT/matrix.json (everything), .csv, .md (also printed) and .svg (a heat map),
beside OUT/runs/<source>/ and OUT/cells/<source>/. What fails is left empty; exit code 1 then.
"""
import argparse
import contextlib
import html
import io
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np

import common
import evaluate
import finetune
from common import UserError, say

ZERO = "zero-shot"
ITEMS = 1000  # item texts that a dataset's mean embedding is taken over
SIGN = {"better": "▲", "worse": "▼", "": ""}


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", metavar="SOURCE", help="datasets to train on, one row each; a+b: trained on both")
    add("--targets", nargs="+", metavar="TARGET", help="datasets to test on, one column each")
    add("--out", metavar="DIR", help="folder of the matrix")
    add("--metric", choices=[m for m in common.METRIC_NAMES if m != "logloss"], default="auc", help="in the cells")
    add("--k", nargs="+", type=common.positive, default=[1, 3, 5], help="of the reciprocal rank average RRA@K")
    add("--dry-run", action="store_true", help="run nothing; print the command line of each missing training and cell")
    add("--finetune-args", default="", metavar="'...'", help="more for finetune.py: --finetune-args='--lr 1e-3'")
    add("--evaluate-args", default="", metavar="'...'", help="more for evaluate.py")
    add("--compare", nargs="+", metavar="DIR", help="print one table over several matrices: models by setting")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if not args.compare:
        if not (args.model and args.sources and args.targets and args.out) or args.model in common.BASELINES:
            parser.error("give --model (one that can be fine-tuned), --sources, --targets and --out, or --compare")
        sources = dict.fromkeys("+".join(common.check_names(source.split("+"))) for source in args.sources)
        args.sources = by_domain([s for s in sources if "+" not in s]) + [s for s in sources if "+" in s]
        args.targets = by_domain(args.targets)
    return args


def by_domain(names):
    """Names grouped by domain, none twice; domains, and datasets within them, in the order given."""
    domains = [common.dataset(name).domain for name in names]
    return sorted(common.check_names(names), key=lambda name: domains.index(common.dataset(name).domain))


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        return print(compare(args.compare))
    pieces = {(s, t): piece(args, s, t) for s in [ZERO, *args.sources] for t in [None, *args.targets]}
    del pieces[ZERO, None]
    if args.dry_run:
        missing = [this for this in pieces.values() if args.overwrite or not is_there(this[-1])]
        for _, _, line, _ in sorted(missing, key=lambda this: this[0] is evaluate):  # trainings first
            print(line)
        return 0
    done = {}
    for (source, target), this in pieces.items():
        if target is None or source == ZERO or (source, None) in done:  # no cells without their training
            if perform(args, *this):
                done[source, target] = this[-1]
    matrix = analyse(args, done)
    matrix["failed"] = [f"{s} on {t}" if t else f"training on {s}" for s, t in pieces if (s, t) not in done]
    try:
        matrix["foresight"] = foresight(args, matrix)
    except (UserError, RuntimeError) as error:  # RuntimeError: torch is out of memory
        matrix["foresight"] = None
        matrix["failed"].append(f"likeness of the datasets ({error})")
    common.write_json(Path(args.out, "matrix.json"), matrix)
    redraw(args.out)
    return int(bool(matrix["failed"]))

# ------------------------------------------------------------------------------------------------------ command lines


def piece(args, source, target=None):
    """A row's training or, given a target, a cell: (script's module, arguments, command line, last file)."""
    run, out = Path(args.out, "runs", source), Path(args.out, "cells", source)
    if target is None:
        module, result, own = finetune, run / "run.json", ["--train", *source.split("+"), "--out", str(run)]
    else:
        module, result, own = evaluate, out / f"{target}.json", ["--test", target, "--out", str(out)]
        own += [] if source == ZERO else ["--adapter", str(run)]
    more = args.evaluate_args if target else args.finetune_args
    argv = ["--model", args.model, *own, *shared_flags(args), *shlex.split(more)]
    return module, argv, shlex.join(["python", os.path.relpath(module.__file__), *argv]), result


def shared_flags(args):
    """The shared flags that are not at their defaults, as they were given."""
    parser = argparse.ArgumentParser()
    common.shared_arguments(parser)
    usual = vars(parser.parse_args([]))
    given = {"--" + key.replace("_", "-"): getattr(args, key) for key in usual if getattr(args, key) != usual[key]}
    return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, str(value)])]


def is_there(result):
    """Whether a piece is finished (finetune.py writes run.json at its start, too)."""
    return result.exists() and common.read_json(result).get("finished", True)


def perform(args, module, argv, line, result):
    """Run a piece; returns whether it succeeded. One that is there runs as well, silently: its script refuses what was
    made with other arguments or data."""
    there = is_there(result) and not args.overwrite
    if not there:
        print(f"$ {line}", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO() if there else sys.stdout):
            code = common.run(module.main, argv)
    except Exception as error:  # whatever it is, say out of memory: the other cells are still worth having
        code = say(f"error: {type(error).__name__}: {error}") or 1
    if code == 130:  # Ctrl-C
        sys.exit(code)
    if code:
        say(f"failed, left empty: {line}")
    return not code

# ----------------------------------------------------------------------------------------------------------- analysis


def analyse(args, done):
    """The matrix from the files of what is done, {(source, target): path}; that in OUT if it was made of just these.

    The cells of a row are estimates (see there) by target and for means over targets; an empty cell is {}.
    """
    known = common.read_json(path) if (path := Path(args.out, "matrix.json")).exists() else {}
    made_of = f"{common.digest(vars(args), *(path.read_text() for path in [Path(__file__), *done.values()])):016x}"
    if known.get("made_of") == made_of:
        return known
    results = {key: common.read_json(path) for key, path in done.items()}
    samples = {key: (result[args.metric], draw(args, key[1], result, done[key]))
               for key, result in results.items() if key[1] and result[args.metric] is not None}
    domains = {name: common.dataset(name).domain for name in [*args.targets, *"+".join(args.sources).split("+")]}
    columns, rows = {**{t: [t] for t in args.targets}, "mean": args.targets}, []
    for domain in dict.fromkeys(domains[t] for t in args.targets):
        if len(several := [t for t in args.targets if domains[t] == domain]) > 1:
            columns[f"mean of {domain}"] = several
    for source in [ZERO, *args.sources]:
        run, cells = results.get((source, None), {}), {}
        train = run.get("train_chain", [] if source == ZERO else source.split("+"))
        for column, targets in {**columns, "mean of unseen": [t for t in args.targets if t not in train]}.items():
            here, zero = ([samples.get((row, t)) for t in targets] for row in (source, ZERO))
            cell = cells[column] = estimate(here, [] if source == ZERO else zero)
            if cell and (result := results.get((source, column))):  # the interval as evaluate.py printed it
                cell.update(setting=common.setting_of(train, column), value_ci=result["ci"][args.metric],
                            **{key: result[key] for key in "n_users n_samples collapsed data_sha256".split()})
        rows.append({"source": source, "train": train, "training": run, "cells": cells})
    values = {row["source"]: {t: row["cells"][t].get("value") for t in args.targets} for row in rows}
    singles = {source: row for source, row in values.items() if source in domains and any(row.values())}
    marks = [row["cells"][t]["mark"] for row in rows for t in args.targets if row["cells"][t].get("gain_ci")]
    return {"model": common.MODELS.get(args.model, args.model), "type": args.type, "metric": args.metric,
            "targets": args.targets, "domains": domains, "rows": rows, "seed": args.seed, "made_of": made_of,
            "marks": {"compared": len(marks), "better": marks.count("better"), "worse": marks.count("worse"),
                      "by_chance": 0.05 * len(marks)},
            "rra": {str(k): common.reciprocal_rank_average(singles, k) for k in args.k},
            "foresight": known.get("foresight"), "versions": common.versions()}


def draw(args, target, result, path):
    """Bootstrap draws of a cell's metric. Seeded by target: paired within a column, independent between columns."""
    path = path.with_suffix(".scores.jsonl")
    arrays = evaluate.read_scores(path, args.data, target, result["split"], result["n_users"])
    return common.bootstrap(*arrays, [args.metric], seed=common.digest(args.seed, target))[args.metric]


def estimate(cells, zero):
    """{value, value_ci, gain, gain_ci, mark} of the mean of cells [(value, draws)], {} if one is None.

    gain: difference from `zero`, the zero-shot cells of the same targets; ci: 95%, the gain's by paired bootstrap over the
    same users; mark: "better" or "worse" where that excludes zero.
    """
    if not cells or None in cells:
        return {}
    value, draws = (np.mean(column, 0) for column in zip(*cells))
    entry = {"value": float(value), "value_ci": common.interval(draws), "gain": None, "gain_ci": None, "mark": ""}
    if zero and None not in zero:
        base, base_draws = (np.mean(column, 0) for column in zip(*zero))
        low, high = entry["gain_ci"] = common.interval(draws - base_draws)
        entry.update(gain=float(value - base), mark="better" if low > 0 else "worse" if high < 0 else "")
    return entry


def foresight(args, matrix):
    """Does likeness go with the gain over zero-shot? Pairs of single source and other target, rank correlations."""
    names, before = list(matrix["domains"]), matrix["foresight"] or {}
    of = [args.model, common.fingerprint(args.model), args.pooling, args.dtype, args.max_length, args.chat_template,
          common.load_prompt(args.prompt), {name: common.read_meta(args.data, name)["sha256"] for name in names}]
    alike = before["alike"] if before.get("of") == of else likeness(args, names)
    pairs = [{"source": row["source"], "target": t, "gain": row["cells"][t]["gain"], **alike[f"{row['source']} {t}"]}
             for row in matrix["rows"] for t in matrix["targets"]
             if f"{row['source']} {t}" in alike and row["cells"][t].get("gain_ci")]
    rho = {key: rank_correlation([[pair[key], pair["gain"]] for pair in pairs]) for key in ("cosine", "overlap")}
    return {"of": of, "alike": alike, "pairs": pairs, **rho}


def likeness(args, names):
    """{"a b": {"cosine": of the mean item embeddings of a and b under the base model, "overlap": Jaccard index of the
    words of their item texts}} of all pairs of datasets."""
    scorer, mean, words = common.load_scorer(argparse.Namespace(**{**vars(args), "type": "embed"})), {}, {}
    for name in names:
        items, _ = common.read_items(args.data, name)
        texts = [items[i] for i in sorted(items, key=lambda item: common.digest(name, item))[:ITEMS]]
        mean[name] = np.mean(common.embed_all(scorer, common.embedding_tokens(scorer, [], texts)[0]), 0)
        words[name] = set(re.findall(r"\w+", " ".join(items.values()).lower()))
    overlap = lambda a, b: len(a & b) / len(a | b)
    return {f"{a} {b}": {"cosine": common.cosine(mean[a], mean[b]), "overlap": overlap(words[a], words[b])}
            for a in names for b in names if a != b}


def rank_correlation(pairs):
    """Spearman's: the correlation of ranks, ties at their average rank; None below 3 pairs or without spread."""
    rank = lambda column: [sum(y < x for y in column) + sum(y == x for y in column) / 2 for x in column]
    ranks = [rank(column) for column in zip(*pairs)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(pairs) > 2 and all(map(np.ptp, ranks)) else None

# ------------------------------------------------------------------------------------------------------------- tables


def redraw(folder):
    """matrix.csv, .md and .svg from matrix.json alone; prints the tables."""
    matrix = common.read_json(Path(folder, "matrix.json"))
    for kind, form in (("csv", comma_separated), ("md", markdown), ("svg", draw_svg)):
        common.write_atomically(Path(folder, f"matrix.{kind}"), form(matrix))
    print(f"\n{markdown(matrix)}\n{folder}: matrix.json, matrix.csv, matrix.md, matrix.svg")


def markdown(matrix):
    """The matrix as three tables (the metric; differences from zero-shot; RRA and training) and notes."""
    rows, columns, rra = matrix["rows"], list(matrix["rows"][0]["cells"]), matrix["rra"]
    number = lambda x, form: "" if x is None else format(x, form)
    show = lambda c, key, form: " ".join([c.get("setting", ""), format(c[key], form), span(c[key + "_ci"]), SIGN[c["mark"]]])
    line = lambda row, *how: [row["source"], *(show(c, *how).strip() if c.get(how[0]) is not None else ""
                                               for c in row["cells"].values())]
    tables = [[[f"{matrix['metric']}, trained on", *columns], *(line(row, "value", ".3f") for row in rows)],
              [["difference from zero-shot", *columns], *(line(row, "gain", "+.3f") for row in rows[1:])],
              [["trained on", *(f"RRA@{k}" for k in rra), "steps", "samples", "best at step"]]]
    for source, run in [(row["source"], row["training"]) for row in rows[1:]]:
        counts = run.get("steps"), run.get("samples"), run.get("best", {}).get("step")
        tables[2].append([source, *(number(rra[k].get(source), ".3f") for k in rra), *(number(n, "d") for n in counts)])
    head = f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based"
    return "\n\n".join([head, *map(table, tables), "\n".join(f"- {note}" for note in notes(matrix))]) + "\n"


def table(rows):
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], re.sub("[^|]", "-", lines[0]), *lines[1:]])


def span(interval):
    return "[{:.3f}, {:.3f}]".format(*interval) if interval else ""


def notes(matrix):
    """What has to be said under the tables."""
    rows, marks, fore = matrix["rows"], matrix["marks"], matrix["foresight"] or {"pairs": []}
    rho = lambda key: "undefined" if fore.get(key) is None else f"{fore[key]:+.2f}"
    warnings = {
        "Zero-shot collapse, scores no better than chance": [t for t, c in rows[0]["cells"].items() if c.get("collapsed")],
        "Unstable training, validation fell by more than 0.05": [r["source"] for r in rows if r["training"].get("unstable")],
        "Labels of sets not trained on chose the checkpoint (--valid)": [
            r["source"] for r in rows if not set(r["training"].get("valid", [])) <= set(r["train"])],
        "Failed": matrix["failed"]}
    return [
        f"▲ better, ▼ worse (negative transfer) than zero-shot: the 95% interval of the difference, over the same users, "
        f"excludes zero. {marks['better']} better and {marks['worse']} worse of {marks['compared']} cells; if nothing "
        f"differed, chance would mark {marks['by_chance']:.1f} (5%).",
        "The intervals cover the choice of users, not the luck of a training run.",
        "Unseen: targets not trained on. RRA@K: mean over targets of 1 / rank among the other single sources, 0 beyond K.",
        f"Rank correlation with the difference from zero-shot, over {len(fore['pairs'])} pairs of source and target: "
        f"cosine of mean item embeddings {rho('cosine')}, vocabulary overlap {rho('overlap')}.",
        *(f"{what}: {', '.join(names)}." for what, names in warnings.items() if names)]


def comma_separated(matrix):
    """A line a cell, means included, for a spreadsheet."""
    head = "source target domain setting {} low high gain gain_low gain_high mark users steps samples"
    lines = [head.format(matrix["metric"]).split()]
    for row, t, c in [(row, t, c) for row in matrix["rows"] for t, c in row["cells"].items() if c]:
        run, gain_ci = row["training"], c["gain_ci"] or [None, None]
        lines.append([row["source"], t, matrix["domains"].get(t), c.get("setting"), c["value"], *c["value_ci"],
                      c["gain"], *gain_ci, c["mark"], c.get("n_users"), run.get("steps"), run.get("samples")])
    return "".join(",".join("" if x is None else str(x) for x in line) + "\n" for line in lines)


def compare(folders):
    """One table over several matrices: models by setting, and what joint training with the target adds (H - G).

    A setting's number is a mean over the targets that have it in every matrix, each the mean of its cells there.
    """
    matrices = [common.read_json(Path(folder, "matrix.json")) for folder in folders]
    if len(metrics := {matrix["metric"] for matrix in matrices}) > 1:
        raise UserError(f"the matrices hold different metrics: {', '.join(sorted(metrics))}")
    values = lambda matrix, letter, t: [row["cells"][t]["value"] for row in matrix["rows"]
                                        if row["cells"].get(t, {}).get("setting") == letter]
    mean = lambda matrix, letter, names: np.mean([np.mean(values(matrix, letter, t)) for t in names])
    targets = {letter: [t for t in matrices[0]["targets"] if all(values(m, letter, t) for m in matrices)]
               for letter in common.SETTINGS}
    letters = [letter for letter in targets if targets[letter]]
    both = [t for t in targets["G"] if t in targets["H"]]
    lines = [[*metrics, *(f"{letter} ({len(targets[letter])})" for letter in letters), f"H - G ({len(both)})"]]
    for folder, m in zip(folders, matrices):
        gap = f"{mean(m, 'H', both) - mean(m, 'G', both):+.3f}" if both else ""
        means = [f"{mean(m, letter, targets[letter]):.3f}" for letter in letters]
        lines.append([f"{m['model']}, {m['type']} ({folder})", *means, gap])
    return "\n".join([table(lines), *(f"- {letter}: {common.SETTINGS[letter]}" for letter in letters),
                      "- Means over the targets (how many) that have the setting, or H and G, in every matrix."])

# ------------------------------------------------------------------------------------------------------------ picture

WIDTH, HEIGHT, GAP, LEFT, TOP = 92, 60, 14, 196, 142  # of a cell; between groups; where the cells begin
INK, GREY, NEUTRAL, BLUE, ORANGE = "#1f2328", "#59636e", (244, 244, 242), (24, 88, 160), (160, 58, 0)


def draw_svg(matrix):
    """The matrix as a heat map (SVG text), coloured by the difference from zero-shot: blue better, orange worse.

    Triangles repeat the marks, for print without colour; a white card makes it readable on dark pages.
    """
    rows, columns, domains = matrix["rows"], [*matrix["targets"], "mean"], matrix["domains"]
    xs = places([domains.get(target) for target in columns], WIDTH, LEFT)
    ys = places([domains.get(row["source"], "+" in row["source"]) for row in rows], HEIGHT, TOP)
    limit = max([0.05, *(abs(row["cells"][t].get("gain") or 0) for row in rows for t in columns)])  # darkest colour
    width, bottom = max(xs[-1] + WIDTH, LEFT + 490) + 28, ys[-1] + HEIGHT
    title = f"Transfer matrix: {matrix['metric'].upper()} of {matrix['model']}"
    out = [label(24, 38, title, 19, "start", room=width - 48, weight="bold"),
           label(24, 60, f"{matrix['type']}-based scores; small: difference from zero-shot", 12.5, "start", GREY),
           label((LEFT + xs[-2] + WIDTH) / 2, 92, "tested on", 13, fill=GREY),
           f'<g transform="translate(24 {(TOP + bottom) / 2}) rotate(-90)">{label(0, 0, "trained on", 13, fill=GREY)}</g>']
    for domain in dict.fromkeys(domains[t] for t in columns[:-1]):
        own = [x for x, t in zip(xs, columns) if domains.get(t) == domain]
        middle, room = (own[0] + own[-1] + WIDTH) / 2, own[-1] - own[0] + WIDTH
        out += [label(middle, TOP - 33, domain, 11.5, fill=GREY, room=room),
                f'<path d="M{own[0]} {TOP - 28}h{room}" stroke="#afb8c1"/>']
    out += [label(x + WIDTH / 2, TOP - 10, target, 13, room=WIDTH, weight="bold") for x, target in zip(xs, columns)]
    for y, row in zip(ys, rows):
        source, one = row["source"], row["source"] in domains
        names = textwrap.wrap(source.replace("+", " + "), 22, max_lines=4, placeholder=" ...")
        for i, name in enumerate(names + one * [domains.get(source)]):
            look = (11.5, "end", GREY) if i and one else (11.5 if "+" in source else 13, "end", INK, "bold")
            at = y + HEIGHT / 2 + 12 + 14 * (i - (len(names) + one) / 2)
            out.append(label(LEFT - 12, at, name, *look, room=LEFT - 44))
        for x, target in zip(xs, columns):
            out += draw_cell(x, y, row["cells"][target], limit, f"trained on {source}, tested on {target}")
    legend, height = draw_legend(matrix, limit, bottom + 22)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif"><rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>')
    return re.sub(r"[^\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", "\n".join([head, *out, *legend, "</svg>\n"]))


def draw_cell(x, y, cell, limit, about):
    """SVG lines of a cell: value, setting's letter, difference from zero-shot, a triangle where it is marked."""
    middle, box = x + WIDTH / 2, f'<rect x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="5" '
    if not cell:
        return [box + 'fill="none" stroke="#818b98" stroke-dasharray="4 3"/>', label(middle, y + 35, "empty", 12)]
    shade = (cell["gain"] or 0) / limit
    ink = "#ffffff" if abs(shade) > 0.75 else "#000000"  # whichever has the better contrast
    gain = "" if cell["gain"] is None else f"{cell['gain']:+.3f}".replace("-", "\u2212")
    about = f"{about}: {cell['value']:.3f} {span(cell['value_ci'])} {gain} {span(cell['gain_ci'])}"
    return [f'<g><title>{html.escape(about)}</title>{box}fill="{colour(shade)}"/>',
            label(middle, y + 36, f"{cell['value']:.3f}", 17.5, fill=ink, weight="bold"),
            label(x + 8, y + 17, cell.get("setting", ""), 11.5, "start", ink), label(middle, y + 52, gain, 11.5, fill=ink),
            label(x + WIDTH - 8, y + 17, SIGN[cell["mark"]], 11.5, "end", ink), "</g>"]


def draw_legend(matrix, limit, y):
    """SVG lines of the legend under the cells, from height y, and where it ends."""
    marks, letters = matrix["marks"], {c.get("setting") for row in matrix["rows"] for c in row["cells"].values()}
    out = [f'<rect x="{LEFT + 18 * i}" y="{y + 8}" width="18.5" height="14" fill="{colour(i / 5 - 1)}"/>' for i in range(11)]
    for i, words in enumerate((f"\u2212{limit:.2f}", "zero-shot", f"+{limit:.2f}")):
        out.append(label(LEFT + 99 * i, y + 37, words, 11.5))
    beside = [f"▲ better than zero-shot: {marks['better']} of {marks['compared']} cells",
              f"▼ worse (negative transfer): {marks['worse']}",
              f"where the 95% interval excludes zero; by chance: {marks['by_chance']:.1f}"]
    below = [*(f"{letter}: {meaning}" for letter, meaning in common.SETTINGS.items() if letter in letters),
             "Intervals cover the choice of users, not the luck of a training run."]
    for x, top, lines in ((LEFT + 240, y + 15, beside), (LEFT, y + 76, below)):
        out += [label(x, top + 17 * i, line, 11.5, "start") for i, line in enumerate(lines)]
    return out, y + 82 + 17 * len(below)


def places(groups, size, start):
    """Where things of one size begin that stand in a row, with a gap between groups."""
    return [start + i * size + GAP * sum(a != b for a, b in zip(groups[:i], groups[1:])) for i in range(len(groups))]


def colour(shade):
    """From orange (-1) over nearly white (0) to blue (1): told apart with any colour vision."""
    end, weight = BLUE if shade > 0 else ORANGE, abs(shade) ** 0.8
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in zip(NEUTRAL, end))


def label(x, y, words, size, anchor="middle", fill=INK, weight="normal", room=None):
    """A line of text, smaller where it would be wider than `room`."""
    size = min(size, room / (0.58 * max(len(words), 1))) if room else size
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size:.3g}" text-anchor="{anchor}" fill="{fill}" '
            f'font-weight="{weight}">{html.escape(words)}</text>')


if __name__ == "__main__":
    sys.exit(common.run(main))
