"""Every source against every target: what transfers, what harms, and how sure that is.

    python transfer_matrix.py --model qwen-2-0.5b --sources mind pens mind+pens --targets mind goodreads --out matrix
    ... --dry-run | grep finetune.py | parallel        then        ... --dry-run | grep evaluate.py | parallel
    python transfer_matrix.py --compare matrix matrix-of-a-larger-model

Rows: the base model (zero-shot) and the model trained on each source (a+b: on both). Columns: test sets, and their mean.
A training is a finetune.py command line, a cell an evaluate.py one, printed before it runs; what is finished already is
not run again. Writes to OUT: matrix.json (everything), .csv, .md (also printed), .svg (a heat map), runs/<source>/ and
cells/<source>/.
"""
import argparse
import html
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np

import common
import evaluate
import finetune
from common import UserError, say

ZERO = "zero-shot"
SIGNS = {"better": "▲", "worse": "▼", "": ""}


def arguments(argv):
    parser = common.Parser(__doc__, "transfer_matrix.py")
    add = parser.add_argument
    add("--model", help="hub id, local folder or a short name, as for finetune.py")
    add("--sources", nargs="+", metavar="SOURCE", help="datasets to train on, a row each; a+b: trained on both")
    add("--targets", nargs="+", metavar="TARGET", help="datasets to test on, a column each")
    add("--out", metavar="DIR", type=common.folder, help="folder of the matrix")
    add("--metric", choices=common.METRIC_NAMES, default="auc", help="metric in the cells")
    add("--k", nargs="+", type=common.positive, default=[1, 3, 5], help="of the reciprocal rank average RRA@K")
    add("--dry-run", action="store_true", help="run nothing; print the command line of each missing training and cell")
    add("--finetune-args", default="", metavar="'...'", help="more for finetune.py: --finetune-args='--lr 1e-3'")
    add("--evaluate-args", default="", metavar="'...'", help="more for evaluate.py")
    add("--compare", nargs="+", metavar="DIR", help="print one table over several matrices: models by setting")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if args.compare:
        return args
    if not (args.model and args.sources and args.targets and args.out) or args.model in evaluate.BASELINES:
        parser.error("give --model (one that can be fine-tuned), --sources, --targets and --out, or --compare")
    args.sources = list(dict.fromkeys(args.sources))
    args.targets = list(dict.fromkeys(args.targets))
    try:
        args.finetune_args, args.evaluate_args = shlex.split(args.finetune_args), shlex.split(args.evaluate_args)
    except ValueError as error:
        parser.error(f"--finetune-args or --evaluate-args: {error}")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        print(compare(args.compare))
        return 0
    missing = []
    for source in [ZERO, *args.sources]:  # what is wrong or in the way is said before hours of training
        for target in [None, *args.targets]:
            if (source, target) != (ZERO, None) and not is_finished(*command(args, source, target)):
                missing.append((source, target))
    if args.dry_run:
        for source, target in sorted(missing, key=is_cell):  # trainings first
            print(command_line(*command(args, source, target)))
        return 0

    done, failed = [], []
    for source in [ZERO, *args.sources]:
        if (source, None) in missing and not perform(*command(args, source, None)):
            failed.append(f"training on {source}")
            continue  # no cells without their training
        for target in args.targets:
            if (source, target) not in missing or perform(*command(args, source, target)):
                done.append((source, target))
            else:
                failed.append(f"{source} on {target}")
    matrix = analyse(args, done)
    try:
        matrix["similarity"] = similarity(args, matrix)
    except UserError as error:
        failed.append(f"similarity of the datasets ({error})")
    matrix["failed"] = failed
    common.write_json(Path(args.out, "matrix.json"), matrix)
    common.write_atomically(Path(args.out, "matrix.csv"), comma_separated(matrix))
    common.write_atomically(Path(args.out, "matrix.md"), markdown(matrix))
    common.write_atomically(Path(args.out, "matrix.svg"), draw_svg(matrix))
    print(f"\n{markdown(matrix)}\n{args.out}: matrix.json, matrix.csv, matrix.md, matrix.svg")
    return 1 if failed else 0

