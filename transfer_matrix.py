"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    ... --dry-run | grep finetune.py | parallel        then        ... --dry-run | grep evaluate.py | parallel
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows: the base model (zero-shot) and the model trained on each source (a+b: on both). Columns: test sets and means.
A training is a finetune.py command line, a cell an evaluate.py one, printed before it runs unless it is there already.
Writes matrix.json (everything), .csv, .md (printed, too), .svg (a heat map), runs/<source>/, cells/<source>/ in OUT.
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
from collections import namedtuple
from pathlib import Path

import numpy as np

import common
import evaluate
import finetune
from common import UserError, say

# A training or a cell: module, arguments, command line, the file that it writes last, whether that is there.
Piece = namedtuple("Piece", "script argv line result there")
ZERO = "zero-shot"
SIGN = {"better": "▲", "worse": "▼", "": ""}


def arguments(argv):
    parser = common.Parser(__doc__, "transfer_matrix.py")
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", metavar="SOURCE", help="datasets to train on, one row each; a+b: trained on both")
    add("--targets", nargs="+", metavar="TARGET", help="datasets to test on, one column each")
    add("--out", metavar="DIR", type=common.folder, help="folder of the matrix")
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
    try:
        args.finetune_args, args.evaluate_args = shlex.split(args.finetune_args), shlex.split(args.evaluate_args)
    except ValueError as error:
        parser.error(f"--finetune-args or --evaluate-args: {error}")
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
    for this in pieces.values():  # what is in the way is said before hours of training
        this.script.read_metas(this.script.arguments(this.argv))
    if args.dry_run:
        for this in sorted(pieces.values(), key=lambda this: this.script is evaluate):  # trainings first
            perform(this) if this.there else print(this.line)
        return None
    done = {}
    for (source, target), this in pieces.items():
        # no cells without their training
        if (target is None or source == ZERO or (source, None) in done) and perform(this):
            done[source, target] = this.result
    matrix = analyse(args, done)
    matrix["failed"] = [f"{s} on {t}" if t else f"training on {s}" for s, t in pieces if (s, t) not in done]
    try:
        matrix["foresight"] = foresight(args, matrix)
    except (UserError, RuntimeError) as error:  # RuntimeError: torch is out of memory
        matrix["failed"].append(f"likeness of the datasets ({error})")
    common.write_json(Path(args.out, "matrix.json"), matrix)
    redraw(args.out)
    return int(bool(matrix["failed"]))

# ------------------------------------------------------------------------------------------------------ command lines


def piece(args, source, target=None):
    """The Piece that is a row's training or, given a target, a cell."""
    run, out = Path(args.out, "runs", source), Path(args.out, "cells", source)
    argv = ["--model", args.model, *shared_flags(args)]
    if target is None:
        script, result = finetune, run / "run.json"
        argv += ["--train", *source.split("+"), "--out", str(run), *args.finetune_args]
    else:
        script, result = evaluate, out / f"{target}.json"
        argv += [] if source == ZERO else ["--adapter", str(run)]
        argv += ["--test", target, "--out", str(out), *args.evaluate_args]
    line = shlex.join(["python", os.path.relpath(script.__file__), *argv])
    there = not args.overwrite and result.exists() and common.read_json(result).get("finished", True)
    return Piece(script, argv, line, result, there)


def shared_flags(args):
    """The shared flags that are not at their defaults, as they were given."""
    common.shared_arguments(parser := argparse.ArgumentParser())
    usual = vars(parser.parse_args([]))
    given = {"--" + key.replace("_", "-"): getattr(args, key) for key in usual if getattr(args, key) != usual[key]}
    return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, str(value)])]


def perform(this):
    """Run a piece; returns whether it succeeded. Raises UserError where it is there, but made with other arguments."""
    if this.there:  # its script will say
        with contextlib.redirect_stdout(io.StringIO()) as heard, contextlib.redirect_stderr(heard):
            if common.run(this.script.main, this.argv):
                raise UserError(heard.getvalue().removeprefix("error: "))
        return True
    print(f"$ {this.line}", flush=True)
    try:
        code = common.run(this.script.main, this.argv)
    except Exception as error:  # whatever it is, say out of memory: the other cells are still worth having
        code = say(f"error: {type(error).__name__}: {error}") or 1
    if code == 130:  # Ctrl-C
        sys.exit(code)
    if code:
        say(f"failed, left empty: {this.line}")
    return not code

