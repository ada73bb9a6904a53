"""Score test sets with a base model or a fine-tuned one; all metrics with 95% intervals.

    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --test mind movielens --out results/zero-shot
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --adapter runs/mind --test all --out results/mind
    python evaluate.py --model sentence-t5 --type embed --test all --out results/sentence-t5
    python evaluate.py --model itemknn --test all --out results/itemknn            (also: random, popularity)
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --test mind --out results/other --history other \\
        --against results/zero-shot                                                (does the history matter?)

For each dataset it writes OUT/<dataset>.json (metrics, intervals, cost) and OUT/<dataset>.scores.jsonl: a line that
says how the scores were made, then a line per user, {"user": ..., "scores": [...], "labels": [...]}, with "dropped"
where items of the history did not fit. A killed run continues by the same command, without --overwrite.
"""
import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError, say

BASELINES = ("random", "popularity", "itemknn")  # no model: to read other numbers against
SHOWN = ("auc", "group_auc", "ndcg@10", "mrr")  # of the metrics, in tables


def arguments(argv):
    parser = common.Parser(__doc__, "evaluate.py")
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder, short name ({', '.join(common.MODELS)}) "
        f"or a baseline without a model: {', '.join(BASELINES)}")
    add("--test", nargs="+", required=True, metavar="DATASET", help="datasets, or all: those prepared")
    add("--out", required=True, type=common.output_folder, metavar="RESULTS", help="folder for the results")
    add("--adapter", metavar="RUN", help="folder of a finetune.py run (its --out)")
    add("--split", choices=common.SPLITS, default="test", help="which users to score")
    add("--limit-users", type=common.positive_number, metavar="N", help="score the first N users only")
    add("--history", choices=["own", "other"], default="own",
        help="other: score each user with the history of the next user of the split")
    add("--against", metavar="RESULTS", help="print the paired differences from these results, too")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if args.model in BASELINES and args.adapter:
        raise UserError(f"{args.model} is a baseline without a model: it takes no --adapter")
    if args.against and Path(args.against).resolve() == Path(args.out).resolve():
        raise UserError("--against and --out are the same folder")
    return args


def main(argv=None):
    args = arguments(argv)
    metas = check_tests(args)
    run = common.read_run(args.adapter, args)
    if args.adapter:
        say_warnings(args, run, metas)
    jobs = {name: job_of(args, name) for name in metas}
    statuses = {name: status_of(args, name, job) for name, job in jobs.items()}  # raises where a file is in the way
    compared = check_against(args, jobs) if args.against else []
    scorer = None  # baselines have none
    results = []
    for name, status in statuses.items():
        path = result_path(args.out, name)
        if status == "finished":
            say(f"{path} is finished already; --overwrite scores it again")
        else:
            users, items = common.read_users(args.data, name, args.split, args.limit_users)
            if args.history == "other":
                users = with_other_histories(name, users)
            if scorer is None and args.model not in BASELINES:
                scorer = common.load_scorer(args)
                if args.adapter:
                    scorer = common.load_adapter(scorer, args.adapter)
            cost = score_users(args, name, users, items, scorer, jobs[name], status)
            write_result(args, name, users, items, scorer, jobs[name], cost)
        results.append(common.read_json(path))
    domains = {**common.domains_of(metas), **run["domains"]}
    print(table(results, run["train_chain"], domains))
    if compared:
        print("\n" + paired_differences(args, compared))

# ------------------------------------------------------------------------------------------------ before scoring


def check_tests(args):
    """{dataset: meta.json} of the datasets to score. Raises UserError where one or its split is missing."""
    names = args.test
    if names == ["all"]:
        names = common.prepared(args.data, args.split)
        if not names:
            raise UserError(f"no dataset with a {args.split} split in {args.data}; see prepare_data.py --help")
        missing = [name for name, row in common.DATASETS.items() if row.test and name not in names]
        if missing and set(names) & set(common.DATASETS):
            say(f"not prepared, so not evaluated: {', '.join(missing)}")
    return common.check_datasets(args.data, names, args.split)