# -------------------------------------------------------------------------------------------------------- command lines


def command(args, source, target):
    """(script, arguments) of a cell or, without a target, of a row's training."""
    argv = ["--model", args.model, *shared_flags(args)]
    run, cells = str(Path(args.out, "runs", source)), str(Path(args.out, "cells", source))
    if target is None:
        return finetune, [*argv, "--train", *source.split("+"), "--out", run, *args.finetune_args]
    if source != ZERO:
        argv += ["--adapter", run]
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


def is_cell(source_and_target):
    return source_and_target[1] is not None


def is_finished(script, argv):
    """Whether what a command line makes is there. Raises UserError on a wrong argument or another output in its way."""
    args = script.arguments(argv)
    if script is finetune:
        finetune.check_train(args)
        return finetune.saved_state(args, finetune.job_of(args))[0] == "finished"
    evaluate.check_tests(args)
    target = args.test[0]
    return evaluate.state_of(args, target, evaluate.job_of(args, target)) == "finished"


def perform(script, argv):
    """Run a command line; returns whether it succeeded."""
    print(f"$ {command_line(script, argv)}", flush=True)
    try:
        code = common.run(script.main, argv)
    except Exception as error:  # whatever it is, the other cells are still worth having
        say(f"error: {type(error).__name__}: {error}")
        code = 1
    if code == 130:  # Ctrl-C
        sys.exit(code)
    if code:
        say(f"failed, left empty: {command_line(script, argv)}")
    return code == 0

# ------------------------------------------------------------------------------------------------------------- analysis


def analyse(args, done):
    """What matrix.json holds, from the results of the cells that are done, [(source, target)]."""
    metas = common.check_datasets(args.targets, args.data, "test") if not args.evaluate_args else {}
    domains = common.domains_of(metas)
    rows, draws = [], {}
    for source in [ZERO, *args.sources]:
        run = {}
        if source != ZERO and Path(args.out, "runs", source, "run.json").exists():
            run = common.read_json(Path(args.out, "runs", source, "run.json"))
        domains.update(run.get("domains", {}))
        cells = {}
        for target in args.targets:
            if (source, target) in done:
                cells[target], draws[source, target] = read_cell(args, source, target)
                cells[target]["setting"] = common.setting_of(run.get("train_chain", []), target, domains)
                compare_with_zero(cells[target], rows, draws, source, target)
        cells["mean"] = mean_cell(cells, draws, source, args.targets)
        rows.append({"source": source, "cells": cells, "training": training_of(run)})
    gains = [cell for row in rows for name, cell in row["cells"].items() if name != "mean" and cell.get("gain_ci")]
    marks = {"compared": len(gains), "by_chance": len(gains) / 20}
    for mark in ("better", "worse"):
        marks[mark] = sum(cell["mark"] == mark for cell in gains)
    return {"model": common.model_name(args.model), "type": args.type, "metric": args.metric, "targets": args.targets,
            "domains": {name: domains.get(name) for name in [*args.targets, *args.sources]}, "rows": rows,
            "marks": marks, "rra": rra(args, rows, draws), "joint_gain": joint_gain(rows, draws, args.targets)}


def read_cell(args, source, target):
    """(a cell's value and facts, its bootstrap draws) from the files of evaluate.py."""
    cell_args = evaluate.arguments(command(args, source, target)[1])
    result = common.read_json(evaluate.result_path(cell_args.out, target))
    users, _ = common.read_users(cell_args.data, target, cell_args.split, cell_args.limit_users)
    scored, _ = evaluate.read_scores(evaluate.scores_path(cell_args.out, target), users)
    # one seed per target: draws are paired within a column and independent between columns
    draws = common.bootstrap(scored, [args.metric], seed=common.digest(args.seed, target))[args.metric]
    cell = {"value": result[args.metric], "ci": result["ci"][args.metric], "gain": None, "gain_ci": None, "mark": ""}
    for key in ("n_users", "n_samples", "collapsed", "data_sha256"):
        cell[key] = result[key]
    return cell, draws


