"""Samples/s of scoring, embeddings, training and metrics: one at a time, batched and packed, with the same weights.

    python tests/bench.py                                                        (a 40M-parameter Llama, two minutes)
    python tests/bench.py --shape llama3-8b --dtype bfloat16 --device cuda --users 64

Weights and titles are random; nothing is downloaded. One JSON line a case; its max_abs_diff compares the results:
    score, candidates  one_at_a_time: one prompt a forward, the logits of every position, as in the authors' evaluation;
                       batched: score_prompts without packing; packed: score_prompts
    embed              one_at_a_time: each distinct text by itself through the whole language model, as in the authors'
                       code; batched: both texts of every sample; packed: score_embeddings, each distinct text once
    train              a step on 32 samples. one_at_a_time: as in score; authors: all 32 in one batch, as in their code;
                       batched, packed: train_step. Without dropout; compared are gradients, as a share of the largest
    metrics            all of them, without intervals. one_at_a_time: user by user; packed: all users at once
matmul_share = counted operations / seconds of `packed` / rate of a large matrix product of the same dtype (gflops).
Counted are 2 for each weight of the decoder's layers and token, padding left out, and 4 x width for each pair of tokens
of which one sees the other. A training step adds as much for the gradients of the states (less in the first layer, as
nothing below it is trained) and 2 for each weight of LoRA and token, for its own gradient.
"""
import argparse
import functools
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