def say_warnings(args, run, names):
    """Say why the results of an adapter are weaker evidence than they look."""
    now = {**vars(args), "prompt": common.load_prompt(args.prompt)}
    for key in ("prompt", "chat_template", "pooling", "max_length"):
        if run["job"][key] != now[key]:
            say(f"{args.adapter} was trained with another --{key.replace('_', '-')}")
    for name in names:
        if args.split != "test" and name in run["train_chain"]:
            say(f"{name}: its train and valid users have shaped this adapter, so the {args.split} split is not unseen")
        elif name in run["valid_chain"] and name not in run["train_chain"]:
            say(f"{name}: its own validation labels chose this checkpoint (--valid), so it is not unseen")


def result_path(out, name):
    return Path(out, f"{name}.json")


def scores_path(out, name):
    return Path(out, f"{name}.scores.jsonl")


def job_of(args, name):
    """What the scores of a dataset are made of: scores of another job are never taken for these."""
    job = common.job_of(args, ("test", "against"))
    job["adapter"] = common.adapter_identity(args.adapter)
    job["data_sha256"] = common.data_sha256(args.data, name)
    if args.model in BASELINES:
        job["model"], job["dtype"] = args.model, None
    return job


def status_of(args, name, job):
    """common.job_status of what stands in --out: "start", "continue" or "finished"."""
    if args.overwrite:
        return "start"
    result = result_path(args.out, name)
    found = common.job_in(scores_path(args.out, name))
    if result.exists() and common.job_in(result) != found:
        found = {}  # of other scores, of another program, or its scores are gone
    return common.job_status(Path(args.out, name), job, found, result.exists())


def check_against(args, jobs):
    """The datasets that --against holds, too. Raises UserError where it holds none, or other users or candidates."""
    shared = [name for name in jobs if result_path(args.against, name).exists()]
    if not shared:
        raise UserError(f"--against {args.against} holds no result of {', '.join(jobs)}")
    for name in shared:
        other = common.job_in(scores_path(args.against, name))
        if not other:
            raise UserError(f"--against {args.against} holds no scores of evaluate.py for {name}")
        for key in ("data_sha256", "split", "limit_users"):
            if other.get(key) != jobs[name][key]:
                raise UserError(f"{result_path(args.against, name)} was made on other users or candidates "
                                f"({key} differs): a paired difference needs the same")
    return shared

# ------------------------------------------------------------------------------------------------------- scoring


def with_other_histories(name, users):
    """Each user with the history of the next one, whom "history_of" names; the user's own candidates are left out.

    A model that personalises loses by it, one that only knows what is popular does not. Raises UserError for one user.
    """
    if len(users) == 1:
        raise UserError(f"{name}: --history other needs another user, and there is only one")
    others = []
    for user, other in zip(users, [*users[1:], users[0]]):
        history = [item for item in other["history"] if item not in user["candidates"]]
        others.append({**user, "history": history, "history_of": other["user"]})
    return others


