"""Fine-tune a model with LoRA on one or several datasets (settings C to H), with early stopping on validation users.

    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train mind --out runs/mind
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --setting E --target mind --out runs/news
    python finetune.py --model intfloat/e5-base-v2 --type embed --train mind pens --out runs/e5-news
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train pens --init-adapter runs/mind --out runs/mind-then-pens
    torchrun --nproc-per-node 8 finetune.py --model meta-llama/Meta-Llama-3-8B --train mind --out runs/mind

Writes to OUT: the best adapter in peft's format, run.json (what was trained, on what, how it ended) and log.jsonl (a line a
step and a line an evaluation). A killed run continues from its last evaluation when the same command is run again.
"""
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import UserError, say

CHUNK = 10  # candidates of one user that stay together in a batch


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder or a short name: {', '.join(common.MODELS)}")
    add("--train", nargs="+", metavar="DATASET", help="datasets to train on, joined and shuffled")
    add("--setting", choices=list(common.SETTINGS), help="train on the datasets that this setting means for --target")
    add("--target", metavar="DATASET", help="the dataset that --setting is about")
    add("--out", required=True, help="folder for the run")
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
    add("--eval-every", type=common.positive, metavar="STEPS", help="steps between evaluations (if not given: one epoch)")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.train) == bool(args.setting) and not (args.setting == "F" and args.train):
        raise UserError("give either --train DATASET... or --setting LETTER --target DATASET")
    if args.setting:
        if not args.target:
            raise UserError("--setting needs --target: the dataset that the setting is about")
        named = common.check_names(args.train or []) or common.training_sets(args.setting, args.target)
        setting = f"setting {args.setting} ({common.SETTINGS[args.setting]})"
        if not named:
            raise UserError(f"{setting} trains on nothing: run evaluate.py without --adapter")
        if common.setting_of(named, args.target) != args.setting:
            raise UserError(f"{setting} for {args.target} is not training on {', '.join(named)}")
        args.train = named
    args.train = common.check_names(args.train)
    args.valid = common.check_names(args.valid or args.train)
    return args


def main(argv=None):
    args = arguments(argv)
    rank, world = start_processes(args)
    metas = {name: common.read_meta(args.data, name) for name in {*args.train, *args.valid}}
    earlier = common.read_run(args.init_adapter, args.model, args.type)
    job = describe(args, metas, world)
    run = {"model": job["model"], "type": args.type, "train": args.train, "valid": args.valid, "finished": False,
           "train_chain": common.check_names(earlier.get("train_chain", []) + args.train),
           "init_adapter": args.init_adapter, "arguments": job, "versions": common.versions()}
    done = already_finished(args, job)
    if world > 1:
        dist.barrier()  # nobody clears the folder after another has begun
    if done:
        say(f"{args.out} is finished already; --overwrite runs it again")
        return
    outside = set(args.valid) - set(run["train_chain"])
    if outside and rank == 0:
        say(f"validating on {', '.join(sorted(outside))}, not trained on: its labels choose the checkpoint")

    torch.manual_seed(args.seed)
    scorer = add_lora(args, common.load_scorer(args))
    train = [user for name in args.train for user in read_texts(args, name, "train")]
    valid = {name: read_texts(args, name, "valid") for name in args.valid}
    scorer = common.check_packing(scorer, [(history, candidates) for history, candidates, _ in train[:32]])
    if args.gradient_checkpointing:
        scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(args.seed + 1 + rank)  # dropout differs between processes, the weights do not

    if rank == 0:
        common.write_json(Path(args.out, "run.json"), run)
    result = train_loop(args, scorer, train, valid, rank, world)
    if rank == 0:
        common.write_json(Path(args.out, "run.json"), {**run, **result, "finished": True})
        Path(args.out, "state.pt").unlink(missing_ok=True)
        report(args, result)
    if world > 1:
        dist.barrier()


