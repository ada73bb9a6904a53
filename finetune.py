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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's format


def arguments(argv):
    parser = common.Parser(__doc__, "finetune.py")
    add = parser.add_argument
    add("--model", required=True, help=f"hub id, local folder or a short name: {', '.join(common.MODELS)}")
    add("--train", nargs="+", required=True, metavar="DATASET", help="datasets to train on, joined and shuffled")
    add("--out", required=True, type=common.output_folder, metavar="RUN", help="folder for the run")
    add("--valid", nargs="+", metavar="DATASET", help="datasets to validate on (if not given: those of --train)")
    add("--valid-metric", choices=common.METRIC_NAMES, default="auc",
        help="metric of early stopping, the mean over datasets")
    add("--init-adapter", metavar="RUN", help="continue from the adapter of an earlier run (sequential fine-tuning)")
    add("--lora-r", type=common.positive_number, default=32, help="rank")
    add("--lora-alpha", type=common.positive_number, default=128, help="scale of the update: alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="probability")
    add("--lora-targets", nargs="+", metavar="MODULE", help="modules to adapt, or all-linear (if not given: peft's "
        "choice for the architecture, such as q_proj and v_proj)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam")
    add("--batch-size", type=common.positive_number, default=32, help="samples per step, over all processes")
    add("--epochs", type=common.positive_number, default=10, help="passes over the training samples, at most")
    add("--patience", type=common.positive_number, default=2,
        help="stop after this many evaluations without a new best")
    add("--eval-every", type=common.positive_number, metavar="STEPS",
        help="steps between evaluations; an epoch if not given")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    args.train = list(dict.fromkeys(args.train))
    args.valid = list(dict.fromkeys(args.valid or args.train))
    if not 0 < args.lr < math.inf or not 0 <= args.lora_dropout < 1:
        raise UserError("--lr is a positive number, --lora-dropout at least 0 and below 1")
    if args.dtype == "float16":
        raise UserError("--dtype float16 needs loss scaling to train, which is not done here: bfloat16 or float32")
    for source in (args.model, args.init_adapter):
        if source and Path(source).resolve() == Path(args.out).resolve():
            raise UserError(f"--out is {source}, from which the run starts: choose another")
    return args


def main(argv=None):
    args = arguments(argv)
    join_processes(args)
    chain = chain_of(args)
    adopt_lora_shape(args)
    # for the report, but now: a meta.json that is broken should not stop it after hours
    test_sets = common.check_datasets(args.data, common.prepared(args.data, "test"), "test")
    job = job_of(args)
    status, state = status_of(args, job)
    if status == "finished":
        say(f"{args.out} is finished already; --overwrite runs it again")
        return

    torch.manual_seed(args.seed)  # for LoRA's first weights: loading draws, too, but the same in every process
    scorer = add_lora(args, common.load_scorer(args))
    train, truncated = read_train(args, scorer)
    valid = read_valid(args)
    state = fine_tune(args, scorer, train, valid, state, job)

    run = {
        "model": scorer.name,
        "type": args.type,
        "train": args.train,
        "valid": args.valid,
        **chain,
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
        "versions": common.versions()}
    if processes()[0] == 0:
        save_run(args, scorer, run)
        report(args, run, test_sets)
    if dist.is_initialized():
        dist.destroy_process_group()

# -------------------------------------------------------------------------------------------------- the training loop


def fine_tune(args, scorer, train, valid, state, job):
    """Train the adapter of the scorer's model until validation stops improving. Returns the state at the end (a dict).

    train: [(token ids of a user's texts, labels)]; valid: {dataset: users}; state: what save_state wrote before the run
    was killed, or None.
    """
    parameters = trained_parameters(scorer)
    optimizer = torch.optim.Adam(parameters, lr=args.lr)
    steps_per_epoch = math.ceil(sum(len(labels) for _, labels in train) / args.batch_size)
    last_step = steps_per_epoch * args.epochs
    eval_every = args.eval_every or steps_per_epoch
    if state is None:
        state = {
            "steps": 0,
            "samples": 0,
            "seconds": 0.0,  # of steps, without validation
            "curve": [],  # evaluations: step, metric by dataset, their mean
            "log": [],  # the lines of log.jsonl: of every step and evaluation
            "best": None,  # point of the curve
            "best_parameters": None,
            "evaluations_since_best": 0}
        record(args, state, parameters, validate(args, scorer, valid))  # the start, which training must beat
    else:
        set_parameters(parameters, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"continuing {args.out} after step {state['steps']}")
    save_state(args, state, parameters, optimizer, job)  # also after a restart: log.jsonl may lag behind state.pt

    batches = None
    rank, _ = processes()
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
        if not math.isfinite(loss):
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
            "peak_memory_gb": common.peak_memory_gb(scorer.model.device)})
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        progress.update()
        if state["steps"] % eval_every == 0 or state["steps"] == last_step:
            record(args, state, parameters, validate(args, scorer, valid))
            save_state(args, state, parameters, optimizer, job)
    progress.close()
    set_parameters(parameters, state["best_parameters"])
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
    rng = np.random.default_rng([seed, epoch])
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
    rank, world = processes()
    share = batch[len(batch) * rank // world:len(batch) * (rank + 1) // world]
    losses = embed_losses if scorer.type == "embed" else prompt_losses
    scorer.model.train()
    optimizer.zero_grad()
    mean_loss, total_tokens = 0.0, 0
    for loss, tokens in losses(scorer, by_user(train, share)):  # part by part, to save memory
        if not loss.requires_grad:
            raise UserError("nothing to train: the scores do not depend on the adapted modules; see --lora-targets")
        share_of_mean = loss / len(batch)
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
        own_ids, own_labels = users.setdefault(user, (ids[:first], []))
        own_ids.append(ids[first + candidate])
        own_labels.append(labels[candidate])
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
    rank, world = processes()
    scorer.model.eval()
    result = {}
    for name, users in valid.items():
        share = users[rank::world]
        scores, known = [], {}
        for start in tqdm(range(0, len(share), 64), desc=f"validating on {name}", leave=False, disable=rank > 0):
            more, _ = common.scores_of(scorer, share[start:start + 64], known)
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


def chain_of(args):
    """What the adapter will have seen, with the runs that --init-adapter continues: datasets and their domains.

    Raises UserError where a dataset or the earlier run is missing.
    """
    earlier = common.read_run(args.init_adapter, args)
    metas = common.check_datasets(args.data, args.train, "train")
    common.check_datasets(args.data, args.valid, "valid")
    domains = earlier["domains"]
    for name, meta in metas.items():
        domains[name] = meta["domain"]
    return {
        "train_chain": list(dict.fromkeys(earlier["train_chain"] + args.train)),  # none twice
        "valid_chain": list(dict.fromkeys(earlier["valid_chain"] + args.valid)),
        "domains": domains}


def adopt_lora_shape(args):
    """Put the shape of the adapter of --init-adapter into the LoRA flags: job and run.json say what is trained."""
    if args.init_adapter:
        shape = common.read_json(Path(args.init_adapter, ADAPTER_FILES[0]))
        args.lora_r, args.lora_alpha, args.lora_dropout = shape["r"], shape["lora_alpha"], shape["lora_dropout"]
        args.lora_targets = shape["target_modules"]


def read_valid(args):
    """{dataset: validation users, with texts}."""
    valid = {}
    for name in args.valid:
        users, items = common.read_users(args.data, name, "valid")
        valid[name] = [common.with_texts(user, items) for user in users]
        if name not in args.train:
            say(f"validating on {name}, which --train does not name: its labels choose the checkpoint")
    return valid


def read_train(args, scorer):
    """The training users, [(token ids of their texts, labels)], and what was cut, {"texts": n, "histories": n}.

    Texts: a prompt per candidate or, for embeddings, the history and then each candidate. Histories are cut here, alike
    for all candidates of a user, as evaluate.py cuts them.
    """
    train, truncated = [], {"texts": 0, "histories": 0}
    for name in args.train:
        users, items = common.read_users(args.data, name, "train")
        truncated["texts"] += common.count_long_texts(users, items)
        for user in tqdm(users, desc=f"tokenising {name}", unit="user", disable=processes()[0] > 0):
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
    if args.gradient_checkpointing:
        scorer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if args.init_adapter:
        say(f"LoRA as in {args.init_adapter}: rank {args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout}")
        return common.load_adapter(scorer, args.init_adapter, trainable=True)
    targets = args.lora_targets or default_targets(scorer)
    if targets == ["all-linear"]:
        targets = "all-linear"  # peft takes this one as a string
    config = peft.LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                             target_modules=targets)
    try:
        model = peft.get_peft_model(scorer.model, config).eval()
    except ValueError as error:
        raise UserError(f"LoRA on {targets} of {scorer.name}: {error}; choose other --lora-targets") from None
    for target in args.lora_targets or []:
        adapted = [name for name in model.targeted_module_names if f".{name}".endswith(f".{target}")]
        if not adapted and targets != "all-linear":
            raise UserError(f"--lora-targets: no module of {scorer.name} is called {target}")
    if args.type == "prompt" and hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise UserError("--lora-targets names the LM head, which has only the rows of the two answers here")
    return scorer._replace(model=model)


