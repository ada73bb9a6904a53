"""Fine-tune a model with LoRA on one or several datasets (settings C to H), with early stopping on validation users.

    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train mind --out runs/mind
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --setting E --target mind --out runs/news
    python finetune.py --model intfloat/e5-base-v2 --type embed --train mind pens --out runs/e5-news
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train pens --init-adapter runs/mind --out runs/mind-then-pens
    torchrun --nproc-per-node 8 finetune.py --model meta-llama/Meta-Llama-3-8B --train mind --out runs/mind

Writes to OUT: the best adapter in peft's format, run.json (what was trained, on what, how it ended) and log.jsonl (a
line a step and a line an evaluation). The same command continues a killed run from its last evaluation.
"""
import json
import math
import os
import shutil
import sys
import time
from array import array
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import UserError, say

CHUNK = 10  # candidates of one user that stay together in a batch
FILES = ("state.pt", "log.jsonl", "adapter_config.json", "adapter_model.safetensors", "run.json")  # of a run's folder


def arguments(argv):
    parser = common.Parser(__doc__, "finetune.py")
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder or a short name: {', '.join(common.MODELS)}")
    add("--train", nargs="+", metavar="DATASET", help="datasets to train on, joined and shuffled")
    add("--setting", choices=list(common.SETTINGS), help="train on the datasets that this setting means for --target")
    add("--target", metavar="DATASET", help="the dataset that --setting is about")
    add("--out", required=True, type=common.folder, help="folder for the run")
    add("--valid", nargs="+", metavar="DATASET", help="datasets to validate on (if not given: those of --train)")
    add("--valid-metric", choices=[name for name in common.METRIC_NAMES if name != "logloss"], default="auc",
        help="metric of early stopping, the higher the better, mean over datasets")
    add("--init-adapter", metavar="RUN", help="continue from the adapter of an earlier run (sequential fine-tuning)")
    add("--lora-r", type=common.positive, default=32, help="rank")
    add("--lora-alpha", type=common.positive, default=128, help="scale of the update: alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="probability")
    add("--lora-targets", nargs="+", metavar="MODULE", help="modules to adapt (if not given: peft's choice for the "
        "architecture, else all-linear)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam")
    add("--batch-size", type=common.positive, default=32, help="samples a step, over all processes")
    add("--epochs", type=common.positive, default=10, help="at most so many passes over the training users")
    add("--patience", type=common.positive, default=2, help="stop after so many evaluations without a new best")
    add("--eval-every", type=common.positive, metavar="STEPS", help="steps between evaluations; an epoch if not given")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if args.model in common.BASELINES:
        raise UserError(f"{args.model} is a baseline without a model: there is nothing to fine-tune")
    args.train = chosen_sets(args)
    args.valid = common.check_names(args.valid or args.train)
    if not 0 < args.lr < math.inf or not 0 <= args.lora_dropout < 1:
        raise UserError("--lr is a positive number, --lora-dropout at least 0 and below 1")
    if args.init_adapter and Path(args.init_adapter).resolve() == Path(args.out).resolve():
        raise UserError("--init-adapter and --out are the same folder")
    return args


def chosen_sets(args):
    """The datasets that --train names, or --setting for --target; for setting F both are given."""
    if bool(args.train) == bool(args.setting) and not (args.setting == "F" and args.train):
        raise UserError("give either --train DATASET... or --setting LETTER --target DATASET")
    if not args.setting:
        return common.check_names(args.train)
    if not args.target:
        raise UserError("--setting needs --target: the dataset that the setting is about")
    names = common.check_names(args.train or []) or common.training_sets(args.setting, args.target)
    setting = f"setting {args.setting} ({common.SETTINGS[args.setting]})"
    if not names:
        raise UserError(f"{setting} trains on nothing: run evaluate.py without --adapter")
    if common.setting_of(names, args.target) != args.setting:
        raise UserError(f"{setting} for {args.target} is not training on {', '.join(names)}")
    return names


def main(argv=None):
    args = arguments(argv)
    start_processes(args)
    metas = read_metas(args)
    earlier = common.read_run(args.init_adapter, args.model, args.type)
    if earlier:  # the adapter brings its own shape
        shape = common.read_json(Path(args.init_adapter, "adapter_config.json"))
        args.lora_r, args.lora_alpha, args.lora_dropout = (shape[key] for key in ("r", "lora_alpha", "lora_dropout"))
        args.lora_targets = shape["target_modules"]
        say(f"LoRA as in {args.init_adapter}: rank {args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout}")
    job = describe(args, metas)
    if from_first(lambda: finished(args, job)):
        return say(f"{args.out} is finished already; --overwrite runs it again")
    run = {"model": job["model"], "type": args.type, "train": args.train, "valid": args.valid, "finished": False,
           **{f"{key}_chain": common.check_names(earlier.get(f"{key}_chain", []) + getattr(args, key))
              for key in ("train", "valid")},
           "init_adapter": args.init_adapter, "arguments": {**vars(args), **job}, "versions": common.versions()}
    if outside := [name for name in args.valid if name not in run["train_chain"]]:
        say(f"validating on {', '.join(outside)}, not trained on: its labels choose the checkpoint")

    torch.manual_seed(args.seed)
    scorer = add_lora(args, common.load_scorer(args))
    valid = {name: read_users(args, name, "valid")[0] for name in args.valid}
    scorer = common.check_packing(scorer, [user[:2] for user in valid[args.valid[0]][:32]])
    train, run["truncated"] = read_tokens(args, scorer)

    rank, _ = processes()
    torch.manual_seed(args.seed + 1 + rank)  # dropout differs between processes, the weights do not
    if rank == 0:
        common.write_json(Path(args.out, "run.json"), run)
    state = train_loop(args, scorer, train, valid)
    if rank == 0:
        run.update(state, unstable=unstable([point["mean"] for point in state["curve"]]), finished=True)
        common.write_json(Path(args.out, "run.json"), run)
        Path(args.out, "state.pt").unlink(missing_ok=True)
        report(args, run)
    if dist.is_initialized():
        dist.destroy_process_group()


def train_loop(args, scorer, train, valid):
    """Train until the validation metric has not risen for --patience evaluations. Returns the state at the end.

    train: read_tokens' answer; valid: {dataset: read_users' answer}.
    """
    optimizer = torch.optim.Adam([p for p in scorer.model.parameters() if p.requires_grad], lr=args.lr)
    state, log = resume(args, optimizer, scorer.model.device)
    sizes = [len(labels) for _, labels in train]
    steps_an_epoch = math.ceil(sum(sizes) / args.batch_size)
    last, every = steps_an_epoch * args.epochs, args.eval_every or steps_an_epoch
    begun, batches = time.perf_counter() - state["seconds"], None
    with log, progress(total=last, initial=state["steps"], desc="fine-tuning", unit="step") as bar:
        while state["steps"] < last and state["evaluations_since_best"] < args.patience:
            epoch, place = divmod(state["steps"], steps_an_epoch)
            if place == 0 or batches is None:
                batches = epoch_batches(sizes, args.seed, epoch, args.batch_size)
            loss, speed = train_step(args, scorer, optimizer, train, batches[place])
            if not math.isfinite(loss):
                raise diverged(args, state, f"the loss is {loss}")
            state["steps"] += 1
            state["samples"] += len(batches[place])
            log.write(json.dumps({"step": state["steps"], "epoch": epoch, "loss": loss, **speed}) + "\n")
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if state["steps"] % every == 0 or state["steps"] == last:
                by_dataset = validate(args, scorer, valid, state)
                state["seconds"] = time.perf_counter() - begun
                end_evaluation(args, scorer, optimizer, state, by_dataset, log)
    return state


def epoch_batches(sizes, seed, epoch, batch_size):
    """The batches of an epoch: lists of (user, candidate) numbers, batch_size long but for the last.

    sizes: candidates of each user. Candidates are shuffled within users and cut into chunks of at most CHUNK, then the
    chunks are shuffled: a batch mixes users, yet most of it shares its histories, so packing pays.
    """
    rng, chunks = np.random.default_rng([seed, epoch]), []
    for user, size in enumerate(sizes):
        candidates = rng.permutation(size).tolist()
        chunks += [[(user, c) for c in candidates[i:i + CHUNK]] for i in range(0, size, CHUNK)]
    pairs = [pair for i in rng.permutation(len(chunks)) for pair in chunks[i]]
    return [pairs[i:i + batch_size] for i in range(0, len(pairs), batch_size)]


def train_step(args, scorer, optimizer, train, batch):
    """One step of Adam on a batch, shared out among the processes. Returns its mean loss and its speed.

    The loss is the sum over samples divided by the batch's size, whatever the packing, the split by --max-tokens or the
    number of processes, so the gradient is the same for all of these (dropout, which differs, left aside).
    """
    started, (rank, world) = time.perf_counter(), processes()
    share = batch[len(batch) * rank // world:len(batch) * (rank + 1) // world]
    groups = [(*train[user], [c for _, c in pairs]) for user, pairs in groupby(share, key=itemgetter(0))]
    scorer.model.train()
    optimizer.zero_grad()
    total = torch.zeros(2, dtype=torch.float64, device=scorer.model.device)  # loss, tokens
    for loss, tokens in (embed_losses if args.type == "embed" else prompt_losses)(scorer, groups):
        if not loss.requires_grad:
            raise UserError("nothing to train: the scores do not depend on the adapted modules; see --lora-targets")
        (loss / len(batch)).backward()
        total += torch.stack([loss.detach() / len(batch), loss.new_tensor(tokens)])
    if world > 1:
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is None:  # a process without samples
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        dist.all_reduce(total)
    optimizer.step()
    loss, tokens = total.tolist()
    seconds = time.perf_counter() - started
    return loss, {"samples_per_s": len(batch) / seconds, "tokens_per_s": tokens / seconds}


def prompt_losses(scorer, groups):
    """Binary cross-entropy of the logit difference, summed over samples: (loss, tokens) for each part of a batch.

    groups: [(token ids of a user's prompts, labels, numbers of the candidates in this batch)]. A part holds at most
    --max-tokens tokens with their padding, or one row.
    """
    labels = torch.tensor([labels[c] for _, labels, chosen in groups for c in chosen], device=scorer.model.device)
    rows = common.pack_users(scorer, [[prompts[c] for c in chosen] for prompts, _, chosen in groups], scorer.max_tokens)
    for part in common.fill_batches([common.row_length(row) for row in rows], scorer.max_tokens):
        part = [rows[i] for i in part]
        gaps = common.answer_gaps(scorer, part)
        wanted = labels[[place for row in part for place in row.places]].to(gaps.dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(gaps, wanted, reduction="sum")
        yield loss, sum(map(common.row_length, part))


def embed_losses(scorer, groups):
    """Squared error of cosine(user, item) and label, summed over samples: (loss, tokens) for each part of a batch.

    groups: as in prompt_losses, but the ids are those of the history's text and then of each candidate's. A history is
    encoded once a part, so a part has room to spare.
    """
    samples = [(g, texts[c + 1], labels[c]) for g, (texts, labels, chosen) in enumerate(groups) for c in chosen]
    history = [texts[0] for texts, _, _ in groups]
    for part in common.fill_batches([len(history[g]) + len(item) for g, item, _ in samples], scorer.max_tokens):
        group, items, labels = zip(*(samples[i] for i in part))
        once = list(dict.fromkeys(group))
        users = common.embed(scorer, [history[g] for g in once])[[once.index(g) for g in group]]
        cosines = torch.nn.functional.cosine_similarity(users, common.embed(scorer, items))
        loss = (cosines - cosines.new_tensor(labels)).square().sum()
        yield loss, sum(len(history[g]) for g in once) + sum(map(len, items))


def validate(args, scorer, valid, state):
    """The validation metric by dataset: {name: value}. Each process scores its share of the users."""
    rank, world = processes()
    scorer.model.eval()
    result = {}
    for name, users in valid.items():
        known, scores = {}, []
        for start in range(rank, len(users), 256 * world):
            texts = [user[:2] for user in users[start:start + 256 * world:world]]
            scores.append((common.score_embeddings(scorer, texts, known) if args.type == "embed"
                           else common.score_prompts(scorer, texts))[0])
        scores = np.concatenate([part for share in gather(scores) for part in share])
        order = [number for r in range(world) for number in range(len(users))[r::world]]
        if not np.isfinite(scores).all():
            raise diverged(args, state, f"the scores of {name} are NaN or infinite")
        result[name] = common.metric(args.valid_metric, scores, np.concatenate([users[n][2] for n in order]),
                                     np.repeat(order, [len(users[n][2]) for n in order]))
        if result[name] is None:
            raise UserError(f"{args.valid_metric} is undefined on the validation users of {name}: prepare more of them")
    return result


def end_evaluation(args, scorer, optimizer, state, by_dataset, log):
    """Enter an evaluation into state and log; keep the adapter if it is the best so far; save what a restart needs."""
    point = {"step": state["steps"], "valid": by_dataset, "mean": float(np.mean(list(by_dataset.values())))}
    improved = state["best"] is None or point["mean"] > state["best"]["mean"]
    state["curve"].append(point)
    state["evaluations_since_best"] = 0 if improved else state["evaluations_since_best"] + 1
    state["best"] = point if improved else state["best"]
    random = gather([generator.get_state() for generator in generators(scorer.model.device)])
    if processes()[0] > 0:
        return
    say(f"step {point['step']}: {args.valid_metric} {point['mean']:.4f} "
        f"({', '.join(f'{name} {value:.4f}' for name, value in by_dataset.items())}){' *' if improved else ''}")
    log.write(json.dumps({**point, "peak_memory_gb": common.peak_memory_gb(scorer.model.device)}) + "\n")
    log.flush()
    saved = {**state, "log_size": log.tell(), "parameters": optimizer.param_groups[0]["params"],
             "optimizer": optimizer.state_dict(), "random": random}
    try:
        if improved:
            save_adapter(args, scorer)
        torch.save(saved, Path(args.out, "state.pt.tmp"))
        os.replace(Path(args.out, "state.pt.tmp"), Path(args.out, "state.pt"))
    except Exception as error:  # torch and safetensors do not raise OSError for a full disk
        raise UserError(f"{args.out} cannot be written: {error}") from None


def save_adapter(args, scorer):
    """The adapter in peft's own format, each file renamed into its place: never half an adapter."""
    folder = Path(args.out, "adapter.tmp")
    scorer.model.save_pretrained(folder, save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(folder / name, Path(args.out, name))
    shutil.rmtree(folder)


def resume(args, optimizer, device):
    """The state at a killed run's last evaluation, put back into optimizer and generators, or at the start; the log."""
    path = Path(args.out, "state.pt")
    state = from_first(lambda: read_state(path))
    if state is None:
        return {"steps": 0, "samples": 0, "seconds": 0.0, "best": None, "evaluations_since_best": 0,
                "curve": []}, open_log(args, 0)
    with torch.no_grad():
        for parameter, saved in zip(optimizer.param_groups[0]["params"], state.pop("parameters")):
            parameter.copy_(saved)
    optimizer.load_state_dict(state.pop("optimizer"))
    for generator, saved in zip(generators(device), state.pop("random")[processes()[0]]):
        generator.set_state(saved)
    say(f"continuing {args.out} after step {state['steps']}")
    return state, open_log(args, state.pop("log_size"))


def read_state(path):
    """What end_evaluation saved; None where there is nothing yet. Raises UserError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    except Exception as error:
        raise UserError(f"{path} is damaged ({str(error)[:100]}): start again with --overwrite") from None


def generators(device):
    """The random generators that dropout draws from: torch's own on the CPU and, for a model there, on the GPU."""
    return [torch.default_generator] + ([torch.cuda.default_generators[device.index]] if device.type == "cuda" else [])


def open_log(args, size):
    """log.jsonl, cut back to its size at the last evaluation; processes other than the first write nowhere."""
    if processes()[0] > 0:
        return open(os.devnull, "w")
    path = Path(args.out, "log.jsonl")
    path.touch()
    os.truncate(path, size)
    return open(path, "a", encoding="utf-8", buffering=1)


def unstable(curve, fall=0.05):
    """Whether the validation metric fell by more than `fall` from one evaluation to the next."""
    return any(before - after > fall for before, after in zip(curve, curve[1:]))


def diverged(args, state, what):
    """The error of a training that blew up."""
    kept = f" (the best adapter so far is in {args.out}, unfinished)" if state["best"] else ""
    return UserError(f"{what} after {state['steps']} steps: lower --lr (now {args.lr:g}) and give --overwrite{kept}")


def report(args, run):
    """The last lines on the terminal."""
    best, seconds = run["best"], max(run["seconds"], 1e-9)
    print(f"{args.out}: best {args.valid_metric} {best['mean']:.4f} at step {best['step']} of {run['steps']}; "
          f"{run['samples']} samples in {seconds:.0f} s ({run['samples'] / seconds:.0f} samples/s)")
    if run["unstable"]:
        say("unstable training: the validation metric fell by more than 0.05 between evaluations; try a lower --lr")

# ------------------------------------------------------------------------------------------------- data, model, folder


def read_metas(args):
    """meta.json of the datasets to train and validate on, {dataset: meta}. Raises UserError as evaluate.read_metas."""
    metas = {name: common.read_meta(args.data, name) for name in {*args.train, *args.valid}}
    for split in ("train", "valid"):
        for name in getattr(args, split):
            common.read_users(args.data, name, split)
    return metas


def read_users(args, name, split):
    """The users of a split, [(history texts, candidate texts, labels)], and how many texts of the dataset were cut."""
    items, cut = common.read_items(args.data, name)
    users = [(*common.texts_of(user, items), user["labels"]) for user in common.read_users(args.data, name, split)]
    if not users:
        raise UserError(f"the {split} split of {name} is empty: prepare it with a larger --train-size")
    return users, cut


def read_tokens(args, scorer):
    """The training users, [(token ids of their texts, labels)], and {what was cut: how often}.

    Texts: a prompt a candidate or, for embeddings, the history and then each candidate. Histories are cut here, by all
    candidates of a user, as evaluate.py cuts them.
    """
    train, counts = [], Counter(texts=0, histories=0, halved=0)
    for name in args.train:
        users, cut = read_users(args, name, "train")
        counts["texts"] += cut
        for history, candidates, labels in progress(users, desc=f"tokenising {name}", unit="user"):
            if args.type == "embed":
                ids, cut = common.embedding_tokens(scorer, [history], candidates)
            else:
                (ids,), cut = common.prompt_tokens(scorer, [(history, candidates)])
            train.append(([array("i", text) for text in ids], labels))
            counts.update(cut)
    if any(counts.values()):
        say(f"cut to fit: {counts['texts']} item texts, {counts['histories']} histories, "
            f"all texts of {counts['halved']} users")
    return train, counts


def add_lora(args, scorer):
    """The scorer with a LoRA adapter to train: a new one, or that of --init-adapter."""
    from peft import LoraConfig, get_peft_model

    def wrap(targets):
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                            target_modules=targets)
        return scorer._replace(model=get_peft_model(scorer.model, config).eval())
    try:
        if args.gradient_checkpointing:
            scorer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if args.init_adapter:
            return common.load_adapter(scorer, args.init_adapter, trainable=True)
        return wrap("all-linear" if args.lora_targets == ["all-linear"] else args.lora_targets)
    except ValueError as error:
        if args.lora_targets or "target_modules" not in str(error):
            raise UserError(f"{scorer.name}: {error}") from None
    say(f"peft names no LoRA targets for {scorer.model.config.model_type}: adapting all-linear")
    return wrap("all-linear")


def describe(args, metas):
    """Everything that the result depends on; a folder made under another description is not continued."""
    free = ("data", "out", "device", "overwrite", "setting", "target", "init_adapter", "trust_remote_code",
            "max_tokens", "gradient_checkpointing")  # a run that ran out of memory may go on with less
    return {**{key: value for key, value in vars(args).items() if key not in free},
            "dtype": common.placement(args)[1], "prompt": common.load_prompt(args.prompt),
            "model": common.MODELS.get(args.model, args.model), "model_fingerprint": common.fingerprint(args.model),
            "init_fingerprint": common.fingerprint(args.init_adapter), "processes": processes()[1],
            "data_sha256": {name: meta["sha256"] for name, meta in sorted(metas.items())}}


def finished(args, job):
    """Whether --out holds this very run, finished. Raises UserError where another is there.

    Clears what a run left that was killed before its first evaluation or, by --overwrite, any.
    """
    files = [path for name in FILES if (path := Path(args.out, name)).exists()]
    if files and not args.overwrite:
        run = common.read_json(files[-1]) if files[-1].name == "run.json" else {}
        if "arguments" not in run:
            raise UserError(f"nothing says how {files[-1]} was made: choose another --out or give --overwrite")
        if {"state.pt", "adapter_model.safetensors"} & {path.name for path in files}:
            earlier = run["arguments"]
            if job["model_fingerprint"] and job["model_fingerprint"] == earlier.get("model_fingerprint"):
                earlier["model"] = job["model"]  # a folder may move
            if changed := [key for key in job if job[key] != earlier.get(key, ...)]:
                raise UserError(f"{args.out} holds a run with other {', '.join(changed)}: "
                                "choose another --out or --overwrite")
            return run["finished"]
    for path in files:  # run.json last: what is there is never without its description
        path.unlink()
    return False

# --------------------------------------------------------------------------------------------------- several processes


def start_processes(args):
    """Join torchrun's processes, if it started this one. Each gets a GPU of its own where there are GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = torch.cuda.is_available() and not (args.device or "").startswith("cpu")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")


def processes():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The values of all processes, in the order of their ranks, in each of them."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_first(make):
    """What make() returns in the first process, in all of them."""
    box = [make() if processes()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def progress(*args, **options):
    """tqdm in the first process."""
    return tqdm(*args, disable=processes()[0] > 0, mininterval=0.5, **options)


if __name__ == "__main__":
    sys.exit(common.run(main))