# ----------------------------------------------------------------------------------------------------------- analysis


def analyse(args, done):
    """The matrix from the files of what is done, {(source, target): path}; that in OUT if it was made of just these."""
    known = common.read_json(path) if (path := Path(args.out, "matrix.json")).exists() else {}
    files = [Path(__file__), Path(common.__file__), *done.values(), *map(scores_of, done.values())]
    made_of = f"{common.digest(vars(args), *(path.read_bytes() for path in files if path.exists())):016x}"
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
            cell = cells[column] = estimate(here, [] if source == ZERO else zero)  # {} where empty
            if cell and (result := results.get((source, column))):  # the interval as evaluate.py printed it
                cell.update(setting=common.setting_of(train, column), value_ci=result["ci"][args.metric],
                            **{key: result[key] for key in "n_users n_samples collapsed data_sha256".split()})
        rows.append({"source": source, "train": train, "training": run, "cells": cells})
    singles = {row["source"]: {t: row["cells"][t].get("value") for t in args.targets}
               for row in rows if row["source"] in domains and any(row["cells"].values())}
    marks = [row["cells"][t]["mark"] for row in rows for t in args.targets if row["cells"][t].get("gain_ci")]
    return {"model": common.MODELS.get(args.model, args.model), "type": args.type, "metric": args.metric, "rows": rows,
            "targets": args.targets, "domains": domains, "foresight": known.get("foresight"), "made_of": made_of,
            "marks": {"compared": len(marks), "by_chance": len(marks) / 20, **{m: marks.count(m) for m in SIGN if m}},
            "rra": {str(k): common.reciprocal_rank_average(singles, k) for k in args.k}}


def scores_of(path):
    """The scores file beside a cell's result."""
    return path.with_suffix(".scores.jsonl")


def draw(args, target, result, path):
    """Bootstrap draws of a cell's metric. Seeded by target: paired within a column, independent between columns."""
    seed = common.digest(args.seed, target)
    arrays = evaluate.read_scores(scores_of(path), args.data, target, result["split"], result["n_users"])
    return common.bootstrap(*arrays, [args.metric], seed=seed)[args.metric]


def estimate(cells, zero):
    """{value, value_ci, gain, gain_ci, mark} of the mean of cells [(value, draws)], {} if one is None. gain: difference
    from `zero`, the zero-shot cells of the same users; mark: where its 95% interval, a paired one, excludes zero."""
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
    names, before, matrix["foresight"] = list(matrix["domains"]), matrix["foresight"] or {}, None
    of = [args.model, common.fingerprint(args.model), args.pooling, args.dtype, args.max_length, args.chat_template,
          common.load_prompt(args.prompt), {name: common.read_meta(args.data, name)["sha256"] for name in names}]
    alike = before["alike"] if before.get("of") == of else likeness(args, names)
    pairs = [{"source": row["source"], "target": t, "gain": row["cells"][t]["gain"], **alike[f"{row['source']} {t}"]}
             for row in matrix["rows"] for t in matrix["targets"]
             if f"{row['source']} {t}" in alike and row["cells"][t].get("gain_ci")]
    rho = {key: rank_correlation([[pair[key], pair["gain"]] for pair in pairs]) for key in ("cosine", "overlap")}
    return {"of": of, "alike": alike, "pairs": pairs, **rho}