def default_targets(scorer):
    """Names of the modules to adapt: peft's choice for the architecture, such as q_proj and v_proj, as the authors'.

    Where peft has none, all linear layers; of a mixture of experts those of attention, since experts take no dropout.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as peft_choice
    model_type = scorer.model.config.model_type
    if model_type in peft_choice:
        return peft_choice[model_type]
    experts, attention = False, set()
    for path, module in scorer.model.named_modules():
        experts = experts or "experts" in path
        if isinstance(module, torch.nn.Linear) and ("attn" in path or "attention" in path):
            attention.add(path.split(".")[-1])
    targets = sorted(attention) if experts else ["all-linear"]
    say(f"peft names no LoRA targets for {model_type}: adapting {', '.join(targets)}")
    return targets

# ---------------------------------------------------------------------------------------------------- the run's folder

# A run in progress is one file, state.pt; what it holds becomes the adapter and run.json at the end. So a run that is
# killed at any moment continues, and the adapter and run.json that --overwrite replaces stay until then.


def job_of(args):
    """What a run is made of: a folder made by another job is not continued."""
    job = common.job_of(args, ("gradient_checkpointing",))
    job["init_adapter"] = common.adapter_identity(args.init_adapter)
    job["data_sha256"] = {}
    for name in sorted({*args.train, *args.valid}):
        job["data_sha256"][name] = common.data_sha256(args.data, name)
    return job


def status_of(args, job):
    """(common.job_status of what stands in --out; where that is "continue", the state of the killed run, else None)."""
    if args.overwrite:
        return "start", None
    path = Path(args.out, "state.pt")
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = dict(state["job"])
        except Exception as error:
            raise UserError(f"{path} is damaged ({str(error)[:100]}): start again with --overwrite") from None
        return common.job_status(args.out, job, found, finished=False), state
    found = common.job_in(Path(args.out, "run.json"))
    if found is None and Path(args.out, ADAPTER_FILES[0]).exists():
        found = {}  # somebody else's adapter
    return common.job_status(args.out, job, found, finished=True), None


def save_state(args, state, parameters, optimizer, job):
    """Write state.pt, all that a killed run needs to end as one never killed, and log.jsonl, from the state."""
    if processes()[0] > 0:
        return
    saved = {**state, "job": job, "parameters": parameters, "optimizer": optimizer.state_dict()}
    path = Path(args.out, "state.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(saved, f"{path}.tmp")
    except RuntimeError as error:  # so torch reports a full disk
        raise UserError(f"{path} cannot be written: {error}") from None
    os.replace(f"{path}.tmp", path)
    lines = [json.dumps(line) + "\n" for line in state["log"]]
    common.write_atomically(Path(args.out, "log.jsonl"), "".join(lines))


def save_run(args, scorer, run):
    """Write the adapter in peft's format and, when it is whole, run.json."""
    config = scorer.model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # peft keeps a set: the order, and so the file, would vary
    temporary = Path(args.out, "adapter.tmp")
    scorer.model.save_pretrained(temporary, save_embedding_layers=False)
    Path(args.out, "run.json").unlink(missing_ok=True)  # the old run's: from here on the new one replaces it
    for name in ADAPTER_FILES:
        os.replace(temporary / name, Path(args.out, name))
    shutil.rmtree(temporary)
    common.write_json(Path(args.out, "run.json"), run)
    Path(args.out, "state.pt").unlink()


