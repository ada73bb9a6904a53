"""Fine-tune a model with LoRA on one or several datasets, with early stopping on validation users (section 4).

    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train mind --out runs/mind
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train mind pens hm --out runs/joint
    python finetune.py --model sentence-t5 --type embed --train mind pens --out runs/sentence-t5
    python finetune.py --model Qwen/Qwen2-0.5B-Instruct --train pens --init-adapter runs/mind --out runs/mind-then-pens
    torchrun --nproc-per-node 8 finetune.py --model meta-llama/Meta-Llama-3-8B --train mind --out runs/mind

Writes to OUT: the best adapter in peft's format, run.json (what was trained, on what, how it ended) and log.jsonl (a
line per step and one per evaluation). A killed run continues from its last evaluation by the same command.
"""
import json
import math
import os
import shutil
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import common
from common import UserError, say

CHUNK_SIZE = 10  # candidates of one user that stay together in shuffling, to share a packed row
UNSTABLE = 0.05  # training is unstable where the validation metric falls by more from one evaluation to the next


def arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder or a short name: {', '.join(common.MODELS)}")
    add("--train", nargs="+", required=True, metavar="DATASET", help="datasets to train on, joined and shuffled")
    add("--out", required=True, metavar="RUN", help="folder for the run")
    add("--valid", nargs="+", metavar="DATASET", help="datasets to validate on (default: those of --train)")
    add("--valid-metric", choices=common.METRIC_NAMES, default="auc",
        help="metric of early stopping, the mean over datasets (default: %(default)s)")
    add("--init-adapter", metavar="RUN", help="continue from the adapter of an earlier run, with its LoRA shape")
    add("--lora-r", type=common.positive_int, default=32, help="rank (default: %(default)s)")
    add("--lora-alpha", type=int, default=128, help="scale of the update: alpha / rank (default: %(default)s)")
    add("--lora-dropout", type=float, default=0.1, help="probability (default: %(default)s)")
    add("--lora-targets", nargs="+", metavar="MODULE", help="modules to adapt, or all-linear (default: peft's choice for "
        "the architecture, such as q_proj and v_proj, else all-linear)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam (default: %(default)s)")
    add("--batch-size", type=common.positive_int, default=32,
        help="samples per step, over all processes (default: %(default)s)")
    add("--epochs", type=common.positive_int, default=10,
        help="passes over the training samples, at most (default: %(default)s)")
    add("--patience", type=common.positive_int, default=2,
        help="stop after this many evaluations without a new best (default: %(default)s)")
    add("--eval-every", type=common.positive_int, metavar="STEPS", help="steps between evaluations (default: an epoch)")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    args.valid = args.valid or args.train
    return args


def main(argv=None):
    args = arguments(argv)
    join_processes(args)
    run = common.read_run(args.init_adapter, args)
    datasets = read_datasets(args)
    job = job_of(args, datasets)
    state_path, run_path = Path(args.out, "state.pt"), Path(args.out, "run.json")
    state = None
    if common.is_there(state_path, job, args.overwrite):
        state = torch.load(state_path, map_location="cpu", weights_only=True)
    elif common.is_there(run_path, job, args.overwrite):
        say(f"{args.out} is finished already; --overwrite runs it again")
        return

    torch.manual_seed(args.seed)  # for LoRA's first weights: loading draws, too, but the same in every process
    scorer = add_lora(args, common.load_scorer(args))
    train, truncated = encode_train(args, scorer, datasets)
    valid = {}
    for name in args.valid:
        valid[name] = [common.with_texts(user, datasets[name].items) for user in datasets[name].splits["valid"]]
        if name not in args.train:
            say(f"validating on {name}, which --train does not name: its labels choose the checkpoint")
    state = fine_tune(args, scorer, train, valid, state, job)

    if rank_and_world()[0] == 0:
        domains = {**run["domains"], **{name: datasets[name].domain for name in args.train}}
        save_run(args, scorer, {
            "model": scorer.name,
            "type": args.type,
            "train": args.train,
            "valid": args.valid,
            "train_chain": list(dict.fromkeys(run["train_chain"] + args.train)),  # with the runs of --init-adapter
            "valid_chain": list(dict.fromkeys(run["valid_chain"] + args.valid)),
            "domains": domains,
            "steps": state["steps"],
            "samples": state["samples"],
            "seconds": state["seconds"],
            "best": state["best"],
            "curve": state["curve"],
            "beats_base": state["best"]["step"] > 0,
            "unstable": unstable(state["curve"]),
            "truncated": truncated,
            "job": job,
            "arguments": vars(args),
            "versions": common.versions()})
        report(args, state)
    if dist.is_initialized():
        dist.destroy_process_group()