def likeness(args, names):
    """{"a b": {cosine: of mean item embeddings under the base model, overlap: Jaccard index of the texts' words}}."""
    scorer, mean, w = common.load_scorer(argparse.Namespace(**{**vars(args), "type": "embed"})), {}, {}
    for name in names:
        items, _ = common.read_items(args.data, name)
        texts = [items[i] for i in sorted(items, key=lambda item: common.digest(name, item))[:1000]]  # as good as all
        mean[name] = np.mean(common.embed_all(scorer, common.embedding_tokens(scorer, [], texts)[0]), 0)
        w[name] = set(re.findall(r"\w+", " ".join(items.values()).lower()))
        if not np.isfinite(mean[name]).all():
            raise UserError(f"NaN or infinite embeddings on {name}; try --dtype float32")
    return {f"{a} {b}": {"cosine": common.cosine(mean[a], mean[b]), "overlap": len(w[a] & w[b]) / len(w[a] | w[b])}
            for a in names for b in names if a != b}


def rank_correlation(pairs):
    """Spearman's: the correlation of ranks, ties at their average rank; None below 3 pairs or without spread."""
    ranks = [[sum(y < x for y in col) + sum(y == x for y in col) / 2 for x in col] for col in zip(*pairs)]
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
    rows, rra = matrix["rows"], matrix["rra"]
    show = lambda c, key, form: "" if c.get(key) is None else "{} {:{}} [{:.3f}, {:.3f}] {}".format(
        c.get("setting", ""), c[key], form, *c[f"{key}_ci"], SIGN[c["mark"]]).strip()
    line = lambda row, *how: [row["source"], *(show(c, *how) for c in row["cells"].values())]
    tables = [[[f"{matrix['metric']}, trained on", *rows[0]["cells"]], *(line(row, "value", ".3f") for row in rows)],
              [["difference from zero-shot", *rows[0]["cells"]], *(line(row, "gain", "+.3f") for row in rows[1:])],
              [["trained on", *(f"RRA@{k}" for k in rra), "steps", "samples"]]]
    for row in rows[1:]:
        ranks = [rra[k].get(row["source"]) for k in rra]
        tables[2].append([row["source"], *("" if rank is None else f"{rank:.3f}" for rank in ranks),
                          *(str(row["training"].get(key, "")) for key in ("steps", "samples"))])
    title = f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based"
    return "\n\n".join([title, *map(common.markdown_table, tables),
                        "\n".join(f"- {note}" for note in notes(matrix))]) + "\n"


def notes(matrix):
    """What has to be said under the tables."""
    rows, marks, fore = matrix["rows"], matrix["marks"], matrix["foresight"] or {"pairs": []}
    rho = lambda key: "undefined" if fore.get(key) is None else f"{fore[key]:+.2f}"
    warnings = {
        "Zero-shot collapse, scores as good as chance": [t for t, c in rows[0]["cells"].items() if c.get("collapsed")],
        "Unstable training, validation fell by over 0.05": [r["source"] for r in rows if r["training"].get("unstable")],
        "Validated on other sets": [r["source"] for r in rows
                                    if {*r["training"].get("valid_chain", [])} - {*r["train"]}],
        "Failed": matrix["failed"],
        "Without a cell, so not ranked in RRA@K, where others move up":
            [row["source"] for row in rows[1:] if "+" not in row["source"] and not any(row["cells"].values())]}
    return [
        "▲ better, ▼ worse (negative transfer): 95% interval of the paired difference without 0. Of {compared} cells "
        "{better} are ▲, {worse} ▼; if nothing differed, chance would mark {by_chance:.1f} (5%).".format(**marks),
        "The intervals cover the choice of users, not the luck of a training run.",
        "Unseen: targets not trained on. RRA@K: mean over targets of 1 / rank among single sources, 0 after K.",
        f"Rank correlation with the difference from zero-shot, over {len(fore['pairs'])} pairs of source and target: "
        f"cosine of mean item embeddings {rho('cosine')}, vocabulary overlap {rho('overlap')}.",
        *(f"{what}: {', '.join(names)}." for what, names in warnings.items() if names)]


def comma_separated(matrix):
    """A line a cell, means included, for a spreadsheet."""
    head = "source target domain setting {} low high gain gain_low gain_high mark users steps samples"
    lines = [head.format(matrix["metric"]).split(), *([
        row["source"], t, matrix["domains"].get(t), c.get("setting"), c["value"], *c["value_ci"], c["gain"],
        *(c["gain_ci"] or ["", ""]), c["mark"], c.get("n_users"), *map(row["training"].get, ("steps", "samples"))]
        for row in matrix["rows"] for t, c in row["cells"].items() if c)]
    return "".join(",".join("" if x is None else str(x) for x in line) + "\n" for line in lines)


