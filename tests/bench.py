"""Samples/s of scoring, embeddings and training: one at a time, batched and shared, with the same weights.

    python tests/bench.py                                                        (a 40M-parameter Llama, two minutes)
    python tests/bench.py --shape gemma3 --only score                            (attention windows of 64 tokens, packed)
    python tests/bench.py --shape hybrid --only score                            (LFM2: convolutions, a prefix cache)
    python tests/bench.py --shape llama3-8b --dtype bfloat16 --device cuda --users 64

Weights and titles are random; nothing is downloaded. One JSON line per case; its max_abs_diff compares the results:
    score, candidates  one_at_a_time: one prompt per forward pass, the logits of every position and word;
                       batched: score_prompts, a row per prompt; shared: score_prompts in the layout of the model's type
    embed              one_at_a_time: each distinct text by itself through the whole language model;
                       batched: both texts of every sample; shared: score_embeddings, each distinct text once
    train              a step on 32 samples without dropout. one_at_a_time: as in score; padded: all 32 prompts in one
                       padded batch with every logit; batched, shared: train_step. Compared are gradients, as a share of
                       the largest
    train_all          the same step on all samples, shared alone: forward passes of --max-tokens, as far as they fill
A rate of 0 did not fit into the GPU's memory. peak_memory_gb: of `shared` on a GPU, with the weights.
matmul_share = counted operations / seconds of `shared` / rate of a large matrix product of the same dtype (gflops).
Counted are 2 for each weight of the decoder's layers and token, padding left out, and 4 x width for each pair of tokens
of which one sees the other. A training step adds as much for the gradients of the states (less in the first layer, as
nothing below it is trained) and 2 for each weight of LoRA and token, for its own gradient. (Of models without windows.)
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import finetune
import tiny

SHAPES = {  # configuration class, sizes
    "tiny": ("LlamaConfig", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                 vocab_size=500)),
    "40m": ("LlamaConfig", dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408,
                                vocab_size=32000, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=4, head_dim=128,
                                        num_key_value_heads=1, intermediate_size=1408, vocab_size=32000,
                                        sliding_window=64)),
    "hybrid": ("Lfm2Config", dict(hidden_size=512, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=4,
                                  intermediate_size=1408, vocab_size=32000,
                                  layer_types=["conv", "conv", "full_attention"] * 3)),
    "llama3-8b": ("LlamaConfig", dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                                      num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)),
}
ANSWERS = ["ĠYes", "ĠNo"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="40m")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", default="cpu")
    add("--users", type=int, default=6, help="users whose candidates are scored (6)")
    add("--history", type=int, default=20, help="items in a history (20)")
    add("--candidates", type=int, default=9, help="candidates per user (9)")
    add("--sweep", type=int, nargs="*", default=[2, 5, 10, 20, 50, 100], help="candidates per user, case candidates")
    add("--max-tokens", type=int, help="tokens per forward pass (1024 on a CPU, else 8192)")
    add("--only", nargs="+", default=["score", "candidates", "embed", "train"], metavar="CASE", help="these cases only")
    add("--gradient-checkpointing", action="store_true", help="in training")
    add("--rounds", type=int, default=3, help="a time is the best of so many rounds, of one if it took over 6 s (3)")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    scorer, heads = build(args)
    users = make_users(rng, args.users, args.history, args.candidates)
    if "score" in args.only:
        score_case(args, scorer, heads, users, ["one_at_a_time", "batched", "shared"], case="score")
    for n in args.sweep if "candidates" in args.only else []:
        few = make_users(rng, math.ceil(10 / n), args.history, n)
        score_case(args, scorer, heads, few, ["batched", "shared"], case="candidates", candidates=n)
    if "embed" in args.only:
        embed_case(args, scorer, heads, users)
    if "train" in args.only:
        train_cases(args, scorer, heads, users)


def build(args):
    """A Scorer of a model with random weights, and its two LM heads: the whole one and that of two rows."""
    tokenizer = tiny.byte_level()
    config_class, sizes = SHAPES[args.shape]
    config = getattr(transformers, config_class)(max_position_embeddings=8192, use_cache=False, **sizes)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    whole = model.requires_grad_(False).lm_head
    answers = tokenizer.convert_tokens_to_ids(ANSWERS)
    common.cut_head(model, answers)
    whole.register_forward_hook(lambda module, inputs, logits: logits[..., answers].float())
    max_tokens = args.max_tokens or (1024 if args.device == "cpu" else 8192)
    scorer = common.Scorer(name=args.shape, model=model, tokenizer=tokenizer, type="prompt", family="causal",
                           layout=common.layout_of(config, "causal", False), prompt=common.PROMPT, chat_template=False,
                           answers=[0, 1], pooling="last", dense=torch.nn.Sequential(), lower_case=False, limit=8192,
                           max_tokens=max_tokens, pad=0)
    return scorer, {"whole": whole, "two": model.lm_head}


def make_users(rng, n, items, candidates):
    """n users; a title is 4 to 11 words, about 10 tokens."""
    words = sorted({word for word in tiny.WORDS if word.isalpha()})

    def titles(size):
        return [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(size)]
    users = []
    for i in range(n):
        labels = [c % 2 for c in range(candidates)]
        users.append({"user": str(i), "history": titles(items), "candidates": titles(candidates), "labels": labels})
    return users


def use(scorer, heads, way):
    """The scorer for a way of running it, with the LM head of that way put into the model."""
    base = scorer.model.get_base_model() if hasattr(scorer.model, "get_base_model") else scorer.model
    base.lm_head = heads["whole" if way in ("one_at_a_time", "padded") else "two"]
    max_tokens = {"one_at_a_time": 1, "padded": 10**9}.get(way, scorer.max_tokens)
    return scorer._replace(layout=scorer.layout if way == "shared" else "padded", max_tokens=max_tokens)


def race(args, ways, run):
    """Dictionaries by way: best seconds, what it gave, peak memory in GB. run(way) for each of the ways in turns."""
    best, answers, peaks = {}, {}, {}
    for way in list(ways) * args.rounds:
        if best.get(way, 0) > 6:
            continue
        if "cuda" in args.device:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            answers[way] = run(way)
            if "cuda" in args.device:
                torch.cuda.synchronize()
            best[way] = min(best.get(way, math.inf), time.perf_counter() - start)
            peaks[way] = common.peak_memory_gb()
        except torch.OutOfMemoryError:
            if way == "shared":
                raise
            best[way] = math.inf
    return best, answers, peaks


def report(args, samples, ways, run, rows, unshared, scorer, training=False, **first):
    """Time the ways, run(way) returns scores or gradients, and print the case."""
    times, answers, peaks = race(args, ways, run)
    size = 256 if args.shape == "tiny" else 8192 if "cuda" in args.device else 2048
    kind = dict(device=args.device, dtype=getattr(torch, args.dtype))
    a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
    product, _, _ = race(args, ["product"] * 10, lambda way: a @ b)
    gflops = 2e-9 * size**3 / product["product"]
    rates = {way: samples / seconds for way, seconds in times.items()}
    differences = [np.abs(answer - answers["shared"]).max() for answer in answers.values() if answer is not None]
    model, layout = scorer.model, scorer.layout
    tokens = sum(map(common.row_length, rows))
    one = rates.get("one_at_a_time")
    print(json.dumps({
        **first, **rates, "layout": layout, "shared_over_one": rates["shared"] / one if one else None,
        "max_abs_diff": float(max(differences)), "tokens_unshared": unshared, "tokens_scored": tokens,
        "tokens_per_s": tokens / times["shared"], "peak_memory_gb": peaks["shared"],
        "matmul_share": operations(model, rows, training) / times["shared"] / gflops / 1e9, "gflops": gflops,
        "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu",
        "threads": torch.get_num_threads()}), flush=True)


def operations(model, rows, training=False):
    """Operations that the rows need, counted as in the module's docstring."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    weights = lora = lowest = 0
    for name, module in model.get_decoder().named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        size = module.weight.numel()
        weights += size
        if "lora" in name:
            lora += size
        if "layers.0.self_attn" in name and "o_proj" not in name and "lora_B" not in name:
            lowest += size  # what these read needs no gradient
    tokens, pairs = sum(map(common.row_length, rows)), 0
    for row in rows:
        pairs += len(row.prefix) * (len(row.prefix) + 1) / 2
        for suffix in row.suffixes:
            pairs += len(suffix) * (len(row.prefix) + (len(suffix) + 1) / 2)
    forward = 2 * weights * tokens + 4 * width * layers * pairs
    # attention's backward is four products to forward's two; the first layer's keys need no gradient
    return forward + training * (2 * (weights - lowest + lora) * tokens + 8 * width * (layers - 0.25) * pairs)


