"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    (the same) --dry-run | grep finetune.py | parallel      then      (the same) --dry-run | grep evaluate.py | parallel
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows: the base model (zero-shot) and the model trained on each source (a+b: jointly on both). Columns: test sets.
A row is a finetune.py command and an evaluate.py command, printed before they run; what is finished is not done again.
Flags that are not listed below go to both scripts: --device cuda:1, --overwrite, ...
Writes to OUT: matrix.json (everything), .csv, .md (also printed), .svg (a heat map), runs/<source>/ and
cells/<source>/.
"""
import csv
import html
import io
import os
import shlex
import sys
import textwrap
import traceback
from pathlib import Path

import numpy as np

import common
import evaluate
import finetune

ZERO = "zero-shot"  # the row of the base model
# cells of two matrices are compared where all of these agree
SAME = ("setting", "target", "source", "data_sha256", "n_users", "split", "history")


def arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", default=[], help="datasets to train on, a row each; a+b: trained on both")
    add("--targets", nargs="+", default=[], help="datasets to test on, a column each")
    add("--out", metavar="DIR", help="folder of the matrix")
    add("--data", default="data", help="folder of the prepared datasets")
    add("--type", default="prompt", help="prompt or embed: how to score")
    add("--seed", type=int, default=2025)
    add("--metric", choices=common.METRIC_NAMES, default="auc", help="metric in the cells")
    add("--k", nargs="+", type=common.positive_int, default=[1, 3, 5], help="values of K for RRA@K")
    add("--dry-run", action="store_true", help="run nothing, print the command lines")
    for script in ("finetune", "evaluate"):
        add(f"--{script}-args", type=shlex.split, default=[], metavar="FLAGS",
            help=f"flags for {script}.py alone: --{script}-args='--FLAG VALUE'")
    add("--compare", nargs="+", metavar="DIR", help="print one table over several matrices: means by setting")
    args, args.both_args = parser.parse_known_args(argv)
    args.sources = list(dict.fromkeys(args.sources))  # none twice
    args.targets = list(dict.fromkeys(args.targets))
    if not args.compare and not (args.model and args.sources and args.targets and args.out):
        parser.error("give --model, --sources, --targets and --out, or --compare")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        matrices = {folder: common.read_json(f"{folder}/matrix.json") for folder in args.compare}
        print(common.markdown_table(setting_means(matrices)))
        return 0
    commands = command_lines(args)
    domains = check(args, commands)
    failed = {}  # {source: exit code}
    for source, script, script_argv in commands:
        if source in failed:  # its training failed, so there is no adapter to test
            continue
        code = run(args, script, script_argv)
        if code == 130:  # Ctrl-C
            return code
        if code:
            failed[source] = code
    if args.dry_run:
        return 0
    matrix = analyse(args, domains, failed)
    tables = markdown(matrix)
    common.write_json(f"{args.out}/matrix.json", matrix)
    common.write_atomically(f"{args.out}/matrix.csv", comma_separated(matrix))
    common.write_atomically(f"{args.out}/matrix.md", tables)
    common.write_atomically(f"{args.out}/matrix.svg", draw_svg(matrix))
    print(f"\n{tables}\n{args.out}: matrix.json, matrix.csv, matrix.md, matrix.svg")
    return 1 if failed else 0

# -------------------------------------------------------------------------------------------------------- command lines


def command_lines(args):
    """[(source, script, its arguments)], row by row."""
    shared = [f"--model={args.model}", f"--data={args.data}", f"--type={args.type}", f"--seed={args.seed}",
              *args.both_args]
    test = [*shared, *args.evaluate_args, "--test", *args.targets]
    commands = [(ZERO, evaluate, [*test, f"--out={args.out}/cells/{ZERO}"])]
    for source in args.sources:
        adapter = f"{args.out}/runs/{source}"
        train = [*shared, *args.finetune_args, "--train", *source.split("+"), f"--out={adapter}"]
        commands.append((source, finetune, train))
        commands.append((source, evaluate, [*test, f"--adapter={adapter}", f"--out={args.out}/cells/{source}"]))
    return commands


def check(args, commands):
    """{dataset: domain}. What is wrong with a command line or a dataset is said here, not after hours of training."""
    domains = {}
    for _, script, argv in commands:
        parsed = script.arguments(argv)
        if script is finetune:
            for name, data in finetune.read_datasets(parsed).items():
                domains[name] = data.domain
    for target in args.targets:  # tested by every evaluate.py command, of which the last is still parsed
        domains[target] = common.read_dataset(args.data, target, parsed.split).domain
    return domains


def run(args, script, argv):
    """Print a command line and run it. Returns its exit code."""
    line = shlex.join(["python", os.path.relpath(script.__file__), *argv])
    if args.dry_run:
        print(line)
        return 0
    print(f"$ {line}", flush=True)
    try:
        return common.run_script(script.main, argv)
    except Exception:  # whatever it is, the other rows are still worth having
        traceback.print_exc()
        return 2

# ------------------------------------------------------------------------------------------------------------- analysis

# Draws are what common.bootstrap returns. Those of one target are paired, since the same users are drawn for every
# source, and may be subtracted. An estimate is what common.estimate makes of them: {"value": ..., "ci": ...}.


def analyse(args, domains, failed):
    """What matrix.json holds (a dict), from the files of finetune.py and evaluate.py. failed: {source: exit code}."""
    cells, runs, draws = [], {}, {}
    for source in [ZERO, *args.sources]:
        # 1: evaluate.py did all but some cells; any other code: what stands there may be of another matrix
        lost = failed.get(source, 1) != 1
        chain = [] if source == ZERO else source.split("+")  # the datasets trained on
        if source != ZERO and not lost:
            runs[source] = common.read_json(f"{args.out}/runs/{source}/run.json")
            chain = runs[source]["train_chain"]  # more than --train after --init-adapter
            domains.update(runs[source]["domains"])
        for target in args.targets:
            cell = {
                "source": source,
                "target": target,
                "setting": common.setting_of(chain, target, domains),
                "value": None,  # of a cell that failed, or whose metric is undefined
                "ci": None,
                "gain": None,  # over zero-shot
                "mark": ""}
            cells.append(cell)
            path = Path(f"{args.out}/cells/{source}/{target}.json")
            if lost or not path.exists():
                continue
            result = common.read_json(path)
            for key in ("n_users", "collapsed", "data_sha256", "split", "history"):
                cell[key] = result[key]
            cell["users_counted"] = result["users_counted"][args.metric]
            cell["value"], cell["ci"] = result[args.metric], result["ci"][args.metric]
            if cell["value"] is None:
                continue
            users = evaluate.read_scores(path.with_suffix(".scores.jsonl"))
            seed = common.digest(args.seed, target)  # paired draws within a column, independent ones between columns
            draws[source, target] = common.bootstrap(args.metric, users, seed=seed)
            if source != ZERO and (ZERO, target) in draws:
                cell["gain"] = common.estimate(draws[source, target] - draws[ZERO, target])
                cell["mark"] = mark(cell["gain"])
    return {**vars(args), "domains": domains, "failed": failed, "cells": cells, "runs": runs,
            "rra": rank_averages(args.k, draws)}


def mark(gain):
    """"better" or "worse" (negative transfer) where the interval of a gain excludes 0, else ""."""
    low, high = gain["ci"] or (0, 0)  # too few users for an interval
    if low > 0:
        return "better"
    return "worse" if high < 0 else ""


def rank_averages(ks, draws):
    """RRA@K of the single sources, {source: {K as str: estimate}}: every draw gives a table, and a table an RRA."""
    single = {key: values for key, values in draws.items() if key[0] != ZERO and "+" not in key[0]}
    averages = {}  # {source: {K: its RRA@K in each draw}}
    for values in zip(*single.values()):  # of every cell its value, then its first draw, its second, ...
        if not np.isfinite(values).all():  # a draw in which a cell is undefined has no ranks
            continue
        table = {}
        for (source, target), value in zip(single, values):
            table.setdefault(source, {})[target] = value
        for k in ks:
            for source, average in common.reciprocal_rank_average(table, k).items():
                averages.setdefault(source, {}).setdefault(str(k), []).append(average)
    for by_k in averages.values():
        for k, values in by_k.items():
            by_k[k] = common.estimate(np.array(values, float))  # None becomes NaN
    return averages


def setting_means(matrices):
    """Means by setting over the cells that all matrices have, as rows of a table. matrices: {folder: matrix}.

    Mean over targets, of each the mean over its sources.
    """
    values = {}  # {folder: {what was measured: value}}
    for folder, matrix in matrices.items():
        values[folder] = {}
        for cell in matrix["cells"]:
            if cell["value"] is not None:
                what = (matrix["metric"], *(cell[key] for key in SAME))
                values[folder][what] = cell["value"]
    shared = sorted(set.intersection(*map(set, values.values())))
    rows = []
    for folder, matrix in matrices.items():
        targets = {}  # {setting: {target: [value]}}
        for what in shared:
            _, setting, target, *_ = what
            targets.setdefault(setting, {}).setdefault(target, []).append(values[folder][what])
        head = [f"mean {matrix['metric']} of {len(shared)} cells"]
        row = [f"{matrix['model']}, {matrix['type']} ({folder})"]
        for setting, by_target in targets.items():
            means = [np.mean(of_target) for of_target in by_target.values()]
            head.append(f"{setting} (targets: {len(means)})")
            row.append(f"{np.mean(means):.3f}")
        rows.append(row)
    return [head, *rows]

# --------------------------------------------------------------------------------------------------------------- tables


def markdown(matrix):
    """The matrix as four tables (the metric, the gain over zero-shot, means by setting, RRA@K) and notes."""
    values = {"": [f"{matrix['metric']}, trained on", *matrix["targets"]]}  # rows by source, after the head
    gains = {"": ["gain over zero-shot", *matrix["targets"]]}
    for cell in matrix["cells"]:
        source = cell["source"]
        words = f"{cell['setting']} {evaluate.show(cell)} {cell['mark']}"
        values.setdefault(source, [source]).append(words)
        if source != ZERO:
            gains.setdefault(source, [source]).append(evaluate.show(cell["gain"], "+"))
    ranks = [["single source", *(f"RRA@{k}" for k in matrix["k"])]]
    for source, averages in matrix["rra"].items():
        ranks.append([source, *map(evaluate.show, averages.values())])
    text = f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based\n\n"
    for rows in (values.values(), gains.values(), setting_means({matrix["out"]: matrix}), ranks):
        text += common.markdown_table(list(rows)) + "\n\n"
    return text + "".join(f"- {note}\n" for note in notes(matrix))


def notes(matrix):
    """What has to be said under the tables; the first two lines also stand under the picture."""
    marks = [cell["mark"] for cell in matrix["cells"] if cell["gain"] and cell["gain"]["ci"]]
    lines = [f"Of {len(marks)} cells {marks.count('better')} are better than zero-shot and {marks.count('worse')} "
             "worse (negative transfer): the 95% interval of the paired difference excludes 0. By chance alone, about "
             f"{0.025 * len(marks):.1f} of each are expected.",
             "Intervals cover the choice of users, not the luck of a training run.",
             "RRA@K ranks sources and knows nothing of harm: the first of two that both fall below zero-shot gets 1. "
             "Targets with an empty cell are left out."]
    for cell in matrix["cells"]:
        if cell["source"] == ZERO and cell["value"] is not None:
            if cell["users_counted"] < cell["n_users"]:
                lines.append(f"{matrix['metric']} on {cell['target']} is defined for {cell['users_counted']} of "
                             f"{cell['n_users']} users.")
            if cell["collapsed"]:
                lines.append(f"Zero-shot collapse on {cell['target']}: its group AUC cannot be told from chance.")
    for source, run_json in matrix["runs"].items():
        if run_json["unstable"]:
            lines.append(f"Training on {source} was unstable: validation fell by more than {finetune.UNSTABLE} between "
                         "evaluations.")
        if not run_json["beats_base"]:
            lines.append(f"Training on {source} never beat its start on validation users.")
        for target in matrix["targets"]:
            if target in run_json["valid_chain"] and target not in run_json["train_chain"]:
                lines.append(f"Training on {source}: validation labels of {target} chose the checkpoint (--valid), so "
                             f"{target} is not unseen.")
    for source, code in matrix["failed"].items():
        lines.append(f"{source} failed (exit code {code}): some or all of its cells are empty.")
    return lines


def comma_separated(matrix):
    """A line per cell, for a spreadsheet; the value is of the metric of the matrix."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow("source target setting value low high gain gain_low gain_high mark n_users".split())
    for cell in matrix["cells"]:
        gain = cell["gain"] or {"value": None, "ci": None}
        row = [cell["source"], cell["target"], cell["setting"]]
        for estimate in (cell, gain):
            row += [estimate["value"], *(estimate["ci"] or (None, None))]
        rows.writerow([*row, cell["mark"], cell.get("n_users")])
    return text.getvalue()