def compare(folders):
    """One table over several matrices: models by setting, and what joint training with the target adds (H - G)."""
    matrices = [common.read_json(Path(folder, "matrix.json")) for folder in folders]
    if len(metrics := {matrix["metric"] for matrix in matrices}) > 1:
        raise UserError(f"the matrices hold different metrics: {', '.join(sorted(metrics))}")
    cell = lambda m, source, t: next((row["cells"].get(t) or {} for row in m["rows"] if row["source"] == source), {})
    sources, targets = [row["source"] for row in matrices[0]["rows"]], matrices[0]["targets"]
    for t in targets:
        cells = [row["cells"][t] for m in matrices for row in m["rows"] if row["cells"].get(t)]
        if len({(c["data_sha256"], c["n_users"]) for c in cells}) > 1:
            raise UserError(f"the matrices were tested on different users of {t}")
    alike = lambda letter, t: [s for s in sources if all(cell(m, s, t).get("setting") == letter for m in matrices)]
    have = {letter: {t: found for t in targets if (found := alike(letter, t))} for letter in common.SETTINGS}
    mean = lambda m, letter, names: np.mean([np.mean([cell(m, s, t)["value"] for s in have[letter][t]]) for t in names])
    targets, both = {letter: names for letter, names in have.items() if names}, [t for t in have["G"] if t in have["H"]]
    lines = [[*metrics, *(f"{letter} ({len(names)})" for letter, names in targets.items()), f"H - G ({len(both)})"]]
    for folder, m in zip(folders, matrices):
        gap = f"{mean(m, 'H', both) - mean(m, 'G', both):+.3f}" if both else ""
        means = [f"{mean(m, letter, names):.3f}" for letter, names in targets.items()]
        lines.append([f"{m['model']}, {m['type']} ({folder})", *means, gap])
    return "\n".join([common.markdown_table(lines), *(f"- {letter}: {common.SETTINGS[letter]}" for letter in targets),
                      "- Means over the targets with cells of the letter (in brackets: how many; H - G: of both),",
                      "  of sources that every matrix has."])

# ------------------------------------------------------------------------------------------------------------ picture

WIDTH, HEIGHT, GAP, LEFT, TOP = 92, 60, 14, 196, 142  # of a cell; between groups; where the cells begin
INK, GREY, NEUTRAL, BLUE, ORANGE = "#1f2328", "#59636e", (244, 244, 242), (24, 88, 160), (160, 58, 0)


def draw_svg(matrix):
    """The matrix as a heat map on a white card (SVG text): blue better, orange worse than zero-shot."""
    rows, columns, domains = matrix["rows"], [*matrix["targets"], "mean"], matrix["domains"]
    xs = places([domains.get(target) for target in columns], WIDTH, LEFT)
    ys = places([domains.get(row["source"], "+" in row["source"]) for row in rows], HEIGHT, TOP)
    limit = max([0.05, *(abs(row["cells"][t].get("gain") or 0) for row in rows for t in columns)])  # darkest colour
    width, bottom = max(xs[-1] + WIDTH, LEFT + 490) + 28, ys[-1] + HEIGHT
    out = [label(24, 38, f"Transfer matrix: {matrix['metric'].upper()}, {matrix['model'][-48:]}", 19, "start", "bold"),
           label(24, 60, f"{matrix['type']}-based scores; small: difference from zero-shot", 12.5, "start", fill=GREY),
           label((LEFT + xs[-2] + WIDTH) / 2, 92, "tested on", 13, fill=GREY),
           label(-(TOP + bottom) / 2, 28, "trained on", 13, fill=GREY, turn=-90)]
    for x, target in zip(xs, columns):
        out += [label(x + WIDTH / 2, TOP - 26, target, 13, weight="bold"),
                label(x + WIDTH / 2, TOP - 10, domains.get(target, ""), 11.5, fill=GREY)]
    for y, row in zip(ys, rows):
        source, domain = row["source"], domains.get(row["source"])
        names = textwrap.wrap(source.replace("+", " + "), 22, max_lines=4, placeholder=" ...") + [domain] * bool(domain)
        for i, name in enumerate(names):
            look = (11.5, "end", "normal", GREY) if i and domain else (11.5 if "+" in source else 13, "end", "bold")
            out.append(label(LEFT - 12, y + HEIGHT / 2 + 12 + 14 * (i - len(names) / 2), name, *look))
        out += [part for x, target in zip(xs, columns) for part in draw_cell(x, y, row["cells"][target], limit)]
    legend, height = draw_legend(matrix, limit, bottom + 30)
    size = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" font-family="sans-serif">'
    svg = "\n".join([head, f'<rect {size} rx="10" fill="#ffffff"/>', *out, *legend, "</svg>\n"])
    return re.sub(r"[^\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", svg)  # XML allows no other characters


