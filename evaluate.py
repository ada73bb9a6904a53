"""Score test sets with a base model or a fine-tuned one; all metrics with 95% intervals.

    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --test mind movielens --out results/zero-shot
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --adapter runs/mind --test all --out results/mind
    python evaluate.py --model intfloat/e5-base-v2 --type embed --test all --out results/e5
    python evaluate.py --model popularity --test all --out results/popularity       (also: random, overlap)

For each dataset it writes OUT/<dataset>.json (metrics, intervals, cost, arguments) and OUT/<dataset>.scores.jsonl (one
line a user: {"user": ..., "scores": [...]}). A killed run continues by the same command, without --overwrite.
"""
import json
import os
import sys
import time
from array import array
from collections import Counter
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError, say

CHUNK = 256  # users scored and written at a time: memory does not grow with the test set


def arguments(argv):
    parser = common.Parser(__doc__, "evaluate.py")
    parser.add_argument("--model", required=True, help=f"hub id, local folder, short name ({', '.join(common.MODELS)}) "
                        f"or a baseline without a model: {', '.join(common.BASELINES)}")
    parser.add_argument("--test", nargs="+", required=True, metavar="DATASET", help="datasets, or all: those prepared")
    parser.add_argument("--out", required=True, type=common.folder, help="folder for the results")
    parser.add_argument("--adapter", metavar="RUN", help="folder of a finetune.py run (its --out)")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test", help="which users to score")
    parser.add_argument("--limit-users", type=common.positive, help="score the first N users only")
    common.shared_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    metas = read_metas(args)
    names = list(metas)
    if args.model in common.BASELINES and args.adapter:
        raise UserError(f"{args.model} is a baseline without a model: it takes no --adapter")
    run = common.read_run(args.adapter, args.model, args.type)
    job = describe(args)
    jobs = {name: {**job, "data_sha256": meta["sha256"]} for name, meta in metas.items()}
    for key in ("prompt", "chat_template", "pooling", "max_length"):
        if run and run["arguments"].get(key) != job[key]:
            say(f"{args.adapter} was trained with another --{key.replace('_', '-')}")
    before = {name: finished(args, name, jobs[name]) for name in names}  # an obstacle is said before any scoring
    scorer, results = None, []
    for name in names:
        setting = common.setting_of(run.get("train_chain", []), name, len(names) == 1)
        if (done := before[name]) is None:
            if scorer is None and args.model not in common.BASELINES:
                scorer = common.load_scorer(args)
                scorer = common.load_adapter(scorer, args.adapter) if args.adapter else scorer
            done = evaluate(args, name, jobs[name], setting, scorer)
        results.append({**done, "setting": setting})
        if done["setting"] != setting:  # it was evaluated alone then and is among others now, or the reverse
            common.write_json(Path(args.out, f"{name}.json"), results[-1])
        if name in set(run.get("valid_chain", [])) - set(run.get("train_chain", [])):
            say(f"{name}: its own validation labels chose this checkpoint (--valid), so it is not unseen")
    print(table(results))


def read_metas(args):
    """meta.json of the datasets to score, {dataset: meta}. Raises UserError where one or its split is missing."""
    names = prepared(args) if args.test == ["all"] else common.check_names(args.test)
    metas = {name: common.read_meta(args.data, name) for name in names}
    for name in names:
        common.read_users(args.data, name, args.split)
    return metas


def prepared(args):
    """Every dataset in --data that has the split, in the benchmark's order."""
    names = [n for n in [*common.DATASETS, *common.DEMO] if Path(args.data, n, f"{args.split}.jsonl").exists()]
    if not names:
        raise UserError(f"no dataset with a {args.split} split in {args.data}; see prepare_data.py --help")
    missing = [n for n, row in common.DATASETS.items() if row.test and n not in names]
    if missing and set(names) & set(common.DATASETS):
        say(f"not prepared, so not evaluated: {', '.join(missing)}")
    return names