# -------------------------------------------------------------------------------------------------- the training loop


def fine_tune(args, scorer, train, valid, state, job):
    """Train the adapter of the scorer's model until validation stops improving. Returns the state at the end (a dict).

    train: [(token ids of a user's texts, labels)]; valid: {dataset: users}; state: what save_state wrote before the run
    was killed, or None.
    """
    parameters = trained_parameters(scorer)
    optimizer = torch.optim.Adam(parameters, lr=args.lr)  # without weight decay or schedule, as the paper's
    steps_per_epoch = math.ceil(sum(len(labels) for _, labels in train) / args.batch_size)
    last_step = steps_per_epoch * args.epochs
    eval_every = args.eval_every or steps_per_epoch
    if state is None:
        state = {  # all that changes; saved as it is, so a restart knows everything
            "steps": 0,
            "samples": 0,
            "seconds": 0.0,  # of steps, without validation
            "curve": [],  # evaluations: step, metric by dataset, their mean
            "log": [],  # the lines of log.jsonl: of every step and evaluation
            "best": None,  # point of the curve
            "best_parameters": None,
            "evaluations_since_best": 0}  # early stopping counts these
        record(args, state, parameters, validate(args, scorer, valid))  # the start, which training must beat
    else:
        set_parameters(parameters, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"continuing {args.out} after step {state['steps']}")
    save_state(args, state, parameters, optimizer, job)  # also after a restart: log.jsonl may lag behind state.pt

    batches = None
    rank, _ = rank_and_world()
    progress = tqdm(total=last_step, initial=state["steps"], desc="fine-tuning", unit="step", disable=rank > 0)
    while state["steps"] < last_step and state["evaluations_since_best"] < args.patience:
        epoch, number = divmod(state["steps"], steps_per_epoch)
        if number == 0 or batches is None:  # a new epoch, or a restart in the middle of one
            batches = epoch_batches(train, args.seed, epoch, args.batch_size)
        batch = batches[number]
        torch.manual_seed(common.digest(args.seed, state["steps"], rank))  # dropout: a restart draws the same
        started = time.perf_counter()
        loss, tokens = train_step(scorer, optimizer, train, batch)
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):  # Adam never recovers from a NaN
            raise UserError(f"the loss is {loss} after {state['steps']} steps: lower --lr (now {args.lr:g})")
        state["steps"] += 1
        state["samples"] += len(batch)
        state["seconds"] += seconds
        state["log"].append({
            "step": state["steps"],
            "epoch": epoch,
            "loss": loss,
            "samples_per_s": len(batch) / seconds,
            "tokens_per_s": tokens / seconds,
            "peak_memory_gb": common.peak_memory_gb()})
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        progress.update()
        if state["steps"] % eval_every == 0 or state["steps"] == last_step:  # the last steps count, too
            record(args, state, parameters, validate(args, scorer, valid))
            save_state(args, state, parameters, optimizer, job)
    progress.close()
    set_parameters(parameters, state["best_parameters"])  # not the last: it may have overfitted
    return state


def trained_parameters(scorer):
    """The parameters of the adapter, which alone are trained."""
    return [parameter for parameter in scorer.model.parameters() if parameter.requires_grad]


