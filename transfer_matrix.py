"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    (the same) --dry-run | grep finetune.py | parallel      then      (the same) --dry-run | grep evaluate.py | parallel
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows: the base model (zero-shot) and the model trained on each source (a+b: jointly on both). Columns: test sets.
A training is a finetune.py command line, a cell an evaluate.py one, printed before it runs; what is finished is not run
again. Writes to OUT: matrix.json (everything), .csv, .md (also printed), .svg (a heat map), runs/<source>/ and
cells/<source>/.
"""
import argparse
import csv
import html
import io
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

import common
import evaluate
import finetune
from common import UserError, say

ZERO = "zero-shot"  # the row of the base model
DRAWS = 1000  # of the bootstrap, per cell
# cells are compared where all of these agree; compare groups by the first two
SAME = ("setting", "target", "source", "data_sha256", "n_users", "split", "history")
# what the matrix itself sets in the command lines of trainings and cells
OWN_FLAGS = ("--data", "--model", "--type", "--train", "--test", "--out", "--adapter", "--against")
SIGNS = {"better": "▲", "worse": "▼", "": ""}


def arguments(argv):
    parser = common.Parser(__doc__, "transfer_matrix.py")
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", metavar="SOURCE", help="datasets to train on, a row each; a+b: trained on both")
    add("--targets", nargs="+", metavar="TARGET", help="datasets to test on, a column each")
    add("--out", metavar="DIR", type=common.output_folder, help="folder of the matrix")
    add("--metric", choices=common.METRIC_NAMES, default="auc", help="metric in the cells")
    add("--k", nargs="+", type=common.positive_number, default=[1, 3, 5],
        help="values of K for RRA@K (reciprocal rank average)")
    add("--dry-run", action="store_true", help="run nothing; print the command line of each missing training and cell")
    add("--finetune-args", type=shlex.split, default=[],
        help="further arguments for finetune.py: --finetune-args='--lr 1e-3'")
    add("--evaluate-args", type=shlex.split, default=[], help="further arguments for evaluate.py")
    add("--compare", nargs="+", metavar="DIR", help="print one table over several matrices: models by setting")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    args.sources = list(dict.fromkeys(args.sources or []))  # none twice
    args.targets = list(dict.fromkeys(args.targets or []))
    args.k = list(dict.fromkeys(args.k))
    complete = args.model and args.sources and args.targets and args.out
    if not args.compare and (not complete or args.model in evaluate.BASELINES):
        raise UserError("give --model (one that can be fine-tuned), --sources, --targets and --out, or --compare")
    if ZERO in args.sources:
        raise UserError(f"{ZERO} is always the first row: leave it out of --sources")
    for word in [*args.finetune_args, *args.evaluate_args]:
        if word.split("=")[0] in OWN_FLAGS:
            raise UserError(f"--finetune-args and --evaluate-args take no {word}")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        print(compare(args.compare))
        return 0
    missing = find_missing(args)
    if args.dry_run:
        for source, target in missing:
            print(command_line(*command(args, source, target)))
        return 0
    failed = run_missing(args, missing)
    matrix = analyse(args, failed)
    tables = markdown(matrix)
    common.write_json(Path(args.out, "matrix.json"), matrix)
    common.write_atomically(Path(args.out, "matrix.csv"), comma_separated(matrix))
    common.write_atomically(Path(args.out, "matrix.md"), tables)
    common.write_atomically(Path(args.out, "matrix.svg"), draw_svg(matrix))
    print(f"\n{tables}\n{args.out}: matrix.json, matrix.csv, matrix.md, matrix.svg")
    return 1 if failed else 0

# -------------------------------------------------------------------------------------------------------- command lines

# (source, target) stands for a cell, (source, None) for the training of a source.


def command(args, source, target):
    """(finetune or evaluate, its arguments) of a training or a cell."""
    argv = ["--model", args.model, *shared_flags(args)]
    run = str(Path(args.out, "runs", source))
    if target is None:
        return finetune, [*argv, "--train", *source.split("+"), "--out", run, *args.finetune_args]
    if source != ZERO:
        argv += ["--adapter", run]
    cells = str(Path(args.out, "cells", source))
    return evaluate, [*argv, "--test", target, "--out", cells, *args.evaluate_args]


def shared_flags(args):
    """The shared flags that are not at their defaults, as they were given."""
    parser = argparse.ArgumentParser()
    common.shared_arguments(parser)
    flags = []
    for key, default in vars(parser.parse_args([])).items():
        value = getattr(args, key)
        if value != default:
            flags.append("--" + key.replace("_", "-"))
            if value is not True:
                flags.append(str(value))
    return flags


def command_line(script, argv):
    return shlex.join(["python", os.path.relpath(script.__file__), *argv])


def find_missing(args):
    """What is not finished, [(source, target)], in the order to run it. The scripts themselves are asked.

    Raises UserError on a wrong argument, a dataset that is not prepared, or the output of other arguments in the way:
    all of it is said before hours of training.
    """
    missing = []
    for source in [ZERO, *args.sources]:
        if source != ZERO:
            run_args = finetune.arguments(command(args, source, None)[1])
            finetune.chain_of(run_args)  # raises where a dataset is missing
            finetune.adopt_lora_shape(run_args)
            status, _ = finetune.status_of(run_args, finetune.job_of(run_args))
            if status != "finished":  # so all of its row is missing
                missing += [(source, target) for target in [None, *args.targets]]
                continue
        for target in args.targets:
            cell_args = evaluate.arguments(command(args, source, target)[1])
            common.check_datasets(cell_args.data, [target], cell_args.split)
            if evaluate.status_of(cell_args, target, evaluate.job_of(cell_args, target)) != "finished":
                missing.append((source, target))
    return missing


def run_missing(args, missing):
    """Run the command lines of what is missing. Returns what failed, [(source, target)]."""
    failed = []
    for source, target in missing:
        if (source, None) in failed:  # there is no adapter to test
            failed.append((source, target))
            continue
        script, argv = command(args, source, target)
        print(f"$ {command_line(script, argv)}", flush=True)
        try:
            code = common.run_script(script.main, argv)
        except Exception as error:  # whatever it is, the other cells are still worth having
            say(f"error: {type(error).__name__}: {' '.join(str(error).split())}")
            code = 1
        if code == 130:  # Ctrl-C
            sys.exit(code)
        if code:
            failed.append((source, target))
        elif target is None:  # cells of an earlier adapter
            shutil.rmtree(Path(args.out, "cells", source), ignore_errors=True)
    return failed

# ------------------------------------------------------------------------------------------------------------- analysis

# Draws are what common.bootstrap returns. Those of one target are paired, since the same users are drawn for every
# source, and may be subtracted. An estimate is what common.estimate makes of them.


def analyse(args, failed):
    """What matrix.json holds (a dict), from the files of finetune.py and evaluate.py."""
    names = set(args.targets)
    for source in args.sources:
        names.update(source.split("+"))
    metas = {name: common.read_meta(args.data, name) for name in sorted(names)}
    domains = common.domains_of(metas)
    runs, chains = {}, {ZERO: []}  # by source: run.json; the datasets trained on
    for source in args.sources:
        chains[source] = source.split("+")
        if (source, None) not in failed:
            runs[source] = common.read_json(Path(args.out, "runs", source, "run.json"))
            chains[source] = runs[source]["train_chain"]  # more than --train after --init-adapter
            domains.update(runs[source]["domains"])
    cells, draws = read_cells(args, failed, chains, domains)
    try:
        similar = similarity(args, cells)
    except (UserError, RuntimeError) as error:  # no memory, perhaps: the cells are worth having without it
        say(f"no similarity of the datasets: {error}")
        similar = {"pairs": 0, "rank_correlation": None}
    return {
        "model": common.model_name(args.model),
        "type": args.type,
        "metric": args.metric,
        "k": args.k,
        "targets": args.targets,
        "domains": domains,
        "cells": cells,
        "runs": runs,
        "failed": failed,
        "rra": rank_averages(args, draws),
        "joint_gain": joint_gain(cells, draws),
        "similarity": similar,
        "arguments": vars(args)}


def read_cells(args, failed, chains, domains):
    """(the cells, row by row; {(source, target): draws} where there is a value). chains: {source: datasets}.

    A cell that failed, or whose metric is undefined, is empty.
    """
    cells, draws = [], {}
    for source in chains:
        for target in args.targets:
            cell = {
                "source": source,
                "target": target,
                "setting": common.setting_of(chains[source], target, domains),
                "value": None,
                "ci": None,
                "gain": None,  # over zero-shot
                "mark": ""}
            cells.append(cell)
            if (source, target) in failed:
                continue
            folder = Path(args.out, "cells", source)
            result = common.read_json(evaluate.result_path(folder, target))
            for key in ("n_users", "collapsed", "data_sha256", "split"):
                cell[key] = result[key]
            cell["history"] = result["arguments"]["history"]
            cell["value"], cell["ci"] = result[args.metric], result["ci"][args.metric]
            if cell["value"] is None:
                continue
            scored, _ = evaluate.read_scores(evaluate.scores_path(folder, target))
            seed = common.digest(args.seed, target)  # paired draws within a column, independent ones between columns
            draws[source, target] = common.bootstrap(args.metric, scored, DRAWS, seed)
            if source != ZERO and (ZERO, target) in draws:
                cell["gain"] = common.estimate(draws[source, target] - draws[ZERO, target])
                cell["mark"] = mark(cell["gain"])
    return cells, draws


def mark(gain):
    """"better" or "worse" (negative transfer) where the interval of a gain excludes 0, else ""."""
    low, high = gain["ci"]
    if low > 0:
        return "better"
    return "worse" if high < 0 else ""


def rank_averages(args, draws):
    """RRA@K of the single sources, {source: {K as str: estimate}}: every draw gives a table, and a table an RRA."""
    single = {}
    for (source, target), cell_draws in draws.items():
        if source != ZERO and "+" not in source:
            single[source, target] = cell_draws
    averages = {}  # {(source, K): its RRA@K in each draw}
    for values in zip(*single.values()):  # of every cell its value, then its first draw, its second, ...
        if not np.isfinite(values).all():  # a draw in which a cell is undefined has no ranks
            continue
        table = {}
        for (source, target), value in zip(single, values):
            table.setdefault(source, {})[target] = value
        for k in args.k:
            for source, average in common.reciprocal_rank_average(table, k).items():
                averages.setdefault((source, str(k)), []).append(average)
    result = {}
    for (source, k), values in averages.items():
        result.setdefault(source, {})[k] = common.estimate(np.array(values, float))  # None becomes NaN
    return result


def joint_gain(cells, draws):
    """H - G, joint training with a target's own data and without: {target: estimate}, where there are cells of both.

    It is what a target's own data adds, if H trains on all sets and G on all but the target.
    """
    found = {}  # {(target, setting): draws of each of its cells}
    for cell in cells:
        source, target = cell["source"], cell["target"]
        if (source, target) in draws:
            found.setdefault((target, cell["setting"]), []).append(draws[source, target])
    result = {}
    for target, setting in found:
        if setting == "H" and (target, "G") in found:
            with_target = np.mean(found[target, "H"], axis=0)
            without = np.mean(found[target, "G"], axis=0)
            result[target] = common.estimate(with_target - without)
    return result


def similarity(args, cells):
    """Does similarity go with transfer? Spearman's correlation with the gain, over single sources and other targets.

    Similarity: the cosine of the mean item embeddings of two datasets under the base model.
    """
    pairs = [cell for cell in cells
             if cell["gain"] and "+" not in cell["source"] and cell["source"] != cell["target"]]
    if not pairs:
        return {"pairs": 0, "rank_correlation": None}
    scorer = common.load_scorer(argparse.Namespace(**{**vars(args), "type": "embed"}))
    means = {}
    for cell in pairs:
        for name in (cell["source"], cell["target"]):
            if name not in means:
                means[name] = mean_embedding(args, scorer, name)
        cell["similarity"] = float(means[cell["source"]] @ means[cell["target"]])
    similarities = np.array([cell["similarity"] for cell in pairs])
    gains = np.array([cell["gain"]["value"] for cell in pairs])
    return {"pairs": len(pairs), "rank_correlation": rank_correlation(similarities, gains)}


def mean_embedding(args, scorer, name):
    """The mean embedding of 500 items of a dataset, the first in the order of hashes, scaled to length 1."""
    items = common.read_items(args.data, name)
    chosen = sorted(items, key=common.digest)[:500]
    texts = [items[item][:common.TEXT_LIMIT] for item in chosen]
    with torch.no_grad():
        vectors = common.embed(scorer, common.encode_items(scorer, texts)).cpu().numpy()
    mean = vectors.mean(axis=0)
    return mean / np.linalg.norm(mean)


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, ties at their average rank. None below 3 values or where all are equal."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    ranks = []
    for values in (a, b):
        ranks.append([common.ranks_of(value, values).mean() for value in values])
    return float(np.corrcoef(ranks)[0, 1])

# --------------------------------------------------------------------------------------------------------------- tables


def by_source(matrix):
    """{source: its cells, in the order of the targets}."""
    rows = {}
    for cell in matrix["cells"]:
        rows.setdefault(cell["source"], []).append(cell)
    return rows


def markdown(matrix):
    """The matrix as three tables (the metric, the gain over zero-shot, RRA@K) and notes."""
    values = [[f"{matrix['metric']}, trained on", *matrix["targets"]]]
    gains = [["gain over zero-shot", *matrix["targets"]]]
    for source, cells in by_source(matrix).items():
        row = [source]
        for cell in cells:
            words = f"{cell['setting']} {evaluate.show(cell)} {SIGNS[cell['mark']]}"
            row.append(words.strip())
        values.append(row)
        if source != ZERO:
            gains.append([source, *(evaluate.show(cell["gain"], "+") for cell in cells)])
    ranks = [["single source", *(f"RRA@{k}" for k in matrix["k"])]]
    for source, averages in matrix["rra"].items():
        ranks.append([source, *map(evaluate.show, averages.values())])
    title = f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based"
    tables = [common.markdown_table(rows) for rows in (values, gains, ranks)]
    notes_list = "\n".join(f"- {note}" for note in notes(matrix))
    return "\n\n".join([title, *tables, notes_list]) + "\n"


def main_notes(matrix):
    """What has to be said under the tables and under the picture."""
    marks = [cell["mark"] for cell in matrix["cells"] if cell["gain"]]
    better, worse = marks.count("better"), marks.count("worse")
    by_chance = f"{0.025 * len(marks):.1f}"
    return [f"Of {len(marks)} cells {better} are better than zero-shot (▲) and {worse} worse (▼, negative "
            "transfer).",
            "Marked where the 95% interval of the paired difference excludes 0; about "
            f"{by_chance} better and {by_chance} worse are expected by chance.",
            "Intervals (95%) cover the choice of users, not the luck of a training run."]


def notes(matrix):
    """What has to be said under the tables."""
    lines = [*main_notes(matrix),
             "RRA@K ranks sources and says nothing of harm: the first of two that both fall below zero-shot gets 1."]
    for target, gain in matrix["joint_gain"].items():
        lines.append(f"H - G on {target}, joint training with its own data and without: {evaluate.show(gain, '+')}.")
    if not matrix["joint_gain"]:
        lines.append("H - G, joint training with a target's own data and without: no target has cells of both.")
    pairs, rho = matrix["similarity"]["pairs"], matrix["similarity"]["rank_correlation"]
    shown = "undefined" if rho is None else f"{rho:+.2f}"
    lines.append("Rank correlation of the datasets' similarity (cosine of mean item embeddings) with the gain, over "
                 f"{pairs} pairs of single source and other target: {shown}.")
    for cell in matrix["cells"]:
        if cell["source"] == ZERO and cell.get("collapsed"):
            lines.append(f"Zero-shot collapse on {cell['target']}: its group AUC cannot be told from chance.")
    for source, run in matrix["runs"].items():
        if run["unstable"]:
            lines.append(f"Training on {source} was unstable: validation fell by more than {finetune.UNSTABLE} between "
                         "evaluations.")
        if not run["beats_base"]:
            lines.append(f"Training on {source} never beat its start on validation users.")
        for target in matrix["targets"]:
            if target in run["valid_chain"] and target not in run["train_chain"]:
                lines.append(f"Training on {source}: validation labels of {target} chose the checkpoint (--valid), so "
                             f"{target} is not unseen.")
    for source, target in matrix["failed"]:
        what = f"{source} on {target}" if target else f"training on {source}, which RRA@K then leaves out"
        lines.append(f"Failed: {what}.")
    return lines


def comma_separated(matrix):
    """A line per cell, for a spreadsheet; the value is of the metric of the matrix."""
    rows = ["source target setting value low high gain gain_low gain_high mark n_users".split()]
    for cell in matrix["cells"]:
        row = [cell["source"], cell["target"], cell["setting"]]
        for value in (cell, cell["gain"]):
            if value and value["ci"]:
                row += [value["value"], *value["ci"]]
            else:
                row += ["", "", ""]
        rows.append([*row, cell["mark"], cell.get("n_users", "")])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def compare(folders):
    """One table over several matrices: means over targets by setting, of the cells that all of them have.

    Cells of other test users are other cells. Raises UserError on different metrics, or where no cell is shared.
    """
    matrices = {}  # {row's name: {(setting, target, and what else must be the same): value}}
    for folder in folders:
        matrix = common.read_json(Path(folder, "matrix.json"))
        if not isinstance(matrix, dict) or "cells" not in matrix:
            raise UserError(f"{folder}/matrix.json was not made by transfer_matrix.py")
        values = {}
        for cell in matrix["cells"]:
            if cell["value"] is not None:
                key = [cell[name] for name in SAME]
                values[(*key, matrix["metric"])] = cell["value"]
        matrices[f"{matrix['model']}, {matrix['type']} ({folder})"] = values
    shared = set.intersection(*map(set, matrices.values()))
    if not shared:
        raise UserError("the matrices share no cell: their metrics, sources, targets or test users differ")
    rows = []
    for name, values in matrices.items():
        by_letter = {}  # {letter: {target: [value]}}
        for key in sorted(shared):
            letter, target = key[:2]
            by_target = by_letter.setdefault(letter, {})
            by_target.setdefault(target, []).append(values[key])
        head, row = [matrix["metric"]], [name]
        for letter, by_target in by_letter.items():
            means = [np.mean(of_target) for of_target in by_target.values()]
            head.append(f"{letter} ({len(means)})")
            row.append(f"{np.mean(means):.3f}")
        rows.append(row)
    return common.markdown_table([head, *rows]) + "\nIn brackets: the number of targets averaged."

# -------------------------------------------------------------------------------------------------------------- picture

WIDTH, HEIGHT, LEFT, TOP = 96, 62, 176, 118  # of a cell; where the cells begin
INK, GREY = "#1f2328", "#59636e"
# told apart with any colour vision, and light enough for dark text
WHITE, BLUE, ORANGE = (246, 246, 244), (92, 152, 214), (226, 128, 66)


def draw_svg(matrix):
    """The matrix as a heat map (SVG text): blue better, orange worse than zero-shot, the darker the more."""
    targets = matrix["targets"]
    gains = [abs(cell["gain"]["value"]) for cell in matrix["cells"] if cell["gain"]]
    limit = max([0.05, *gains])  # the gain of the darkest colour
    title = f"{matrix['metric'].upper()} of {matrix['model'][-40:]}, {matrix['type']}-based"
    key = "Row: trained on. Column: tested on. In a cell: setting, value, gain over zero-shot."
    parts = [svg_text(20, 34, title, 18, "start")]
    parts.append(svg_text(20, 56, key, 12, "start"))
    for i, target in enumerate(targets):
        x = LEFT + WIDTH * (i + 0.5)
        parts.append(svg_text(x, TOP - 26, target, 13))
        parts.append(svg_text(x, TOP - 10, matrix["domains"][target], 11, fill=GREY))
    bottom = TOP
    for source, cells in by_source(matrix).items():
        lines = textwrap.wrap(source.replace("+", " + "), 24)
        y = bottom + 42 - 7 * len(lines)  # in the middle of the row
        for line in lines:
            parts.append(svg_text(LEFT - 10, y, line, 12, "end"))
            y += 14
        for i, cell in enumerate(cells):
            parts += draw_cell(LEFT + WIDTH * i, bottom, cell, limit)
        bottom += HEIGHT
    legend = [f"Darkest: {limit:.2f} better (blue) or worse (orange) than zero-shot.", *main_notes(matrix)]
    for letter in sorted({cell["setting"] for cell in matrix["cells"]}):
        legend.append(f"{letter}: {common.SETTINGS[letter]}")
    y = bottom + 28
    for line in legend:
        parts.append(svg_text(20, y, line, 12, "start"))
        y += 18
    width = max(760, LEFT + WIDTH * len(targets) + 20)
    size = f'width="{width}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, f'<rect {size} fill="#ffffff"/>', *parts, "</svg>\n"])


def draw_cell(x, y, cell, limit):
    """SVG elements of a cell: setting, mark, value, gain over zero-shot."""
    gain = cell["gain"]["value"] if cell["gain"] else 0
    share = abs(gain) / limit
    end = BLUE if gain > 0 else ORANGE
    red, green, blue = [round(a + (b - a) * share) for a, b in zip(WHITE, end)]
    parts = [f'<rect x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="4" '
             f'fill="rgb({red},{green},{blue})"/>', svg_text(x + 8, y + 17, cell["setting"], 11, "start")]
    if cell["gain"]:
        parts.append(svg_text(x + WIDTH - 8, y + 17, SIGNS[cell["mark"]], 11, "end"))
        parts.append(svg_text(x + WIDTH / 2, y + 54, f"{gain:+.3f}", 11))
    value = "empty" if cell["value"] is None else f"{cell['value']:.3f}"
    return [*parts, svg_text(x + WIDTH / 2, y + 37, value, 17)]


def svg_text(x, y, words, size, anchor="middle", fill=INK):
    """A line of text in SVG."""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
            f'{html.escape(words)}</text>')


if __name__ == "__main__":
    sys.exit(common.run_script(main))