def score_case(args, scorer, heads, users, ways, **first):
    """Prompt-based scoring."""
    per_user = [common.encode_user(scorer, user)[0] for user in users]
    rows = common.rows_of(scorer, per_user)

    def run(way):
        return np.concatenate(common.score_prompts(use(scorer, heads, way), users)[0])
    report(args, sum(map(len, per_user)), ways, run, rows, sum(map(len, sum(per_user, []))), scorer, **first)


def embed_case(args, scorer, heads, users):
    """Embedding-based scoring."""
    def every_logit(module, inputs, output):
        heads["whole"](output.last_hidden_state)
    scorer = scorer._replace(model=scorer.model.get_decoder(), type="embed", layout="padded")
    pairs = []
    for user in users:
        history = common.encode_user(scorer, user)[0][0]
        pairs += [(history, item) for item in common.encode_items(scorer, user["candidates"])]
    texts = [text for pair in pairs for text in pair]
    rows = [common.Row([], [list(text)], [0]) for text in dict.fromkeys(map(tuple, texts))]

    def run(way):
        if way == "batched":
            with torch.inference_mode():
                vectors = common.embed(scorer, texts).cpu().numpy()
            return np.array([a @ b for a, b in zip(vectors[::2], vectors[1::2])])
        if way == "shared":
            return np.concatenate(common.score_embeddings(scorer, users, {})[0])
        hook = scorer.model.register_forward_hook(every_logit)
        scores = np.concatenate(common.score_embeddings(scorer._replace(max_tokens=1), users, {})[0])
        hook.remove()
        return scores
    report(args, len(pairs), ["one_at_a_time", "batched", "shared"], run, rows, sum(map(len, texts)), scorer,
           case="embed")