def compare_with_zero(cell, rows, draws, source, target):
    """Enter the difference from the zero-shot cell of the target, its paired interval and the mark."""
    zero = rows[0]["cells"].get(target) if rows else None
    if not zero or cell["value"] is None or zero["value"] is None:
        return
    cell["gain"] = cell["value"] - zero["value"]
    cell["gain_ci"] = common.interval(draws[source, target] - draws[ZERO, target])
    if cell["gain_ci"][0] > 0:
        cell["mark"] = "better"
    if cell["gain_ci"][1] < 0:
        cell["mark"] = "worse"  # negative transfer


def mean_cell(cells, draws, source, targets):
    """The mean over all targets as a cell; {} where one is missing or undefined."""
    if any(cells.get(target, {}).get("value") is None for target in targets):
        return {}
    values = [cells[target]["value"] for target in targets]
    sampled = [draws[source, target] for target in targets]
    return {"value": float(np.mean(values)), "ci": common.interval(np.mean(sampled, axis=0)), "gain": None, "mark": ""}


def training_of(run):
    """What a row of the matrix tells about its training."""
    keys = ("train_chain", "valid_chain", "steps", "samples", "seconds", "unstable", "beats_base")
    return {key: run[key] for key in keys if key in run}


def rra(args, rows, draws):
    """{K: {single source: [RRA@K, its 95% interval]}}, the interval from the cells' draws."""
    singles = [row for row in rows if "+" not in row["source"] and row["source"] != ZERO]
    values, sampled = {}, [{} for _ in range(1000)]  # {source: {target: metric}}, as it is and in every draw
    for row in singles:
        source = row["source"]
        values[source] = {target: row["cells"].get(target, {}).get("value") for target in args.targets}
        for i, table in enumerate(sampled):
            table[source] = {}
            for target in args.targets:
                value = draws[source, target][i] if (source, target) in draws else math.nan
                table[source][target] = None if math.isnan(value) else value
    result = {}
    for k in args.k:
        averages = common.reciprocal_rank_average(values, k)
        drawn = [common.reciprocal_rank_average(table, k) for table in sampled]
        result[str(k)] = {}
        for source, average in averages.items():
            of_source = np.array([one[source] for one in drawn], float)  # None becomes NaN, which is left out
            result[str(k)][source] = [average, common.interval(of_source)]
    return result


def joint_gain(rows, draws, targets):
    """H - G: what a target's own data adds to joint training, the mean over targets that have cells of both; or None."""
    used, values, sampled = [], [], []
    for target in targets:
        by_letter = {"G": [], "H": []}
        for row in rows:
            cell = row["cells"].get(target, {})
            if cell.get("setting") in by_letter and cell["value"] is not None:
                by_letter[cell["setting"]].append((cell["value"], draws[row["source"], target]))
        if by_letter["G"] and by_letter["H"]:
            (g, g_draws), (h, h_draws) = mean_pair(by_letter["G"]), mean_pair(by_letter["H"])
            used.append(target)
            values.append(h - g)
            sampled.append(h_draws - g_draws)
    if not used:
        return None
    return {"targets": used, "value": float(np.mean(values)), "ci": common.interval(np.mean(sampled, axis=0))}


def mean_pair(cells):
    """The means of values and of draws of cells, [(value, draws)]."""
    return np.mean([value for value, _ in cells]), np.mean([draws for _, draws in cells], axis=0)


