"""Score test sets with a base model or a fine-tuned one; all metrics with 95% intervals.

    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --test mind movielens --out results/zero-shot
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --adapter runs/mind --test all --out results/mind
    python evaluate.py --model sentence-t5 --type embed --test all --out results/sentence-t5
    python evaluate.py --model itemknn --test all --out results/itemknn     (also: random, popularity, first-seen)
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --test mind --out results/other --history other \\
        --against results/zero-shot                                         (does the history matter?)

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
import torch
from tqdm import tqdm

import common
from common import UserError, say

BASELINES = ("random", "popularity", "itemknn", "first-seen")  # no model: to read other numbers against
SHOWN = ("auc", "group_auc", "ndcg@10", "mrr")  # of the metrics, in tables


def arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder, short name ({', '.join(common.MODELS)}) "
        f"or a baseline without a model: {', '.join(BASELINES)}")
    add("--test", nargs="+", required=True, metavar="DATASET", help="datasets, or all: those prepared")
    add("--out", required=True, metavar="RESULTS", help="folder for the results")
    add("--adapter", metavar="RUN", help="folder of a finetune.py run (its --out)")
    add("--split", choices=common.SPLITS, default="test", help="which users to score (default: %(default)s)")
    add("--limit-users", type=common.positive_int, metavar="N", help="score the first N users only")
    add("--history", choices=["own", "other", "none"], default="own",
        help="other: score each user with the history of the next user; none: with an empty one")
    add("--against", metavar="RESULTS", help="print the paired differences from these results, too")
    common.shared_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    run = common.read_run(args.adapter, args)
    names = common.prepared(args.data, args.split) if args.test == ["all"] else args.test
    if not names:
        raise UserError(f"no dataset with a {args.split} split in {args.data}; see prepare_data.py --help")
    datasets = [common.read_dataset(args.data, name, args.split) for name in dict.fromkeys(names)]
    jobs = {data.name: job_of(args, data) for data in datasets}
    say_warnings(args, run, datasets)
    unfinished = [data for data in datasets if not is_finished(args, data.name, jobs[data.name])]
    compared = check_against(args, datasets) if args.against else []

    scorer = None  # baselines have none
    if unfinished and args.model not in BASELINES:
        scorer = common.load_scorer(args)
        if args.adapter:
            scorer = common.load_adapter(scorer, args.adapter)
    failed = []
    for data in unfinished:
        try:
            users = users_to_score(args, data)
            cost = score_users(args, data, users, scorer, jobs[data.name])
            write_result(args, data, users, scorer, jobs[data.name], cost)
        except (UserError, torch.OutOfMemoryError) as error:  # the other datasets are still worth having
            say(f"error: {data.name}: {error}")
            result = result_path(args.out, data.name)
            if result.exists():  # of before --overwrite: kept, but not taken for this one
                os.replace(result, f"{result}.old")
            failed.append(data.name)

    results = [common.read_json(result_path(args.out, data.name)) for data in datasets if data.name not in failed]
    domains = {**common.DOMAINS, **run["domains"], **{data.name: data.domain for data in datasets}}
    print(table(results, run["train_chain"], domains))
    if compared:
        print("\n" + paired_differences(args, [name for name in compared if name not in failed]))
    return 1 if failed else 0

# ------------------------------------------------------------------------------------------------ before scoring


def result_path(out, name):
    return Path(out, f"{name}.json")


def scores_path(out, name):
    return Path(out, f"{name}.scores.jsonl")


def job_of(args, data):
    """What the scores of a dataset are made of: scores of another job are never taken for these."""
    job = common.job_of(args, ("test", "against"))
    job["adapter"] = common.adapter_identity(args.adapter)
    job["data_sha256"] = data.sha256
    if args.model in BASELINES:
        job["model"], job["dtype"] = args.model, None
    return job


def is_finished(args, name, job):
    """Whether a dataset's result is there. Raises UserError where it, or its scores, were made by another job."""
    result = common.is_there(result_path(args.out, name), job, args.overwrite)
    scores = common.is_there(scores_path(args.out, name), job, args.overwrite)
    if result and scores:
        say(f"{result_path(args.out, name)} is finished already; --overwrite scores it again")
    return result and scores