def describe(args):
    """All but the data that the scores depend on; results made under another description are not taken for these."""
    keys = ("type", "chat_template", "pooling", "max_length", "split", "limit_users", "seed")
    return {**{key: getattr(args, key) for key in keys}, "prompt": common.load_prompt(args.prompt),
            "dtype": common.placement(args)[1],
            "model": common.fingerprint(args.model) or common.MODELS.get(args.model, args.model),  # folders may move
            "adapter": common.fingerprint(args.adapter)}


def finished(args, name, job):
    """The result that is there already for the same job, else None. Raises UserError where another is in the way."""
    result, part, *scores = (Path(args.out, name + end)
                             for end in (".json", ".part.json", ".scores.jsonl", ".scores.jsonl.part"))
    if args.overwrite:
        for path in (result, part, *scores):
            path.unlink(missing_ok=True)
    for path, read in ((result, lambda r: r.get("arguments")), (part, lambda r: r)):
        if path.exists() and read(common.read_json(path)) != job:
            raise UserError(f"{path} was made with other arguments or data: choose another --out or give --overwrite")
    for path in scores:
        if path.exists() and not result.exists() and not part.exists():
            raise UserError(f"nothing says how {path} was made: choose another --out or give --overwrite")
    return common.read_json(result) if result.exists() else None


def evaluate(args, name, job, setting, scorer):
    """Score one dataset, from where a killed run stopped, and write its two files. Returns the result (a dict).

    Its cost and truncation are about the users scored now, after the first `users_resumed`.
    """
    scores_file = Path(args.out, f"{name}.scores.jsonl")
    part, part_job = Path(f"{scores_file}.part"), Path(args.out, f"{name}.part.json")
    common.write_json(part_job, job)
    if scores_file.exists():  # killed after the rename: only the metrics are missing
        os.replace(scores_file, part)
    done = whole_lines(part)
    if done:
        say(f"{name}: continuing after {done} users")
    started, counts = time.perf_counter(), score_users(args, name, scorer, part, done)
    seconds = time.perf_counter() - started
    for key, what in TRUNCATED.items():
        if counts[key]:
            say(f"{name}: {counts[key]} {what}")
    result = summarize(args, name, part, is_logit=args.type == "prompt" and scorer is not None)
    result = {
        "dataset": name, "split": args.split, "setting": setting, "type": args.type,
        "model": common.MODELS.get(args.model, args.model),
        "adapter": args.adapter, **result, "users_resumed": done, "truncated": {key: counts[key] for key in TRUNCATED},
        "seconds": seconds, "samples_per_s": counts["samples"] / seconds, "tokens_scored": counts["tokens_scored"],
        "tokens_unpacked": counts["tokens_unpacked"],
        "peak_memory_gb": common.peak_memory_gb(scorer.model.device if scorer else "cpu"),
        "data_sha256": job["data_sha256"], "seed": args.seed, "arguments": job, "versions": common.versions()}
    os.replace(part, scores_file)
    common.write_json(Path(args.out, f"{name}.json"), result)
    part_job.unlink()
    return result


TRUNCATED = {"texts": "item texts longer than 512 characters, cut",
             "histories": "users whose oldest items were dropped", "halved": "users whose texts were halved"}