def set_parameters(parameters, values):
    """Copy values (tensors) into the parameters."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


def epoch_batches(train, seed, epoch, batch_size):
    """The batches of an epoch: lists of batch_size samples (index of user, of candidate); the last may be shorter.

    Candidates are shuffled within users and cut into chunks, then the chunks are shuffled: a batch mixes users, yet
    most of its samples share their history, so packing pays.
    """
    rng = np.random.default_rng([seed, epoch])  # of the epoch alone: a restart shuffles the same
    chunks = []
    for user, (_, labels) in enumerate(train):
        order = rng.permutation(len(labels)).tolist()
        for start in range(0, len(order), CHUNK_SIZE):
            chunks.append([(user, candidate) for candidate in order[start:start + CHUNK_SIZE]])
    samples = []
    for i in rng.permutation(len(chunks)):
        samples += chunks[i]
    return [samples[start:start + batch_size] for start in range(0, len(samples), batch_size)]


def train_step(scorer, optimizer, train, batch):
    """One step of Adam on a batch, split across the processes. Returns (mean loss, tokens).

    The loss is a sum over samples divided by the size of the batch, so the gradient is the same for any packing, split
    by --max-tokens or number of processes (dropout aside, which differs).
    """
    rank, world = rank_and_world()
    share = batch[len(batch) * rank // world:len(batch) * (rank + 1) // world]  # sizes differ by one at most
    losses = embed_losses if scorer.type == "embed" else prompt_losses
    scorer.model.train()  # dropout on; validate switches it off
    optimizer.zero_grad()
    mean_loss, total_tokens = 0.0, 0
    for loss, tokens in losses(scorer, by_user(train, share)):  # part by part, to save memory
        share_of_mean = loss / len(batch)  # of the whole batch, whatever part or process this is
        share_of_mean.backward()  # adds to the gradients
        mean_loss += share_of_mean.item()
        total_tokens += tokens
    if world > 1:
        total = torch.tensor([mean_loss, total_tokens], dtype=torch.float64, device=scorer.model.device)
        add_up(trained_parameters(scorer), total)
        mean_loss, total_tokens = total.tolist()
    optimizer.step()
    return mean_loss, total_tokens


def by_user(train, samples):
    """Samples, (index of user, of candidate), grouped by user, each as in train: a user's prompts share a row."""
    users = {}
    for user, candidate in samples:
        ids, labels = train[user]
        first = len(ids) - len(labels)  # of the candidates' texts: 0, or 1 after the history (embeddings)
        chosen_ids, chosen_labels = users.setdefault(user, (ids[:first], []))
        chosen_ids.append(ids[first + candidate])
        chosen_labels.append(labels[candidate])
    return list(users.values())


def prompt_losses(scorer, users):
    """Yield (loss, tokens) of each part of a batch: binary cross-entropy of the logit difference, summed over samples.

    users: [(token ids of prompts, labels)]. A part is one forward pass: at most --max-tokens tokens with their padding.
    """
    labels = []
    for _, user_labels in users:
        labels += user_labels
    labels = torch.tensor(labels, dtype=torch.float64, device=scorer.model.device)
    rows = common.rows_of(scorer, [ids for ids, _ in users])
    for part in common.fill_batches(scorer, rows):
        scores = common.score_rows(scorer, part)
        # of P(yes) = softmax over the two logits = sigmoid of their difference
        loss = binary_cross_entropy_with_logits(scores, labels[common.indices_of(part)], reduction="sum")
        yield loss, sum(map(common.row_length, part))


def embed_losses(scorer, users):
    """Yield (loss, tokens) of each part of a batch: squared error of cosine(user, item) and label, summed over samples.

    users: [(token ids of the history and then of candidates, labels)]. A part is the texts of some users, of at most
    --max-tokens tokens (one user at least).
    """
    parts, size = [], 0
    for ids, labels in users:
        tokens = sum(map(len, ids))
        if not parts or size + tokens > scorer.max_tokens:
            parts.append([])
            size = 0
        parts[-1].append((ids, labels))
        size += tokens
    for part in parts:
        texts = []
        for ids, _ in part:
            texts += ids
        vectors = common.embed(scorer, texts)  # of length 1
        loss, start = 0.0, 0
        for ids, labels in part:
            end = start + len(ids)
            cosines = vectors[start + 1:end] @ vectors[start]
            loss += (cosines - cosines.new_tensor(labels)).square().sum()
            start = end
        yield loss, sum(map(len, texts))