def draw_cell(x, y, cell, limit):
    """SVG lines of a cell: value, setting's letter, difference from zero-shot, a triangle where it is marked."""
    box = f'<rect x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="5" '
    if not cell:
        return [box + 'fill="none" stroke="#818b98" stroke-dasharray="4"/>', label(x + WIDTH / 2, y + 35, "empty", 12)]
    shade = (cell["gain"] or 0) / limit
    ink = "#ffffff" if abs(shade) > 0.75 else "#000000"  # whichever has the better contrast
    gain = "" if cell["gain"] is None else f"{cell['gain']:+.3f}".replace("-", "\u2212")
    texts = [(8, 17, cell.get("setting", ""), 11.5, "start"), (WIDTH - 8, 17, SIGN[cell["mark"]], 11.5, "end"),
             (WIDTH / 2, 36, f"{cell['value']:.3f}", 17.5, "middle", "bold"), (WIDTH / 2, 52, gain, 11.5)]
    return [f'{box}fill="{colour(shade)}"/>', *(label(x + dx, y + dy, *how, fill=ink) for dx, dy, *how in texts)]


def draw_legend(matrix, limit, y):
    """SVG lines of the legend under the cells, from height y, and where it ends."""
    marks, letters = matrix["marks"], {c.get("setting") for row in matrix["rows"] for c in row["cells"].values()}
    out = [f'<rect x="{LEFT + 18 * i}" y="{y}" width="19" height="14" fill="{colour(i / 5 - 1)}"/>' for i in range(11)]
    scale = [f"\u2212{limit:.2f}", "zero-shot", f"+{limit:.2f}"]
    beside = ["▲ better than zero-shot: {better} of {compared}", "▼ worse (negative transfer): {worse} of {compared}",
              "where the 95% interval excludes zero; by chance: {by_chance:.1f}"]
    below = [*(f"{letter}: {meaning}" for letter, meaning in common.SETTINGS.items() if letter in letters),
             "Intervals cover the choice of users, not the luck of a training run."]
    out += [label(LEFT + 99 * i, y + 29, words, 11.5) for i, words in enumerate(scale)]
    out += [label(LEFT + 240, y + 10 + 17 * i, words.format(**marks), 11.5, "start") for i, words in enumerate(beside)]
    out += [label(LEFT, y + 72 + 17 * i, words, 11.5, "start") for i, words in enumerate(below)]
    return out, y + 76 + 17 * len(below)


def places(groups, size, start):
    """Where things of one size begin that stand in a row, with a gap between groups."""
    return [start + i * size + GAP * sum(a != b for a, b in zip(groups[:i], groups[1:])) for i in range(len(groups))]


def colour(shade):
    """From orange (-1) over nearly white (0) to blue (1): told apart with any colour vision."""
    end, weight = BLUE if shade > 0 else ORANGE, abs(shade) ** 0.8
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in zip(NEUTRAL, end))


def label(x, y, words, size, anchor="middle", weight="normal", fill=INK, turn=0):
    """A line of text."""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}" '
            f'transform="rotate({turn})">{html.escape(words)}</text>')


if __name__ == "__main__":
    sys.exit(common.run(main))