def report(args, run, test_sets):
    """The last lines on the terminal: how the run went and which of the settings it is."""
    best, speed = run["best"], run["samples"] / run["seconds"]
    print(f"{args.out}: best {args.valid_metric} {best['mean']:.4f} at step {best['step']} of {run['steps']}; "
          f"{run['samples']} samples in {run['seconds']:.0f} s ({speed:.0f} samples/s)")
    if not run["beats_base"]:
        print("no evaluation beat the one before the first step: the saved adapter is the initial one")
    if run["unstable"]:
        print(f"unstable training: validation fell by more than {UNSTABLE} between evaluations; try a lower --lr")
    domains = {**common.domains_of(test_sets), **run["domains"]}
    for letter, meaning in common.SETTINGS.items():
        names = [name for name in test_sets if common.setting_of(run["train_chain"], name, domains) == letter]
        if names:
            print(f"setting {letter} for {', '.join(names)} ({meaning})")

# --------------------------------------------------------------------------------------------------- several processes


def join_processes(args):
    """Join torchrun's processes, if it started this one. Each gets a GPU of its own where there are GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = torch.cuda.is_available() and not (args.device or "").startswith("cpu")
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"torchrun starts {here} processes here, each for a GPU of its own, and there are {gpus}")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")


def processes():
    """(rank of this process, number of processes)."""
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