def similarity(args, matrix):
    """Does similarity go with transfer? Cosine of the datasets' mean item embeddings against the gain, over pairs of a
    single source and another target: {"pairs": ..., "rank_correlation": Spearman's, None where it is undefined}."""
    scorer = common.load_scorer(argparse.Namespace(**{**vars(args), "type": "embed"}))
    pairs, means = [], {}
    for row in matrix["rows"]:
        source = row["source"]
        for target in args.targets:
            gain = row["cells"].get(target, {}).get("gain")
            if gain is None or "+" in source or source == target:
                continue
            for name in (source, target):
                if name not in means:
                    texts = list(common.read_items(args.data, name).values())[:500]
                    vectors = common.embed_ids(scorer, common.encode_items(scorer, [text[:512] for text in texts]))
                    mean = np.mean(vectors, axis=0)
                    means[name] = mean / np.linalg.norm(mean)
            cosine = float(means[source] @ means[target])
            pairs.append({"source": source, "target": target, "cosine": cosine, "gain": gain})
    cosines = np.array([pair["cosine"] for pair in pairs])
    gains = np.array([pair["gain"] for pair in pairs])
    return {"pairs": pairs, "rank_correlation": rank_correlation(cosines, gains)}


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, ties at their average rank. None below 3 pairs or without spread."""
    if len(a) < 3 or not np.isfinite(a).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    ranks = []
    for values in (a, b):
        ranks.append([(values < value).sum() + (values == value).sum() / 2 for value in values])
    return float(np.corrcoef(ranks)[0, 1])

# --------------------------------------------------------------------------------------------------------------- tables


def show(value, interval, form=".3f"):
    """A value with its interval; "" where there is none."""
    if value is None or interval is None:
        return ""
    return f"{value:{form}} [{interval[0]:.3f}, {interval[1]:.3f}]"


def markdown(matrix):
    """The matrix as three tables (the metric; differences from zero-shot; RRA and training) and notes."""
    columns = [*matrix["targets"], "mean"]
    values = [[f"{matrix['metric']}, trained on", *columns]]
    gains = [["difference from zero-shot", *matrix["targets"]]]
    trainings = [["trained on", *(f"RRA@{k}" for k in matrix["rra"]), "steps", "samples"]]
    for row in matrix["rows"]:
        line, gain_line = [row["source"]], [row["source"]]
        for column in columns:
            cell = row["cells"].get(column, {})
            text = show(cell.get("value"), cell.get("ci"))
            line.append(f"{cell.get('setting', '')} {text} {SIGNS[cell.get('mark', '')]}".strip())
            if column != "mean":
                gain_line.append(show(cell.get("gain"), cell.get("gain_ci"), "+.3f"))
        values.append(line)
        if row["source"] != ZERO:
            gains.append(gain_line)
            ranks = [show(*matrix["rra"][k].get(row["source"], [None, None])) for k in matrix["rra"]]
            training = [str(row["training"].get(key, "")) for key in ("steps", "samples")]
            trainings.append([row["source"], *ranks, *training])
    parts = [f"# Transfer matrix of {matrix['model']}, {matrix['type']}-based"]
    parts += [common.markdown_table(table) for table in (values, gains, trainings)]
    parts.append("\n".join(f"- {note}" for note in notes(matrix)))
    return "\n\n".join(parts) + "\n"


def notes(matrix):
    """What has to be said under the tables."""
    marks, joint = matrix["marks"], matrix["joint_gain"]
    lines = [
        f"▲ better, ▼ worse than zero-shot (negative transfer): the 95% interval of the paired difference excludes 0. "
        f"Of {marks['compared']} cells {marks['better']} are ▲ and {marks['worse']} ▼; if nothing differed, chance alone "
        f"would mark {marks['by_chance']:.1f} (5%).",
        "Intervals are 95% bootstrap intervals: they cover the choice of users, not the luck of a training run.",
        "RRA@K ranks the single sources and says nothing of harm: the first of two that are worse than zero-shot gets 1.",
        "H - G, what a target's own data adds to joint training: no target has cells of both settings."]
    if joint:
        lines[-1] = (f"H - G, what a target's own data adds to joint training, mean over {', '.join(joint['targets'])}: "
                     f"{show(joint['value'], joint['ci'], '+.3f')}.")
    if matrix.get("similarity"):
        rho = matrix["similarity"]["rank_correlation"]
        lines.append(f"Rank correlation of the similarity of source and target (cosine of mean item embeddings) with the "
                     f"difference from zero-shot, over {len(matrix['similarity']['pairs'])} pairs: "
                     + ("undefined." if rho is None else f"{rho:+.2f}."))
    collapsed = [target for target, cell in matrix["rows"][0]["cells"].items() if cell.get("collapsed")]
    warnings = {"Zero-shot collapse, scores as good as chance": collapsed, "Unstable training": [],
                "Never better than the base model on validation users": [], "Validated on other sets": []}
    for row in matrix["rows"][1:]:
        training = row["training"]
        if training.get("unstable"):
            warnings["Unstable training"].append(row["source"])
        if not training.get("beats_base", True):
            warnings["Never better than the base model on validation users"].append(row["source"])
        if set(training.get("valid_chain", [])) - set(training.get("train_chain", [])):
            warnings["Validated on other sets"].append(row["source"])
    warnings["Failed"] = matrix["failed"]
    return lines + [f"{what}: {', '.join(names)}." for what, names in warnings.items() if names]


def comma_separated(matrix):
    """A line per cell, for a spreadsheet."""
    head = ["source", "target", "setting", matrix["metric"], "low", "high", "gain", "gain_low", "gain_high", "mark"]
    lines = [head + ["n_users", "n_samples"]]
    for row in matrix["rows"]:
        for target in matrix["targets"]:
            cell = row["cells"].get(target)
            if cell:
                low, high = cell["ci"] or ["", ""]
                gain_low, gain_high = cell["gain_ci"] or ["", ""]
                lines.append([row["source"], target, cell["setting"], cell["value"], low, high, cell["gain"], gain_low,
                              gain_high, cell["mark"], cell["n_users"], cell["n_samples"]])
    return "".join(",".join("" if value is None else str(value) for value in line) + "\n" for line in lines)


def compare(folders):
    """One table over several matrices: the mean over targets by setting, of the cells that every matrix has."""
    matrices = [common.read_json(Path(folder, "matrix.json")) for folder in folders]
    common_cells = None
    for matrix in matrices:
        cells = {}  # what two matrices must agree on, to be compared
        for row in matrix["rows"]:
            for target in matrix["targets"]:
                if row["cells"].get(target):
                    cell = row["cells"][target]
                    facts = (matrix["metric"], cell["setting"], cell["data_sha256"], cell["n_users"])
                    cells[row["source"], target] = facts
        common_cells = set(cells.items()) if common_cells is None else common_cells & set(cells.items())
    letters = sorted({facts[1] for _, facts in common_cells})
    if not letters:
        raise UserError("the matrices share no cell: other metrics, sources, targets or test users")
    table = [[matrices[0]["metric"], *letters, "H - G"]]
    for folder, matrix in zip(folders, matrices):
        by_source = {row["source"]: row["cells"] for row in matrix["rows"]}
        line = [f"{matrix['model']}, {matrix['type']} ({folder})"]
        for letter in letters:
            values = [by_source[source][target]["value"] for (source, target), facts in common_cells if facts[1] == letter]
            line.append(f"{np.mean(values):.3f} ({len(values)})")
        joint = matrix["joint_gain"]
        table.append([*line, show(joint["value"], joint["ci"], "+.3f") if joint else ""])
    meanings = [f"- {letter}: {common.SETTINGS[letter]}" for letter in letters]
    return "\n".join([common.markdown_table(table), *meanings, "- In brackets: the number of cells of the mean."])

# -------------------------------------------------------------------------------------------------------------- picture

WIDTH, HEIGHT, LEFT, TOP = 92, 60, 190, 120  # of a cell; where the cells begin
INK, GREY = "#1f2328", "#59636e"
WHITE, BLUE, ORANGE = (244, 244, 242), (24, 88, 160), (160, 58, 0)  # told apart with any colour vision


def draw_svg(matrix):
    """The matrix as a heat map (SVG text): blue better, orange worse than zero-shot, the darker the more."""
    rows, columns = matrix["rows"], [*matrix["targets"], "mean"]
    width, bottom = LEFT + WIDTH * len(columns) + 20, TOP + HEIGHT * len(rows)
    limit = 0.05  # the difference with the darkest colour
    for row in rows:
        for cell in row["cells"].values():
            limit = max(limit, abs(cell.get("gain") or 0))
    parts = [text(20, 34, f"{matrix['metric'].upper()} of {matrix['model'][-40:]}, {matrix['type']}-based", 18, "start"),
             text(20, 56, "Row: trained on. Column: tested on. Small: setting, difference from zero-shot.", 12, "start")]
    for i, target in enumerate(columns):
        x = LEFT + WIDTH * (i + 0.5)
        parts.append(text(x, TOP - 24, target, 13))
        parts.append(text(x, TOP - 8, matrix["domains"].get(target) or "", 11, fill=GREY))
    for j, row in enumerate(rows):
        y = TOP + HEIGHT * j
        for n, name in enumerate(row["source"].split("+")[:4]):
            parts.append(text(LEFT - 10, y + HEIGHT / 2 + 5 + 14 * n, name if n == 0 else f"+ {name}", 12, "end"))
        for i, target in enumerate(columns):
            parts += draw_cell(LEFT + WIDTH * i, y, row["cells"].get(target), limit)
    marks = matrix["marks"]
    legend = [f"▲ better than zero-shot: {marks['better']} of {marks['compared']}; ▼ worse (negative transfer): "
              f"{marks['worse']}; by chance alone: {marks['by_chance']:.1f}",
              "Marked where the 95% interval of the paired difference excludes 0.",
              "Intervals cover the choice of users, not the luck of a training run."]
    for n, line in enumerate(legend):
        parts.append(text(20, bottom + 28 + 18 * n, line, 12, "start"))
    size = f'width="{width}" height="{bottom + 28 + 18 * len(legend)}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
                      f'<rect {size} fill="#ffffff"/>', *parts, "</svg>\n"])


def draw_cell(x, y, cell, limit):
    """SVG lines of a cell: setting, mark, value, difference from zero-shot."""
    box = f'<rect x="{x + 1}" y="{y + 1}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="4" '
    if not cell:
        return [box + f'fill="none" stroke="{GREY}" stroke-dasharray="4"/>']
    gain = cell.get("gain") or 0
    end, share = BLUE if gain > 0 else ORANGE, abs(gain) / limit
    colour = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(WHITE, end))
    ink = "#ffffff" if share > 0.6 else INK
    value = "-" if cell["value"] is None else f"{cell['value']:.3f}"
    shown_gain = "" if cell.get("gain") is None else f"{cell['gain']:+.3f}"
    return [box + f'fill="{colour}"/>', text(x + 8, y + 17, cell.get("setting", ""), 11, "start", ink),
            text(x + WIDTH - 8, y + 17, SIGNS[cell["mark"]], 11, "end", ink),
            text(x + WIDTH / 2, y + 37, value, 17, fill=ink), text(x + WIDTH / 2, y + 53, shown_gain, 11, fill=ink)]


def text(x, y, words, size, anchor="middle", fill=INK):
    """A line of text in SVG; what XML does not allow becomes "?"."""
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
            f'{html.escape(words)}</text>')


if __name__ == "__main__":
    sys.exit(common.run(main))