def say_warnings(args, run, datasets):
    """Say why the results are weaker evidence than they look: how the adapter was trained, what a dataset gives away."""
    if args.adapter:
        now = {**vars(args), "prompt": common.load_prompt(args.prompt)}
        for key in ("prompt", "chat_template", "pooling", "max_length"):
            if run["job"][key] != now[key]:
                say(f"{args.adapter} was trained with another --{key.replace('_', '-')}")
        if not run["beats_base"]:
            say(f"{args.adapter} never beat its start on validation users: it is the adapter that training began with")
    for data in datasets:
        name = data.name
        if args.split != "test" and name in run["train_chain"]:
            say(f"{name}: its train and valid users have shaped this adapter, so the {args.split} split is not unseen")
        elif name in run["valid_chain"] and name not in run["train_chain"]:
            say(f"{name}: its own validation labels chose this checkpoint (--valid), so it is not unseen")
        counts = given_away(data, args.split)
        if counts["candidates_in_history"]:
            say(f"{name}: {counts['candidates_in_history']} candidates have the text of an item in the user's history, "
                f"{counts['positives_in_history']} of them positive")
        if counts["users_in_train"]:
            say(f"{name}: {counts['users_in_train']} {args.split} users are in its train.jsonl, too")


def given_away(data, split):
    """Counts of what makes a split easier than it looks. Candidates in the history: by text, so by id, too."""
    counts = {"candidates_in_history": 0, "positives_in_history": 0, "users_in_train": 0}
    trained = {user["user"] for user in data.splits["train"]} if split != "train" else set()
    for user in data.splits[split]:
        texts = {data.items[item] for item in user["history"]}
        for item, label in zip(user["candidates"], user["labels"]):
            if data.items[item] in texts:
                counts["candidates_in_history"] += 1
                counts["positives_in_history"] += label
        counts["users_in_train"] += user["user"] in trained
    return counts


def check_against(args, datasets):
    """The datasets that --against holds, too. Raises UserError where it holds none, or other users or candidates."""
    if Path(args.against).resolve() == Path(args.out).resolve():
        raise UserError("--against and --out are the same folder")
    shared = []
    for data in datasets:
        if result_path(args.against, data.name).exists():
            theirs = common.read_json(result_path(args.against, data.name))
            lines = score_lines(scores_path(args.against, data.name))
            users = data.splits[args.split][:args.limit_users]
            same_users = [line["user"] for line in lines] == [user["user"] for user in users]
            if not same_users or theirs["data_sha256"] != data.sha256:
                raise UserError(f"{result_path(args.against, data.name)} was made on other users or candidates: a paired "
                                "difference needs the same")
            shared.append(data.name)
    if not shared:
        raise UserError(f"--against {args.against} holds no result of {', '.join(args.test)}")
    return shared

# ------------------------------------------------------------------------------------------------------- scoring


def users_to_score(args, data):
    """The users of the split, with the histories that --history names.

    "other" gives each user the history of the next one, whom "history_of" names, without the user's own candidates. A
    model that personalises loses by it, one that only knows what is popular does not.
    """
    users = data.splits[args.split]
    if args.history == "other" and len(users) == 1:
        raise UserError("--history other needs another user, and there is only one")
    others = [*users[1:], users[0]]
    changed = []
    for user, other in zip(users[:args.limit_users], others):
        if args.history == "none":
            user = {**user, "history": []}
        if args.history == "other":
            history = [item for item in other["history"] if item not in user["candidates"]]
            user = {**user, "history": history, "history_of": other["user"]}
        changed.append(user)
    return changed