def train_cases(args, scorer, heads, users):
    """A step of finetune.py without dropout, on the first batch of an epoch; texts are tokenised beforehand."""
    command = ["--model", "-", "--train", "mind", "--out", "nowhere", "--lora-dropout", "0"]
    options = finetune.arguments(command + ["--gradient-checkpointing"] * args.gradient_checkpointing)
    scorer = finetune.add_lora(options, scorer)
    parameters = finetune.trained_parameters(scorer)
    for p in parameters:  # half of them are zero at first, and with them the gradients of the others
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.Adam(parameters, lr=0.0)
    train = [(common.encode_user(scorer, user)[0], user["labels"]) for user in users]

    def case(name, ways, batch_size):
        batch = finetune.epoch_batches(train, 0, 0, batch_size)[0]
        per_user = {}
        for user, candidate in batch:
            per_user.setdefault(user, []).append(train[user][0][candidate])
        rows = common.rows_of(scorer, list(per_user.values()))

        def run(way):
            finetune.train_step(use(scorer, heads, way), optimizer, train, batch)
            gradients = torch.cat([p.grad.float().flatten() for p in parameters])
            return (gradients / gradients.abs().max()).cpu().numpy()
        unshared = sum(len(ids) for prompts in per_user.values() for ids in prompts)
        report(args, len(batch), ways, run, rows, unshared, scorer, training=True, case=name)
    case("train", ["one_at_a_time", "padded", "batched", "shared"], options.batch_size)
    case("train_all", ["shared"], sum(len(labels) for _, labels in train))


if __name__ == "__main__":
    main()