# -------------------------------------------------------------------------------------------------------------- picture

WIDTH, LEFT, MARGIN = 96, 176, 20  # of a cell; where the cells begin; at the edges
DARKEST = 0.3  # the gain of the darkest colour; the same in every picture, so that two can be compared
BLUE, ORANGE = "#5c98d6", "#e28042"  # told apart with any colour vision, light enough for dark text


def draw_svg(matrix):
    """The matrix as a heat map (SVG text): blue better, orange worse than zero-shot, the darker the more."""
    width = max(760, LEFT + WIDTH * len(matrix["targets"]) + MARGIN)
    parts = []
    title = f"{matrix['metric'].upper()} of {matrix['model']}, {matrix['type']}-based"
    y = top = write(parts, MARGIN, 34, title, 18, width - 2 * MARGIN)
    for i, target in enumerate(matrix["targets"]):
        words = f"{target}\n({matrix['domains'][target]})"
        y = max(y, write(parts, LEFT + WIDTH * (i + 0.5), top, words, 12, WIDTH, "middle"))
    height = 0  # of a row
    for i, cell in enumerate(matrix["cells"]):
        column = i % len(matrix["targets"])
        if column == 0:
            y += height
            bottom = write(parts, LEFT - 10, y + 17, cell["source"].replace("+", " + "), 12, LEFT - 20, "end")
            height = max(62, bottom - y)
        x = LEFT + WIDTH * column
        words = f"{cell['setting']} {cell['mark']}\n"
        words += "empty" if cell["value"] is None else f"{cell['value']:.3f}"
        gain = 0
        if cell["gain"]:
            gain = cell["gain"]["value"]
            words += f"\n{gain:+.3f}"
        colour = BLUE if gain > 0 else ORANGE
        parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{height - 2}" rx="4" '
                     f'stroke="#dddddd" fill="{colour}" fill-opacity="{min(1, abs(gain) / DARKEST):.3f}"/>')
        write(parts, x + WIDTH / 2, y + 19, words, 13, WIDTH, "middle")
    legend = ["Row: trained on. Column: tested on. In a cell: setting, value, gain over zero-shot.",
              f"Darkest: {DARKEST} or more better (blue) or worse (orange) than zero-shot.", *notes(matrix)[:2]]
    for letter in sorted({cell["setting"] for cell in matrix["cells"]}):
        legend.append(f"{letter}: {common.SETTINGS[letter]}")
    bottom = write(parts, MARGIN, y + height + 24, "\n".join(legend), 12, width - 2 * MARGIN)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom}" font-family="sans-serif" '
            'fill="#1f2328"><rect width="100%" height="100%" fill="#ffffff"/>')
    return "\n".join([head, *parts, "</svg>\n"])


def write(parts, x, y, words, size, width, anchor="start"):
    """Append SVG text, its lines wrapped to a width in pixels, to parts. Returns the y of the line below it."""
    characters = int(width / (0.62 * size))  # that fit: in DejaVu Sans, a wide font, 0.62 of the size is the average
    for paragraph in words.splitlines():
        for line in textwrap.wrap(paragraph, characters):
            line = html.escape(line)
            parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{line}</text>')
            y += round(1.4 * size)
    return y


if __name__ == "__main__":
    sys.exit(common.run_script(main))