def whole_lines(path):
    """Number of whole lines of a file (0 where there is none); a torn last line is cut off."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        lines, end = 0, 0
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def score_users(args, name, scorer, part, done):
    """Append {"user", "scores"} to `part` of users after the first `done`. Returns counts of samples, tokens, cuts."""
    (items, cut), known, popularity, checked = common.read_items(args.data, name), {}, None, False
    counts = Counter(texts=cut)
    if args.model == "popularity":
        popularity = count_popularity(args, name)
    users = common.read_users(args.data, name, args.split, args.limit_users)
    total = min(common.read_meta(args.data, name)["splits"][args.split]["users"], args.limit_users or sys.maxsize)
    bar = tqdm(total=total, initial=done, desc=name, unit="user", mininterval=0.5)
    users = islice(users, done, None)
    with open(part, "a", encoding="utf-8") as file, bar:
        while chunk := list(islice(users, CHUNK)):
            texts = [common.texts_of(user, items) for user in chunk]
            if scorer is None:
                scores = np.concatenate([baseline(args, name, user, items, popularity) for user in chunk])
            elif args.type == "embed":
                scores, more = common.score_embeddings(scorer, texts, known)
                counts += more
            else:
                if not checked:
                    scorer, checked = common.check_packing(scorer, texts), any(len(c) > 1 for _, c in texts)
                scores, more = common.score_prompts(scorer, texts)
                counts += more
            if not np.isfinite(scores).all():
                raise UserError(f"{name}: {(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite; "
                                f"try --dtype float32")
            counts["samples"] += len(scores)
            ends = np.cumsum([len(user["candidates"]) for user in chunk])
            for user, values in zip(chunk, np.split(scores, ends)):
                file.write(json.dumps({"user": user["user"], "scores": values.tolist()}) + "\n")
            file.flush()
            bar.update(len(chunk))
    return counts


def count_popularity(args, name):
    """(how often an item is a positive or in a history of the training split; False) or, without one or to score that
    split itself, of the scored split's histories and True: then a user's own history is not counted for that user."""
    counts, train = Counter(), args.split != "train" and Path(args.data, name, "train.jsonl").exists()
    for user in common.read_users(args.data, name, "train" if train else args.split):
        counts.update(user["history"])
        if train:
            counts.update(item for item, label in zip(user["candidates"], user["labels"]) if label)
    return counts, not train


def baseline(args, name, user, items, popularity):
    """common.baseline_scores of a user; the user's own history does not make an item popular."""
    counts, own = popularity or (None, False)
    if own:
        counts = {item: counts[item] - user["history"].count(item) for item in user["candidates"]}
    return np.array(common.baseline_scores(args.model, args.seed, name, user, items, counts))


def read_scores(path, data, name, split, limit=None):
    """Scores, labels, user numbers of a scores file: 3 arrays (samples,). Raises UserError where they do not fit."""
    scores, labels, sizes = array("d"), array("b"), array("i")
    nothing, users = {"user": None, "scores": (), "labels": ()}, common.read_users(data, name, split, limit)
    mend = "give evaluate.py --overwrite to score it again"
    for line, user in zip_longest(common.read_lines(path, mend), users, fillvalue=nothing):
        if line["user"] != user["user"] or len(line["scores"]) != len(user["labels"]):
            raise UserError(f"{path} does not fit the {split} split of {name}; {mend}")
        scores.extend(line["scores"])
        labels.extend(user["labels"])
        sizes.append(len(user["labels"]))
    return np.array(scores), np.array(labels), np.repeat(np.arange(len(sizes)), sizes)


def summarize(args, name, path, is_logit):
    """The metrics of a whole scores file, and the sizes of what was scored."""
    scores, labels, users = read_scores(path, args.data, name, args.split, args.limit_users)
    if not len(scores):
        raise UserError(f"the {args.split} split of {name} is empty")
    result = {"n_users": int(users[-1]) + 1, "n_samples": len(scores), "n_positives": int(labels.sum())}
    result.update(common.evaluate_scores(scores, labels, users, is_logit, seed=args.seed))
    interval = result["ci"]["group_auc"]
    result["collapsed"] = bool(interval and interval[0] <= 0.5 <= interval[1] and interval[1] - interval[0] < 0.04)
    if result["collapsed"]:
        say(f"{name}: the scores tell nothing about these users: group AUC {result['group_auc']:.3f}, 95% interval "
            f"{interval[0]:.3f} to {interval[1]:.3f} (chance is 0.5)")
    return result


def table(results):
    """The results as a Markdown table, with the main metrics."""
    def cell(result, name):
        if result[name] is None:
            return "-"
        low, high = result["ci"].get(name) or (float("nan"),) * 2
        return f"{result[name]:.3f} [{low:.3f}, {high:.3f}]"
    names = ["auc", "group_auc", "ndcg@10", "mrr"]
    rows = [["dataset", "setting", "users", "samples", *names, "samples/s"]]
    rows += [[r["dataset"], r["setting"], str(r["n_users"]), str(r["n_samples"]), *(cell(r, n) for n in names),
              f"{r['samples_per_s']:.0f}"] for r in results]
    note = "[95% intervals over the choice of users, not over the luck of a training run]"
    return f"{common.markdown_table(rows)}\n{note}"


if __name__ == "__main__":
    sys.exit(common.run(main))