def score_users(args, data, users, scorer, job):
    """Write the scores file: the job, then a line per user, appended as they are scored. Returns the cost.

    A run that was killed goes on after its last whole line; the cost is then that of the users after it.
    """
    started = time.perf_counter()
    path = scores_path(args.out, data.name)
    done = 0
    if common.is_there(path, job, args.overwrite):
        done = len(whole_lines(path, users))
    # about four forward passes where a user's row has 1,000 tokens: a kill loses some seconds
    chunk_size = max(1, scorer.max_tokens // 256) if scorer else 256
    chosen_by = None if scorer else read_choices(args, data)
    embeddings = {}  # of items
    cost = {"tokens_scored": 0, "tokens_unshared": 0}
    progress = tqdm(total=len(users), initial=done, desc=data.name, unit="user")
    for start in range(done, len(users), chunk_size):
        chunk = users[start:start + chunk_size]
        if scorer:
            texts = [common.with_texts(user, data.items) for user in chunk]
            scores, chunk_cost = common.scores_of(scorer, texts, embeddings)
        else:
            scores = [baseline_scores(args, data, user, chosen_by) for user in chunk]
            chunk_cost = {"dropped": [0] * len(chunk)}
        lines = ""
        for user, values, dropped in zip(chunk, scores, chunk_cost["dropped"]):
            if not np.isfinite(values).all():
                raise UserError(f"scores of user {user['user']} are NaN or infinite in {job['dtype']}: try another --dtype")
            line = {"user": user["user"], "scores": values.tolist(), "labels": user["labels"]}
            if dropped:
                line["dropped"] = dropped  # so many of the oldest items of the history did not fit
            lines += json.dumps(line) + "\n"
        if start == 0:  # the first scores are there: only now does an older result go
            result_path(args.out, data.name).unlink(missing_ok=True)
            common.write_atomically(path, json.dumps({"job": job}) + "\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)
        progress.update(len(chunk))
        for key in cost:
            cost[key] += chunk_cost.get(key, 0)
    progress.close()
    cost["samples_scored"] = sum(len(user["candidates"]) for user in users[done:])
    cost["seconds"] = time.perf_counter() - started
    return cost


def whole_lines(path, users):
    """The users' lines of a scores file, after cutting off a last line that a kill has torn.

    Raises UserError where they are not the first of these users: another process has written into the file.
    """
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lines = score_lines(path)
    if [line["user"] for line in lines] != [user["user"] for user in users[:len(lines)]]:
        raise UserError(f"{path} was written by two runs at once: --overwrite scores it again")
    return lines


def score_lines(path):
    """The lines of a scores file, a dict per user."""
    _, *lines = [line for _, line in common.read_lines(path)]  # the first is the job
    return lines


def read_scores(path):
    """[(scores, labels)] per user of a scores file: float and int arrays (candidates,)."""
    return [(np.array(line["scores"], float), np.array(line["labels"])) for line in score_lines(path)]


def write_result(args, data, users, scorer, job, cost):
    """Compute the metrics of a whole scores file and write the result. Raises UserError where users are missing."""
    path = scores_path(args.out, data.name)
    lines = whole_lines(path, users)
    if len(lines) < len(users):
        raise UserError(f"{path} holds {len(lines)} of {len(users)} users: --overwrite scores it again")
    truncated = {
        "texts": common.count_long_texts(users, data.items),
        "histories": sum("dropped" in line for line in lines)}
    metrics = common.evaluate_users(read_scores(path), seed=args.seed)
    low, high = metrics["ci"]["group_auc"] or [0, 1]  # undefined: it may be anything
    collapsed = low <= 0.5 <= high and high - low < 0.1  # chance is inside the interval, and the interval is narrow
    labels = np.concatenate([line["labels"] for line in lines])
    result = {
        "dataset": data.name,
        "domain": data.domain,
        "split": args.split,
        "history": args.history,
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
        "given_away": given_away(data, args.split),
        **cost,
        "samples_per_s": cost["samples_scored"] / cost["seconds"],
        "peak_memory_gb": common.peak_memory_gb(),
        "data_sha256": data.sha256,
        "seed": args.seed,
        "job": job,
        "arguments": vars(args),
        "versions": common.versions()}
    common.write_json(result_path(args.out, data.name), result)
    for what, count in truncated.items():
        if count:
            say(f"{data.name}: {count} {what} were cut to fit")
    if collapsed:
        say(f"{data.name}: group AUC {metrics['group_auc']:.3f} cannot be told from chance (0.5): 95% interval {low:.3f} "
            f"to {high:.3f}")

# ----------------------------------------------------------------------------------- baselines without a model


def read_choices(args, data):
    """{item: names of the users who chose it}, as a positive or in their history, in the training split.

    Without a training split, or when it is the one to score: in the histories of the scored split, not by its labels.
    """
    has_train = args.split != "train" and data.splits["train"]
    chosen_by = defaultdict(set)
    for user in data.splits["train" if has_train else args.split]:
        for item in user["history"]:
            chosen_by[item].add(user["user"])
        for item, label in zip(user["candidates"], user["labels"]):
            if label and has_train:
                chosen_by[item].add(user["user"])
    return chosen_by


def baseline_scores(args, data, user, chosen_by):
    """A user's scores without a model: float64 (candidates,). chosen_by: {item: names of users}."""
    same_user = {user["user"], user.get("history_of")}  # their choices never count
    scores = []
    for candidate in user["candidates"]:
        if args.model == "random":  # uniform on [0, 1)
            score = common.digest(args.seed, data.name, user["user"], "random", candidate) / 2**64
        elif args.model == "popularity":
            score = len(chosen_by[candidate] - same_user)
        elif args.model == "itemknn":
            score = itemknn(user["history"], candidate, chosen_by, same_user)
        elif candidate in data.first:  # a shortcut: later is higher, since likes are held out from the end
            score = data.first[candidate]
        else:
            raise UserError(f"first-seen needs the time at which each item first occurs, and item {candidate} has none")
        scores.append(score)
    return np.array(scores, float)


def itemknn(history, candidate, chosen_by, same_user):
    """Sum over the history's items h of n(h, c) / sqrt(n(h) n(c)) for the candidate c (Sarwar et al. 2001).

    n counts the users, without those in `same_user`, who chose the item, or both. chosen_by: {item: names of users}.
    """
    score = 0.0
    fans = chosen_by[candidate] - same_user
    for item in history:
        others = chosen_by[item] - same_user
        both = len(fans & others)
        if both:
            score += both / math.sqrt(len(fans) * len(others))
    return score

# -------------------------------------------------------------------------------------------------------- tables


def show(estimate, sign=""):
    """An estimate (see common.estimate) with its interval, if any; "-" if undefined. sign: "+" marks positive ones."""
    if not estimate or estimate["value"] is None:
        return "-"
    shown = f"{estimate['value']:{sign}.3f}"
    if estimate["ci"]:
        low, high = estimate["ci"]
        shown += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return shown


def show_users(result):
    """The number of users; where fewer count for the group AUC, "14 of 30"."""
    counted, n = result["users_counted"]["group_auc"], result["n_users"]
    return str(n) if counted == n else f"{counted} of {n}"


def table(results, train_chain, domains):
    """The results as a Markdown table, with the main metrics. train_chain: the datasets the model has seen."""
    rows = [["dataset", "setting", "users", "samples", *SHOWN, "samples/s"]]
    for result in results:
        setting = common.setting_of(train_chain, result["dataset"], domains)
        if result["model"] in BASELINES:
            setting = "-"
        row = [result["dataset"], setting, show_users(result), str(result["n_samples"])]
        for name in SHOWN:
            row.append(show({"value": result[name], "ci": result["ci"][name]}))
        rate = float(f"{result['samples_per_s']:.3g}")  # three significant digits
        rows.append([*row, f"{rate:g}"])
    note = "[95% intervals over the choice of users, not over the luck of a training run]"
    return f"{common.markdown_table(rows)}\n{note}"


def paired_differences(args, names):
    """The paired differences on these datasets from the results in --against, as a Markdown table."""
    rows, equal = [[f"difference from {args.against}", "users", *SHOWN]], []
    for name in names:
        ours = read_scores(scores_path(args.out, name))
        theirs = read_scores(scores_path(args.against, name))
        if all(np.array_equal(a, b) for (a, _), (b, _) in zip(ours, theirs)):
            equal.append(name)
        row = [name, show_users(common.read_json(result_path(args.out, name)))]
        for metric in SHOWN:  # one seed: the same users are drawn for both
            our_draws = common.bootstrap(metric, ours, seed=args.seed)
            their_draws = common.bootstrap(metric, theirs, seed=args.seed)
            row.append(show(common.estimate(our_draws - their_draws), "+"))
        rows.append(row)
    lines = [common.markdown_table(rows),
             "[95% intervals of the paired difference over the choice of users; by chance alone, 1 in 20 excludes 0. They "
             "do not cover the luck of a training run: two seeds of one recipe differ by more]"]
    if equal:
        lines.append(f"All scores are equal on {', '.join(equal)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(common.run_script(main))