def validate(args, scorer, valid):
    """{dataset: validation metric}. Each process scores its share of the users."""
    rank, world = rank_and_world()
    scorer.model.eval()
    result = {}
    for name, users in valid.items():
        share = users[rank::world]  # metrics know no order of users, so any share will do
        scores, embeddings = [], {}
        for start in tqdm(range(0, len(share), 64), desc=f"validating on {name}", leave=False, disable=rank > 0):
            more, _ = common.scores_of(scorer, share[start:start + 64], embeddings)
            scores += more
        labels = [np.array(user["labels"]) for user in share]
        scored = gather(list(zip(scores, labels)))
        result[name] = common.mean_metric(args.valid_metric, scored)
        if math.isnan(result[name]):
            raise UserError(f"{args.valid_metric} is undefined on the validation users of {name}: prepare more of them")
    return result


def record(args, state, parameters, by_dataset):
    """Put an evaluation, {dataset: metric}, into the state, and the parameters if they are the best so far."""
    mean = float(np.mean(list(by_dataset.values())))
    point = {"step": state["steps"], "valid": by_dataset, "mean": mean}
    state["evaluations_since_best"] += 1
    if state["best"] is None or mean > state["best"]["mean"]:
        state["best"] = point
        # a copy: training goes on to change the parameters themselves
        state["best_parameters"] = [parameter.detach().cpu().clone() for parameter in parameters]
        state["evaluations_since_best"] = 0
    state["curve"].append(point)
    state["log"].append(point)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in by_dataset.items())
    star = " *" if state["best"] is point else ""
    say(f"step {state['steps']}: {args.valid_metric} {mean:.4f} ({shown}){star}")


def unstable(curve):
    """Whether the validation metric fell by more than UNSTABLE from one evaluation to the next."""
    means = [point["mean"] for point in curve]
    return any(before - after > UNSTABLE for before, after in zip(means, means[1:]))

# ---------------------------------------------------------------------------------------------------- data and adapter


def read_datasets(args):
    """{name: common.Data} of --train and --valid. Raises UserError where one is not prepared."""
    datasets = {}
    for name in [*args.train, *args.valid]:
        needed = [split for split, names in (("train", args.train), ("valid", args.valid)) if name in names]
        datasets[name] = common.read_dataset(args.data, name, *needed)
    return datasets


def encode_train(args, scorer, datasets):
    """The training users, [(token ids of their texts, labels)], and what was cut, {"texts": n, "histories": n}.

    Texts: a prompt per candidate or, for embeddings, the history and then each candidate. Histories are cut here, alike
    for all candidates of a user, as evaluate.py cuts them.
    """
    train, truncated = [], {"texts": 0, "histories": 0}
    for name in dict.fromkeys(args.train):
        users, items = datasets[name].splits["train"], datasets[name].items
        truncated["texts"] += common.count_long_texts(users, items)
        for user in tqdm(users, desc=f"tokenising {name}", unit="user", disable=rank_and_world()[0] > 0):
            user = common.with_texts(user, items)
            ids, dropped = common.encode_user(scorer, user)
            if args.type == "embed":
                ids += common.encode_items(scorer, user["candidates"])
            train.append(([array("i", tokens) for tokens in ids], user["labels"]))  # 4 bytes per token, a list takes 36
            truncated["histories"] += dropped > 0
    for what, count in truncated.items():
        if count:
            say(f"{count} {what} were cut to fit")
    return train, truncated