def score_users(args, name, users, items, scorer, job, status):
    """Write the scores file: the job, then a line per user, appended as they are scored. Returns what it took.

    A run that was killed goes on after its last whole line; what it takes is then counted for the users after that.
    """
    started = time.perf_counter()
    path = scores_path(args.out, name)
    done = max(0, cut_torn_line(path) - 1) if status == "continue" else 0  # the first line is the job
    # about four forward passes where a user's row has 1,000 tokens: a kill loses some seconds
    chunk_size = max(1, scorer.max_tokens // 256) if scorer else 256
    chosen_by = None if scorer else read_choices(args, name)
    known = {}  # embeddings of items
    cost = {"tokens_scored": 0, "tokens_unpacked": 0}
    progress = tqdm(total=len(users), initial=done, desc=name, unit="user")
    for start in range(done, len(users), chunk_size):
        chunk = users[start:start + chunk_size]
        if scorer:
            scores, took = common.scores_of(scorer, [common.with_texts(user, items) for user in chunk], known)
        else:
            scores = baseline_scores(args, name, chunk, chosen_by)
            took = {"dropped": [0] * len(chunk)}
        lines = score_lines(name, chunk, scores, took["dropped"])
        if start == 0:  # the first scores are there: only now does an older result go
            result_path(args.out, name).unlink(missing_ok=True)
            common.write_atomically(path, json.dumps({"job": job, "users": len(users)}) + "\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)
        progress.update(len(chunk))
        for key in cost:
            cost[key] += took.get(key, 0)
    progress.close()
    cost["samples_scored"] = sum(len(user["candidates"]) for user in users[done:])
    cost["seconds"] = time.perf_counter() - started
    return cost


def cut_torn_line(path):
    """Cut off a last line that a kill has torn. Returns the number of whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    os.truncate(path, whole)
    return content.count(b"\n")


def score_lines(name, users, scores, dropped):
    """The lines of users in the scores file. Raises UserError where a score is no number."""
    lines = ""
    for user, values, cut in zip(users, scores, dropped):
        if not np.isfinite(values).all():
            raise UserError(f"{name}: scores of user {user['user']} are NaN or infinite; try --dtype float32")
        line = {"user": user["user"], "scores": values.tolist(), "labels": user["labels"]}
        if cut:
            line["dropped"] = cut  # so many of the oldest items of the history did not fit
        lines += json.dumps(line) + "\n"
    return lines


def write_result(args, name, users, items, scorer, job, cost):
    """Compute the metrics of a whole scores file and write the result."""
    scored, histories_cut = read_scores(scores_path(args.out, name))
    labels = np.concatenate([labels for _, labels in scored])
    truncated = {"texts": common.count_long_texts(users, items), "histories": histories_cut}
    metrics = common.evaluate_users(scored, seed=args.seed)
    low, high = metrics["ci"]["group_auc"] or [0, 1]  # undefined: it may be anything
    collapsed = low <= 0.5 <= high and high - low < 0.1  # chance is inside the interval, and the interval is narrow
    result = {
        "dataset": name,
        "split": args.split,
        "type": args.type,
        "model": common.model_name(args.model),
        "adapter": args.adapter,
        "commit": getattr(scorer.model.config, "_commit_hash", None) if scorer else None,  # of a model from the hub
        "layout": scorer.layout if scorer else None,
        "pooling": scorer.pooling if args.type == "embed" and scorer else None,
        "n_users": len(users),
        "n_samples": len(labels),
        "n_positives": int(labels.sum()),
        **metrics,
        "collapsed": collapsed,
        "truncated": truncated,
        **cost,
        "samples_per_s": cost["samples_scored"] / cost["seconds"],
        "peak_memory_gb": common.peak_memory_gb(scorer.model.device if scorer else "cpu"),
        "data_sha256": job["data_sha256"],
        "seed": args.seed,
        "job": job,
        "arguments": vars(args),
        "versions": common.versions()}
    common.write_json(result_path(args.out, name), result)
    for what, count in truncated.items():
        if count:
            say(f"{name}: {count} {what} were cut to fit")
    if collapsed:
        say(f"{name}: group AUC {metrics['group_auc']:.3f} cannot be told from chance (0.5): 95% interval {low:.3f} to "
            f"{high:.3f}")


def read_scores(path):
    """([(scores, labels)] per user, number of users whose history was cut) of a scores file.

    Raises UserError where users are missing.
    """
    first, *lines = [line for _, line in common.read_lines(path)]
    if len(lines) != first.get("users"):
        raise UserError(f"{path} holds {len(lines)} of {first.get('users')} users; --overwrite scores it again")
    scored, cut = [], 0
    for line in lines:
        scored.append((np.array(line["scores"], float), np.array(line["labels"])))
        cut += "dropped" in line
    return scored, cut

# ----------------------------------------------------------------------------------- baselines without a model


def read_choices(args, name):
    """{item: names of the users who chose it}, as a positive or in their history, in the training split.

    Without a training split, or when it is the one to score: in the histories of the scored split, not by its labels.
    """
    has_train = args.split != "train" and Path(args.data, name, "train.jsonl").exists()
    users, _ = common.read_users(args.data, name, "train" if has_train else args.split)
    chosen_by = defaultdict(set)
    for user in users:
        for item in user["history"]:
            chosen_by[item].add(user["user"])
        for item, label in zip(user["candidates"], user["labels"]):
            if label and has_train:
                chosen_by[item].add(user["user"])
    return chosen_by


def baseline_scores(args, name, users, chosen_by):
    """Scores without a model, [float64 (candidates,) per user]. chosen_by: {item: names of users}."""
    all_scores = []
    for user in users:
        own = {user["user"], user.get("history_of")}  # their choices never count
        scores = []
        for candidate in user["candidates"]:
            if args.model == "random":  # uniform on [0, 1)
                score = common.digest(args.seed, name, user["user"], "random", candidate) / 2**64
            elif args.model == "popularity":
                score = len(chosen_by[candidate] - own)
            else:
                score = itemknn(user["history"], candidate, chosen_by, own)
            scores.append(score)
        all_scores.append(np.array(scores, float))
    return all_scores


def itemknn(history, candidate, chosen_by, own):
    """Sum over the history's items h of n(h, c) / sqrt(n(h) n(c)) for the candidate c (Sarwar et al. 2001).

    n counts the users, without those in `own`, who chose the item, or both. chosen_by: {item: names of users}.
    """
    score = 0.0
    fans = chosen_by[candidate] - own
    for item in history:
        others = chosen_by[item] - own
        both = len(fans & others)
        if both:
            score += both / math.sqrt(len(fans) * len(others))
    return score

# -------------------------------------------------------------------------------------------------------- tables


def show(estimate, sign=""):
    """An estimate (see common.estimate) with its interval, "-" where it is undefined. sign: "+" marks positive ones."""
    if not estimate or estimate["ci"] is None:
        return "-"
    low, high = estimate["ci"]
    return f"{estimate['value']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def table(results, train_chain, domains):
    """The results as a Markdown table, with the main metrics. train_chain: the datasets the model has seen."""
    rows = [["dataset", "setting", "users", "samples", *SHOWN, "samples/s"]]
    for result in results:
        setting = common.setting_of(train_chain, result["dataset"], domains)
        if result["model"] in BASELINES:
            setting = "-"
        row = [result["dataset"], setting, str(result["n_users"]), str(result["n_samples"])]
        for name in SHOWN:
            row.append(show({"value": result[name], "ci": result["ci"][name]}))
        rows.append([*row, f"{result['samples_per_s']:.0f}"])
    note = "[95% intervals over the choice of users, not over the luck of a training run]"
    return f"{common.markdown_table(rows)}\n{note}"


def paired_differences(args, names):
    """The paired differences on these datasets from the results in --against, as a Markdown table."""
    rows = [[f"difference from {args.against}", "users", *SHOWN]]
    for name in names:
        ours, _ = read_scores(scores_path(args.out, name))
        theirs, _ = read_scores(scores_path(args.against, name))
        row = [name, str(len(ours))]
        for metric in SHOWN:  # one seed: the same users are drawn for both
            our_draws = common.bootstrap(metric, ours, seed=args.seed)
            their_draws = common.bootstrap(metric, theirs, seed=args.seed)
            row.append(show(common.estimate(our_draws - their_draws), "+"))
        rows.append(row)
    note = "[95% intervals of the paired difference; by chance alone, 1 in 20 excludes 0]"
    return f"{common.markdown_table(rows)}\n{note}"


if __name__ == "__main__":
    sys.exit(common.run_script(main))