def train_loop(args, scorer, train, valid, rank, world):
    """Train until the validation metric has not risen for --patience evaluations. Returns what run.json says of it."""
    parameters = {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=args.lr)
    state = load_state(args, parameters, optimizer, rank)
    log = open_log(args, state, rank)
    sizes = [len(labels) for _, _, labels in train]
    steps_an_epoch = len(epoch_batches(sizes, args.seed, 0, args.batch_size))
    bar = tqdm(total=steps_an_epoch * args.epochs, initial=state["step"], desc="fine-tuning", unit="step",
               disable=rank > 0, mininterval=0.5)
    started = time.perf_counter() - state["seconds"]
    for epoch in range(state["step"] // steps_an_epoch, args.epochs):
        batches = epoch_batches(sizes, args.seed, epoch, args.batch_size)
        for batch in batches[state["step"] - epoch * steps_an_epoch:]:
            loss, speed = train_step(args, scorer, parameters, optimizer, train, batch, rank, world)
            state["step"] += 1
            state["samples"] += len(batch)
            log.write(json.dumps({"step": state["step"], "epoch": epoch, "loss": loss, **speed}) + "\n")
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if not np.isfinite(loss):
                kept = f"the best adapter so far is in {args.out}" if state["best"] else "no adapter was saved"
                raise UserError(f"the loss is {loss} at step {state['step']}: lower --lr (now {args.lr:g}); {kept}")
            end = state["step"] == steps_an_epoch * args.epochs
            if end or state["step"] % (args.eval_every or steps_an_epoch) == 0:
                point = {"step": state["step"], "valid": validate(args, scorer, valid, rank, world)}
                state["seconds"] = time.perf_counter() - started
                end_evaluation(args, scorer, state, point, parameters, optimizer, log, rank, world)
                if state["bad"] >= args.patience:
                    bar.close()
                    return outcome(state)
    bar.close()
    return outcome(state)


def epoch_batches(sizes, seed, epoch, batch_size):
    """The batches of an epoch: lists of (user, candidate) numbers, batch_size long but for the last.

    sizes: candidates of each user. Candidates are shuffled within users and cut into chunks of at most CHUNK, the chunks
    are shuffled: a batch mixes users, yet most of a chunk shares its history, so packing pays.
    """
    rng, chunks = np.random.default_rng([seed, epoch]), []
    for user, size in enumerate(sizes):
        candidates = rng.permutation(size).tolist()
        chunks += [[(user, c) for c in candidates[i:i + CHUNK]] for i in range(0, size, CHUNK)]
    pairs = [pair for i in rng.permutation(len(chunks)) for pair in chunks[i]]
    return [pairs[i:i + batch_size] for i in range(0, len(pairs), batch_size)]


def train_step(args, scorer, parameters, optimizer, train, batch, rank, world):
    """One step of Adam on a batch, shared out among the processes. Returns its mean loss and its speed.

    The loss is the sum over samples divided by the batch's size, whatever the packing, the split by --max-tokens or the
    number of processes, so the gradient is the same for all of these.
    """
    started, tokens = time.perf_counter(), 0
    groups = [(train[user], [c for _, c in pairs]) for user, pairs in itertools.groupby(batch, key=lambda pair: pair[0])]
    mine = [(history, [candidates[c] for c in chosen], [labels[c] for c in chosen])
            for (history, candidates, labels), chosen in groups[rank::world]]
    scorer.model.train()
    optimizer.zero_grad()
    total = torch.zeros(1, dtype=torch.float64, device=scorer.model.device)
    for loss, count in (embed_losses if args.type == "embed" else prompt_losses)(scorer, mine):
        (loss / len(batch)).backward()
        total += loss.detach().double() / len(batch)
        tokens += count
    if world > 1:
        sum_over_processes(parameters.values(), total)
    optimizer.step()
    seconds = time.perf_counter() - started
    return total.item(), {"samples_per_s": len(batch) / seconds, "tokens_per_s": tokens / seconds}


def prompt_losses(scorer, groups):
    """Binary cross-entropy of the logit difference, summed over samples: (loss, tokens) for each part of a batch.

    groups: [(history texts, candidate texts, labels)]. A part holds at most --max-tokens tokens.
    """
    labels = torch.tensor([label for _, _, labels in groups for label in labels], device=scorer.model.device)
    rows, _ = common.prompt_rows(scorer, [(history, candidates) for history, candidates, _ in groups], scorer.max_tokens)
    for part in common.fill_batches([common.row_length(row) for row in rows], scorer.max_tokens):
        part = [rows[i] for i in part]
        gaps = common.answer_gaps(scorer, part)
        wanted = labels[[place for row in part for place in row.places]].to(gaps.dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(gaps, wanted, reduction="sum")
        yield loss, sum(map(common.row_length, part))


def embed_losses(scorer, groups):
    """Squared error of cosine(user, item) and label, summed over samples: (loss, tokens) for each part of a batch."""
    ids = [common.embedding_tokens(scorer, [history], candidates)[0] for history, candidates, _ in groups]
    lengths = [sum(map(len, texts)) for texts in ids]
    for part in common.fill_batches(lengths, scorer.max_tokens):
        users = common.embed(scorer, [ids[i][0] for i in part])
        items = common.embed(scorer, [text for i in part for text in ids[i][1:]])
        users = users.repeat_interleave(torch.tensor([len(ids[i]) - 1 for i in part], device=users.device), 0)
        labels = torch.tensor([label for i in part for label in groups[i][2]], device=users.device, dtype=users.dtype)
        loss = (torch.nn.functional.cosine_similarity(users, items) - labels).square().sum()
        yield loss, sum(lengths[i] for i in part)


def sum_over_processes(parameters, total):
    """Gradients and the loss, summed over the processes in place; a process without samples adds zero."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)
    dist.all_reduce(total)


def validate(args, scorer, valid, rank, world):
    """The validation metric by dataset: {name: value}. Each process scores its share of the users."""
    scorer.model.eval()
    result = {}
    for name, users in valid.items():
        mine, known, scores = users[rank::world], {}, []
        for start in range(0, len(mine), 256):
            texts = [(history, candidates) for history, candidates, _ in mine[start:start + 256]]
            scores.append((common.score_embeddings(scorer, texts, known) if args.type == "embed"
                           else common.score_prompts(scorer, texts))[0])
        shares = [np.concatenate(scores) if scores else np.zeros(0)]
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, np.concatenate(scores) if scores else np.zeros(0))
        order = [i for r in range(world) for i in range(len(users))[r::world]]
        labels = np.concatenate([users[i][2] for i in order])
        value = common.metric(args.valid_metric, np.concatenate(shares), labels,
                              np.repeat(np.arange(len(users)), [len(users[i][2]) for i in order]))
        if value is None:
            raise UserError(f"{args.valid_metric} is undefined on the validation users of {name}: prepare more of them")
        result[name] = value
    return result


def end_evaluation(args, scorer, state, point, parameters, optimizer, log, rank, world):
    """Enter an evaluation into state and log; keep the adapter if it is the best so far; save what a restart needs."""
    point["mean"] = float(np.mean(list(point["valid"].values())))
    improved = state["best"] is None or point["mean"] > state["best"]["mean"]
    state["curve"].append(point)
    state["best"], state["bad"] = (point, 0) if improved else (state["best"], state["bad"] + 1)
    generators = [random_state(scorer.model.device)]
    if world > 1:
        generators = [None] * world
        dist.all_gather_object(generators, random_state(scorer.model.device))
    if rank > 0:
        return
    log.write(json.dumps({**point, "peak_memory_gb": common.peak_memory_gb(scorer.model.device)}) + "\n")
    log.flush()
    say(f"step {point['step']}: {args.valid_metric} {point['mean']:.4f} "
        f"({', '.join(f'{name} {value:.4f}' for name, value in point['valid'].items())}){' *' if improved else ''}")
    try:
        if improved:
            save_adapter(args, scorer)
        temporary = Path(args.out, "state.pt.tmp")
        torch.save({**state, "log_size": log.tell(), "parameters": parameters, "optimizer": optimizer.state_dict(),
                    "generators": generators}, temporary)
        os.replace(temporary, Path(args.out, "state.pt"))
    except Exception as error:  # torch and safetensors do not raise OSError for a full disk
        raise UserError(f"{args.out} cannot be written: {error}") from None


def save_adapter(args, scorer):
    """The adapter in peft's own format, each file renamed into its place: never half an adapter."""
    with tempfile.TemporaryDirectory(dir=args.out, prefix="adapter.tmp") as folder:
        scorer.model.save_pretrained(folder, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.replace(Path(folder, name), Path(args.out, name))


def load_state(args, parameters, optimizer, rank):
    """Where a killed run stands (at its last evaluation), put back into parameters, optimizer and generators; or the start."""
    path = Path(args.out, "state.pt")
    if not path.exists():
        return {"step": 0, "samples": 0, "seconds": 0.0, "curve": [], "best": None, "bad": 0, "log_size": 0}
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, saved in state.pop("parameters").items():
            parameters[name].copy_(saved)
    optimizer.load_state_dict(state.pop("optimizer"))
    set_random_state(state.pop("generators")[rank])
    if rank == 0:
        say(f"continuing {args.out} after step {state['step']}")
    return state


def random_state(device):
    """States of torch's generators: [CPU] or [CPU, GPU]."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(states):
    """Put random_state's answer back."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def open_log(args, state, rank):
    """log.jsonl, cut back to the last evaluation; processes other than the first write nowhere."""
    if rank > 0:
        return open(os.devnull, "w")
    log = open(Path(args.out, "log.jsonl"), "a", encoding="utf-8")
    log.truncate(state["log_size"])
    return log


def outcome(state):
    """What run.json says of the training."""
    return {"steps": state["step"], "samples": state["samples"], "seconds": state["seconds"], "best": state["best"],
            "curve": state["curve"], "unstable": unstable([point["mean"] for point in state["curve"]])}


def unstable(curve, fall=0.05):
    """Whether the validation metric fell by more than `fall` from one evaluation to the next."""
    return any(before - after > fall for before, after in zip(curve, curve[1:]))


def report(args, result):
    """The last lines on the terminal."""
    best, seconds = result["best"], max(result["seconds"], 1e-9)
    print(f"{args.out}: best {args.valid_metric} {best['mean']:.4f} at step {best['step']} of {result['steps']}; "
          f"{result['samples']} samples in {seconds:.0f} s ({result['samples'] / seconds:.0f} samples/s)")
    if result["unstable"]:
        say("unstable training: the validation metric fell by more than 0.05 between evaluations; try a lower --lr")


def read_texts(args, name, split):
    """The users of a split: [(history texts, candidate texts, labels)]."""
    items, _ = common.read_items(args.data, name)
    users = [(*common.texts_of(user, items), user["labels"]) for user in common.read_users(args.data, name, split)]
    if not users:
        raise UserError(f"the {split} split of {name} is empty: prepare it with a larger --train-size")
    return users


def add_lora(args, scorer):
    """The scorer with a LoRA adapter to train: a new one, or that of --init-adapter."""
    if args.init_adapter:
        return common.load_adapter(scorer, args.init_adapter, trainable=True)
    from peft import LoraConfig, get_peft_model
    def wrap(targets):
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=targets)
        return scorer._replace(model=get_peft_model(scorer.model, config))
    targets = args.lora_targets
    try:
        return wrap(targets[0] if targets == ["all-linear"] else targets)
    except ValueError as error:
        if targets:
            raise UserError(f"--lora-targets: {error}") from None
        say(f"peft names no LoRA targets for {scorer.model.config.model_type}: adapting all-linear")
        return wrap("all-linear")


def start_processes(args):
    """(rank, number of processes): torchrun's, or 0 and 1. Each process gets a GPU of its own where there are GPUs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    cuda = torch.cuda.is_available() and not (args.device or "").startswith("cpu")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), world


def describe(args, metas, world):
    """Everything that the run depends on; a folder made under another description is not continued."""
    free = ("data", "out", "device", "overwrite", "setting", "target", "trust_remote_code")  # do not change the result
    return {**{key: value for key, value in vars(args).items() if key not in free}, "prompt": common.load_prompt(args.prompt),
            "model": common.MODELS.get(args.model, args.model), "model_fingerprint": common.fingerprint(args.model),
            "init_fingerprint": common.fingerprint(args.init_adapter), "processes": world,
            "data_sha256": {name: meta["sha256"] for name, meta in sorted(metas.items())}}


def already_finished(args, job):
    """Whether --out holds this very run, finished. Raises UserError where it holds another one."""
    path = Path(args.out, "run.json")
    if not path.exists():
        return False
    run = common.read_json(path)
    if run["arguments"] == job and not args.overwrite:
        return run["finished"]
    if not args.overwrite:
        changed = [key for key in job if job[key] != run["arguments"].get(key)]
        raise UserError(f"{args.out} holds a run with other {', '.join(changed)}: choose another --out or give --overwrite")
    for name in ("run.json", "state.pt", "log.jsonl", "adapter_config.json", "adapter_model.safetensors"):
        Path(args.out, name).unlink(missing_ok=True)
    return False


if __name__ == "__main__":
    sys.exit(common.run(main))