def add_lora(args, scorer):
    """The scorer with a LoRA adapter to train: a new one, or that of --init-adapter. Raises UserError if none fits."""
    import peft
    if scorer.layout == "cached":
        scorer = scorer._replace(layout="equal")  # a cache takes no gradient
    if args.gradient_checkpointing:
        scorer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if args.init_adapter:
        say(f"LoRA as in {args.init_adapter}: the LoRA flags have no effect")
        return common.load_adapter(scorer, args.init_adapter, trainable=True)
    peft_choice = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = args.lora_targets or peft_choice.get(scorer.model.config.model_type, "all-linear")
    if targets == ["all-linear"]:
        targets = "all-linear"  # peft takes this one as a string
    say(f"LoRA on {targets}")
    names = [name for name, _ in scorer.model.named_modules()]
    for target in args.lora_targets or []:
        found = [name for name in names if f".{name}".endswith(f".{target}")]
        if not found and target != "all-linear":  # peft is content if one of several is found
            raise UserError(f"--lora-targets: no module of {scorer.name} is called {target}")
    config = peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                             target_modules=targets)
    model = peft.get_peft_model(scorer.model, config).eval()
    return scorer._replace(model=model)

# ---------------------------------------------------------------------------------------------------- the run's folder

# A run in progress is one file, state.pt; what it holds becomes the adapter and run.json at the end. So a run that is
# killed at any moment continues, and the adapter and run.json that --overwrite replaces stay until then.


def job_of(args, datasets):
    """What a run is made of: a folder made by another job is not continued."""
    job = common.job_of(args, ("gradient_checkpointing",))
    job["init_adapter"] = common.adapter_identity(args.init_adapter)
    job["data_sha256"] = {name: data.sha256 for name, data in datasets.items()}
    return job


def save_state(args, state, parameters, optimizer, job):
    """Write state.pt, all that a killed run needs to end as one never killed, and log.jsonl, from the state."""
    if rank_and_world()[0] > 0:
        return
    saved = {**state, "job": job, "parameters": parameters, "optimizer": optimizer.state_dict()}
    path = Path(args.out, "state.pt")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, temporary)
    os.replace(temporary, path)
    lines = [json.dumps(line) + "\n" for line in state["log"]]
    common.write_atomically(Path(args.out, "log.jsonl"), "".join(lines))


def save_run(args, scorer, run):
    """Write the adapter in peft's format and, when it is whole, run.json."""
    config = scorer.model.peft_config["default"]
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # peft keeps a set: its order, so the file's, would vary
    temporary = Path(args.out, f"adapter.{os.getpid()}.tmp")
    scorer.model.save_pretrained(temporary, save_embedding_layers=False)
    Path(args.out, "run.json").unlink(missing_ok=True)  # the old run's: from here on the new one replaces it
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(temporary / name, Path(args.out, name))
    for path in Path(args.out).glob("adapter.*.tmp"):  # its own, and those of killed runs
        shutil.rmtree(path)
    common.write_json(Path(args.out, "run.json"), run)
    for path in Path(args.out).glob("state.pt*"):  # with what killed runs have left half written
        path.unlink()


def report(args, state):
    """The last lines on the terminal: how the run went."""
    best, speed = state["best"], state["samples"] / state["seconds"]
    print(f"{args.out}: best {args.valid_metric} {best['mean']:.4f} at step {best['step']} of {state['steps']}; "
          f"{state['samples']} samples in {state['seconds']:.0f} s ({speed:.3g} samples/s)")
    if best["step"] == 0:
        print("no evaluation beat the one before the first step: the saved adapter is the initial one")
    if unstable(state["curve"]):
        print(f"unstable training: validation fell by more than {UNSTABLE} between evaluations; try a lower --lr")

# --------------------------------------------------------------------------------------------------- several processes


def join_processes(args):
    """Join torchrun's processes, if it started this one. Each gets a GPU of its own where there are GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = torch.cuda.is_available() and not (args.device or "").startswith("cpu")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")


def rank_and_world():
    """(rank of this process, number of processes): torchrun's words."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(values):
    """The lists of all processes as one, in the order of their ranks; the same in each process."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def add_up(parameters, total):
    """Sum the gradients of the parameters, and total, over the processes."""
    for parameter in parameters:
        if parameter.grad is None:  # a process without samples
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(total)


if __name__ == "__main__":
    sys.exit(common.run_script(main))