SHAPES = {
    "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=500),
    "40m": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408, vocab_size=32000,
                tie_word_embeddings=True),
    "llama3-8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                      intermediate_size=14336, vocab_size=128256),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=int)
    add("--shape", type=str, choices=SHAPES, default="40m")
    add("--dtype", type=str, choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", type=str, default="cpu")
    add("--users", default=6, help="users whose candidates are scored (6)")
    add("--history", default=20, help="items in a history (20)")
    add("--candidates", default=9, help="candidates a user (9)")
    add("--sweep", nargs="*", default=[2, 5, 10, 20, 50, 100], help="candidates a user in the case candidates")
    add("--max-tokens", help="tokens a forward pass (1024 on a CPU, else 8192)")
    add("--rounds", default=3, help="a time is the best of so many rounds, of one if that took over 3 seconds (3)")
    args, rng = parser.parse_args(argv), np.random.default_rng(0)
    scorer, every_logit = build(args)
    users = make_users(rng, args.users, args.history, args.candidates)
    heads = dict.fromkeys(("batched", "packed"), scorer.model.get_output_embeddings())
    score_case(args, scorer, users, {"one_at_a_time": every_logit, **heads}, case="score")
    for n in args.sweep:
        few = make_users(rng, math.ceil(10 / n), args.history, n)
        score_case(args, scorer, few, heads, case="candidates", candidates=n)
    embed_case(args, scorer._replace(model=scorer.model.get_decoder()), users, every_logit)
    train_case(args, scorer, users, {"one_at_a_time": every_logit, "authors": every_logit, **heads})
    metrics_case(args, rng)


def build(args):
    """A Scorer of a Llama with random weights, made on the device, and its LM head over the whole vocabulary."""
    tokenizer = tiny.byte_level()
    config = transformers.LlamaConfig(max_position_embeddings=8192, use_cache=False, **SHAPES[args.shape])
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    head = model.requires_grad_(False).get_output_embeddings()
    answers = tokenizer.convert_tokens_to_ids(["ĠYes", "ĠNo"])
    model.set_output_embeddings(common.answer_head(head, answers))
    head.register_forward_hook(lambda module, inputs, logits: logits[..., answers].float())
    encode = functools.partial(common.encode_texts, tokenizer, True, False, True)
    return common.Scorer(args.shape, model, tokenizer, "causal", True, encode, common.PROMPT, "last", 8192,
                         args.max_tokens or (1024 if args.device == "cpu" else 8192)), head


def make_users(rng, n, items, candidates):
    """n users: (history texts, candidate texts, labels); a title is 4 to 11 words, about 10 tokens."""
    words = sorted({word for word in tiny.WORDS if word.isalpha()})
    titles = lambda size: [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(size)]
    return [(titles(items), titles(candidates), [c % 2 for c in range(candidates)]) for _ in range(n)]


def ways(scorer, heads, run):
    """{name: function that returns run(scorer)}, with the LM head that `heads` has for each way of using a scorer."""
    def call(name, head):
        scorer.model.set_output_embeddings(head)
        max_tokens = {"one_at_a_time": 1, "authors": 10 ** 9}.get(name, scorer.max_tokens)
        return run(scorer._replace(packs=name == "packed", max_tokens=max_tokens))
    return {name: functools.partial(call, name, head) for name, head in heads.items()}


def race(device, rounds, calls):
    """Best time and last answer of each call, a function; they take turns: {name: seconds}, {name: answer}."""
    clock = lambda: (torch.cuda.synchronize() if "cuda" in device else None, time.perf_counter())[1]
    best, answers = {}, {}
    for name, call in [*calls.items()] * rounds:
        if best.get(name, 0) < 3:
            start = clock()
            answers[name] = call()
            best[name] = min(best.get(name, math.inf), clock() - start)
    return best, answers


def report(args, samples, calls, rows=(), unpacked=None, model=None, training=False, **first):
    """Time the calls, functions that return scores or gradients, and print the case."""
    times, answers = race(args.device, args.rounds, calls)
    share = gflops = None
    if rows:
        size, kind = 8192 if "cuda" in args.device else 2048, dict(device=args.device, dtype=getattr(torch, args.dtype))
        a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
        gflops = 2e-9 * size ** 3 / race(args.device, 10, {"product": lambda: a @ b})[0]["product"]
        share = operations(model, rows, training) / times["packed"] / gflops / 1e9
    rate = {"one_at_a_time": None, "batched": None, **{name: samples / seconds for name, seconds in times.items()}}
    print(json.dumps({
        **first, **rate, "packed_over_one": rate["one_at_a_time"] and rate["packed"] / rate["one_at_a_time"],
        "max_abs_diff": float(max(np.nanmax(np.abs(np.subtract(a, answers["packed"]))) for a in answers.values())),
        "tokens_unpacked": unpacked, "tokens_packed": sum(map(common.row_length, rows)) or None,
        "matmul_share": share, "gflops": gflops, "threads": torch.get_num_threads()}), flush=True)


def operations(model, rows, training=False):
    """Operations that the rows need, counted as in the module's docstring."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    sizes = {name: module.weight.numel() for name, module in model.get_decoder().named_modules()
             if isinstance(module, torch.nn.Linear)}
    lora = sum(size for name, size in sizes.items() if "lora" in name)
    lowest = sum(size for name, size in sizes.items() if "layers.0.self_attn" in name
                 and "o_proj" not in name and "lora_B" not in name)  # what these read needs no gradient
    tokens, weights = sum(map(common.row_length, rows)), sum(sizes.values())
    pairs = sum(len(row.prefix) * (len(row.prefix) + 1) / 2 for row in rows)
    pairs += sum(len(rest) * (len(row.prefix) + (len(rest) + 1) / 2) for row in rows for rest in row.rests)
    forward = 2 * weights * tokens + 4 * width * layers * pairs
    # attention's backward is four products to forward's two; the first layer's keys need no gradient
    return forward + training * (2 * (weights - lowest + lora) * tokens + 8 * width * (layers - 0.25) * pairs)


def score_case(args, scorer, users, heads, **first):
    """Prompt-based scoring."""
    texts = [user[:2] for user in users]
    rows, counts = common.prompt_rows(scorer, texts, scorer.max_tokens)
    calls = ways(scorer, heads, lambda scorer: common.score_prompts(scorer, texts)[0])
    report(args, sum(len(row.rests) for row in rows), calls, rows, counts["tokens_unpacked"], scorer.model, **first)


def embed_case(args, scorer, users, every_logit):
    """Embedding-based scoring."""
    texts = [user[:2] for user in users]
    pairs = [common.embedding_tokens(scorer, [history], [item])[0] for history, items in texts for item in items]
    rows = [common.Row([], [ids], []) for ids in {tuple(ids) for pair in pairs for ids in pair}]

    def one_at_a_time():
        hook = scorer.model.register_forward_hook(lambda module, inputs, output: [every_logit(output[0]), output][1])
        scores = common.score_embeddings(scorer._replace(max_tokens=1), texts, {})[0]
        hook.remove()
        return scores

    def batched():
        vectors = common.embed_all(scorer, [ids for pair in pairs for ids in pair])
        return [common.cosine(*pair) for pair in zip(vectors[::2], vectors[1::2])]
    calls = {"one_at_a_time": one_at_a_time, "batched": batched,
             "packed": lambda: common.score_embeddings(scorer, texts, {})[0]}
    report(args, len(pairs), calls, rows, sum(len(a) + len(b) for a, b in pairs), scorer.model, case="embed")


def train_case(args, scorer, users, heads):
    """A step of finetune.py without dropout, on the first batch of an epoch; texts are tokenised beforehand."""
    options = finetune.arguments(["--model", "-", "--train", "mind", "--out", "-", "--lora-dropout", "0"])
    scorer = finetune.add_lora(options, scorer)
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    for p in parameters:  # half of them are zero at first, and with them the gradients of the others
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.Adam(parameters, lr=0.0)
    train = list(zip(common.prompt_tokens(scorer, [user[:2] for user in users])[0], [user[2] for user in users]))
    batch = finetune.epoch_batches([len(labels) for _, labels in train], 0, 0, options.batch_size)[0]

    def step(scorer):
        finetune.train_step(options, scorer, optimizer, train, batch)
        gradients = torch.cat([p.grad.float().flatten() for p in parameters])
        return (gradients / gradients.abs().max()).cpu().numpy()
    prompts = [[train[user][0][c] for u, c in batch if u == user] for user in dict.fromkeys(u for u, _ in batch)]
    rows = common.pack_users(scorer, prompts, scorer.max_tokens)
    report(args, len(batch), ways(scorer, heads, step), rows, sum(len(ids) for group in prompts for ids in group),
           scorer.model, training=True, case="train")


def metrics_case(args, rng, n_users=2000, size=10):
    """All metrics of 20,000 samples."""
    samples = rng.normal(size=n_users * size), rng.integers(0, 2, n_users * size), np.repeat(np.arange(n_users), size)

    by_user, auc = lambda samples: list(common.by_user(*samples).values()), lambda: common.auc(*samples[:2])
    alone = [tuple(values[i:i + size] for values in samples) for i in range(0, n_users * size, size)]
    calls = {"one_at_a_time": lambda: (auc(), np.concatenate([by_user(user) for user in alone], 1))[1],
             "packed": lambda: (auc(), by_user(samples))[1]}
    report(args, n_users * size, calls, case="metrics")


if __name__ == "__main__":
    main()
