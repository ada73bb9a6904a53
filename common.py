"""RecBench-MD in one module: how well do foundation models recommend? (arXiv 2508.21354)

15 datasets in 10 domains. A sample is (user history, candidate item, liked or not); a model is asked for a score of
every candidate, in one of two ways, and the scores of a user's candidates are compared with the labels:

    prompt   a text shows history and candidate and ends where the answer goes;  score = logit(yes) - logit(no)
    embed    one text for the user, one for the item;                            score = cosine of their embeddings

In reading order: the benchmark and its settings, prompts, prompt scoring, embedding scoring, models, baselines,
metrics, intervals, files and command lines. Sections and tables cited are the paper's.
"""
import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import re
import resource
import sys
import warnings
from bisect import bisect_left
from collections import Counter, namedtuple
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------- the benchmark

Dataset = namedtuple("Dataset", "domain test finetune kind positives negatives")  # caps a user; kind: prepare_data.py

DATASETS = {
    "mind":        Dataset("news", True, True, "impressions", 10, 10),
    "pens":        Dataset("news", False, True, "impressions", 10, 10),
    "goodreads":   Dataset("book", True, True, "ratings", 2, 10),
    "books":       Dataset("book", False, True, "ratings", 2, 10),
    "movielens":   Dataset("movie", True, False, "ratings", 2, 10),
    "microlens":   Dataset("video", True, True, "sequences", 2, 2),
    "netflix":     Dataset("video", False, True, "ratings", 2, 10),
    "cds":         Dataset("music", True, True, "ratings", 2, 10),
    "lastfm":      Dataset("music", False, True, "sequences", 10, 100),
    "hm":          Dataset("fashion", True, True, "sequences", 2, 2),
    "pog":         Dataset("fashion", False, True, "sequences", 1, 10),
    "electronics": Dataset("electronics", True, False, "ratings", 2, 10),
    "steam":       Dataset("game", True, False, "sequences", 2, 2),
    "hotelrec":    Dataset("hotel", True, False, "ratings", 2, 25),
    "yelp":        Dataset("restaurant", True, False, "ratings", 2, 10),
}
DEMO = {  # built by `prepare_data.py demo`, needs no download
    "news-a":  Dataset("news", True, True, "demo", 4, 4),
    "news-b":  Dataset("news", True, True, "demo", 4, 4),
    "books-a": Dataset("book", True, True, "demo", 4, 4),
    "books-b": Dataset("book", True, True, "demo", 4, 4),
    "shop":    Dataset("shop", True, True, "demo", 4, 4),
}
SETTINGS = {
    "A": "zero-shot, single dataset",
    "B": "zero-shot, multi-domain",
    "C": "single-domain single-dataset",
    "D": "single-domain cross-dataset",
    "E": "single-domain multi-dataset",
    "F": "cross-domain cross-dataset",
    "G": "multi-domain multi-dataset, target held out",
    "H": "multi-domain multi-dataset, joint",
}


def setting_of(train, target, single=False):
    """The letter of the setting in which a model trained on the datasets `train` is tested on `target` (section 4).

    train: names, in any order, empty for zero-shot. single: the evaluation is given one dataset only (A instead of B).
    B, C, E, F and H are stated in the paper; A, D and G follow from the pattern.
    """
    train, home = set(train), dataset(target).domain
    domains = {dataset(name).domain for name in train}
    if not train:
        return "A" if single else "B"
    if target in train:
        return "C" if train == {target} else "E" if domains == {home} else "H"
    if domains == {home}:
        return "D"
    return "F" if len(train) == 1 else "G"


def training_sets(setting, target):
    """The datasets that a setting trains on for a target: the largest choice that the letter allows.

    Raises UserError where the setting does not exist for the target, and for F, which is any one set of another domain.
    """
    universe = DEMO if target in DEMO else DATASETS
    trainable = [name for name, row in universe.items() if row.finetune]
    same = [name for name in trainable if universe[name].domain == dataset(target).domain]
    if setting not in SETTINGS:
        raise UserError(f"unknown setting {setting!r}; there are {', '.join(SETTINGS)}")
    if setting == "F":
        raise UserError("setting F trains on one dataset of another domain: name it with --train "
                        f"(not {', '.join(same) or target})")
    sets = {"A": [], "B": [], "C": [target], "D": [n for n in same if n != target], "E": same,
            "G": [n for n in trainable if n != target], "H": trainable}[setting]
    if setting in "CEH" and target not in trainable:
        raise UserError(f"setting {setting} ({SETTINGS[setting]}) does not exist for {target}: it is no fine-tune set "
                        f"of the benchmark (--train {target} trains on it all the same)")
    if setting_of(sets, target, setting == "A") != setting:
        raise UserError(f"setting {setting} ({SETTINGS[setting]}) does not exist for {target}: its domain "
                        f"({dataset(target).domain}) has {len(same)} fine-tune set(s): {', '.join(same) or 'none'}")
    return sets


def dataset(name):
    """The benchmark's row of a dataset. Raises UserError with the valid names."""
    if name not in DATASETS and name not in DEMO:
        raise UserError(f"unknown dataset {name!r}; there are {', '.join([*DATASETS, *DEMO])}")
    return DATASETS.get(name) or DEMO[name]


def check_names(names):
    """The names in their order, each a known dataset and none twice. Raises UserError."""
    for name in names:
        dataset(name)
    return list(dict.fromkeys(names))

# ---------------------------------------------------------------------------------------------------------- prompts

PROMPT = {  # --prompt FILE.json replaces any of these; the candidate comes late, since packing shares what precedes it
    # of a prompt: "prompt", "answers"; of the two texts to embed: "user", "candidate"; of both: the others
    "item": "{n}. {text}",
    "join": "\n",
    "prompt": "A user liked these items, oldest first:\n{history}\n\n"
              "Would the user also like this item? Answer with Yes or No.\n{candidate}\nAnswer:",
    "user": "A user liked these items, oldest first:\n{history}",
    "candidate": "{candidate}",
    "answers": [" Yes", " No"],
    "special_tokens": True,  # the tokenizer adds its own, such as BOS
}
TEXT_LIMIT = 512  # characters of an item text that a prompt may hold


def load_prompt(path=None):
    """PROMPT, its entries replaced by those of the JSON file at path. Raises UserError on a wrong key or value."""
    own = read_json(path) if path else {}
    if not isinstance(own, dict) or (unknown := sorted(set(own) - set(PROMPT))):
        what = f"unknown key {unknown[0]!r}" if isinstance(own, dict) else "no JSON object"
        raise UserError(f"{path}: {what}; a prompt file is a JSON object with keys out of {', '.join(PROMPT)}")
    prompt = {**PROMPT, **own}
    wrong = [key for key in prompt if type(prompt[key]) is not type(PROMPT[key])]
    if wrong or len(prompt["answers"]) != 2 or not all(isinstance(word, str) and word for word in prompt["answers"]):
        raise UserError(f"{path}: wrong value for {', '.join(wrong) or 'answers'}; the type is that of "
                        f"{json.dumps({key: PROMPT[key] for key in wrong or ['answers']})}")
    for key, place in [("item", "text"), ("prompt", "history"), ("prompt", "candidate"), ("user", "history"),
                       ("candidate", "candidate")]:
        if "{%s}" % place not in prompt[key]:
            raise UserError(f'{path}: "{key}" lacks {{{place}}}')
    return prompt


def fill(template, **values):
    """Insert values at {name} in one pass: braces inside a value, even "{candidate}", stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def history_lines(prompt, history):
    """The history (texts, oldest first) as numbered lines."""
    return prompt["join"].join(fill(prompt["item"], n=n, text=text) for n, text in enumerate(history, 1))


def candidate_prompts(prompt, history, candidates):
    """One prompt a candidate: each shows the whole history and that candidate (section 3, prompt-based)."""
    lines = history_lines(prompt, history)
    return [fill(prompt["prompt"], history=lines, candidate=text) for text in candidates]


def shorten(encode, render, history, candidates, limit):
    """Make a user's longest text fit `limit` tokens: drop the oldest items; if one is left and still too long, halve.

    encode: texts -> token ids; render: (history, candidates) -> texts. Returns (token ids of each text, number of items
    dropped, number of times halved). All texts of a user are cut alike, so they still share their history.
    """
    longest = lambda drop: max(map(len, encode(render(history[drop:], candidates))))
    dropped = bisect_left(range(len(history) - 1), True, key=lambda drop: longest(drop) <= limit)
    history, halved = history[dropped:], 0
    while max(map(len, ids := encode(render(history, candidates)))) > limit:
        if not any(history) and not any(candidates):
            raise UserError(f"the prompt alone is longer than {limit} tokens: raise --max-length or shorten the prompt")
        history, candidates = ([text[:len(text) // 2] for text in texts] for texts in (history, candidates))
        halved += 1
    return ids, dropped, halved


def answer_token(tokenizer, context, word):
    """The id that stands for an answer word after the text `context`.

    (a) tokens(context + word) = tokens(context) + one id: that id; (b) else the word's own entry in the vocabulary;
    (c) else UserError with the tokens.
    """
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + word))
    if after[:-1] == before:
        return after[-1]
    vocabulary = tokenizer.get_vocab()
    if (entry := next((w for w in (word, word.strip()) if w in vocabulary), None)) is not None:
        return vocabulary[entry]
    before, after = tokenizer.convert_ids_to_tokens(before)[-3:], tokenizer.convert_ids_to_tokens(after)[-5:]
    raise UserError(f"the answer {word!r} is no single token: ...{before} becomes ...{after}; "
                    'choose other "answers" with --prompt')


def answer_tokens(tokenizer, prompt, chat_template=False):
    """[yes, no]: the ids of the prompt's answers (see answer_token); in a chat the answer starts without a space."""
    (context,), words = candidate_prompts(prompt, ["x"], ["x"]), prompt["answers"]
    if chat_template:
        context, words = chat(tokenizer, context), [word.strip() for word in words]
    answers = [answer_token(tokenizer, context, word) for word in words]
    if answers[0] == answers[1]:
        raise UserError(f"both answers {words} are the token {tokenizer.convert_ids_to_tokens(answers)[0]!r}")
    return answers


def encode_texts(tokenizer, special_tokens, chat_template, open_ended, texts):
    """Token ids of texts, tokenised whole. chat_template: wrapped by it, which brings its own BOS.

    open_ended: the answer comes next, so an EOS that the tokenizer adds is taken off. A text without any token (an item
    without text, a tokenizer without BOS) is one EOS, so that it too has a state to read.
    """
    if chat_template:
        texts, special_tokens = [chat(tokenizer, text) for text in texts], False
    ids = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"] if texts else []
    if open_ended and special_tokens and tokenizer.eos_token_id is not None:
        ids = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]
    return [row or [tokenizer.eos_token_id or 0] for row in ids]


def chat(tokenizer, text):
    """The text as a user's message in the tokenizer's own chat template, up to where the answer goes."""
    message = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # there is none, or it is broken
        raise UserError(f"--chat-template: {str(error)[:300]}") from None

# ---------------------------------------------------------------------------------------------------- prompt scoring

# A model ready to score. family: "causal", "masked" or "seq2seq"; packs: whether prompts are packed; encode: texts ->
# token lists; prompt: see PROMPT; pooling: "last" or "mean"; limit: tokens a prompt; max_tokens: tokens a forward pass.
Scorer = namedtuple("Scorer", "name model tokenizer family packs encode prompt pooling limit max_tokens")
# One row of a forward pass: token lists `rests` that each continue `prefix`, and `places`, where their results belong.
Row = namedtuple("Row", "prefix rests places")


def pack(prompts, places, max_tokens):
    """Rows that hold every prompt of one user once: their longest common token prefix, then what is left of each.

    prompts: token lists, tokenised whole, so the result is that of separate prompts for any tokenizer. A rest keeps at
    least one token, where the answer is read. A row longer than max_tokens is split into several with the same prefix.
    """
    first, last = min(prompts), max(prompts)  # what the extremes in alphabetical order share, all share
    differ = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    prefix = first[:min(differ, min(map(len, prompts)) - 1)]
    rows, size = [], math.inf
    for prompt, place in zip(prompts, places):
        rest = prompt[len(prefix):]
        if size + len(rest) > max_tokens:
            rows.append(Row(prefix, [], []))
            size = len(prefix)
        rows[-1].rests.append(rest)
        rows[-1].places.append(place)
        size += len(rest)
    return rows


def row_length(row):
    """Tokens of a row."""
    return len(row.prefix) + sum(map(len, row.rests))


def fill_batches(lengths, max_tokens):
    """Indices in batches, longest first, so that rows x longest <= max_tokens (one row at least).

    A batch also ends where the lengths fall below two thirds of its longest, so that little is spent on padding.
    """
    batches, longest = [], 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens or 3 * lengths[index] < 2 * longest:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def lay_out(rows, pad):
    """Rows as arrays (rows, longest): token ids, segment (0 prefix, 1.. rests, -1 padding), position; answer places.

    Positions restart after the prefix in every rest. The answers: (row, column) of the last token of each rest.
    """
    shape = len(rows), max(map(row_length, rows))
    ids, segment, position = np.full(shape, pad), np.full(shape, -1), np.zeros(shape, int)
    answers = []
    for r, row in enumerate(rows):
        shared = end = len(row.prefix)
        ids[r, :end], segment[r, :end], position[r, :end] = row.prefix, 0, np.arange(end)
        for number, rest in enumerate(row.rests, 1):
            start, end = end, end + len(rest)
            ids[r, start:end], segment[r, start:end] = rest, number
            position[r, start:end] = np.arange(shared, shared + len(rest))
            answers.append((r, end - 1))
    return ids, segment, position, np.array(answers)


def packed_mask(segment):
    """Who sees whom: a boolean tensor (rows, 1, length, length) from the segments (rows, length).

    A token sees what stands before it in the prefix and in its own rest, and nothing of the other rests:

        prefix a b, rests c d and e f        a b c d e f
                                          a  1 . . . . .
                                          b  1 1 . . . .
                                          c  1 1 1 . . .        each rest computes exactly what it would
                                          d  1 1 1 1 . .        compute in a prompt of its own, since its
                                          e  1 1 . . 1 .        positions too continue the prefix
                                          f  1 1 . . 1 1
    """
    query, key = segment[:, :, None], segment[:, None, :]
    return (((key == 0) | (key == query)).tril())[:, None]


def answer_gaps(scorer, rows):
    """logit(yes) - logit(no) of every rest of the rows, in order: a float64 tensor (rests,), with gradient."""
    model, device = scorer.model, scorer.model.device
    ids, segment, position, answers = lay_out(rows, scorer.tokenizer.pad_token_id or 0)
    if scorer.family == "masked":
        last = ids.shape[1] - 1 - np.argmax(ids[:, ::-1] == scorer.tokenizer.mask_token_id, 1)
        answers[:, 1] = last
    segment = torch.tensor(segment, device=device)
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": (segment >= 0).long()}
    if scorer.packs:
        mask = packed_mask(segment)  # as numbers to add, which every attention takes
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        inputs.update(attention_mask=mask, position_ids=torch.tensor(position, device=device))
    if scorer.family == "seq2seq":
        inputs["decoder_input_ids"] = torch.full((len(rows), 1), model.config.decoder_start_token_id, device=device)
        answers[:, 1] = 0
    logits = model(**inputs).logits[answers[:, 0], answers[:, 1]].double()
    return logits[:, 0] - logits[:, 1]


def prompt_tokens(scorer, users):
    """Token ids of the prompts of users [(history texts, candidate texts)], a list a user; counts of what was cut."""
    mask = scorer.tokenizer.mask_token if scorer.family == "masked" else ""
    return encode_users(scorer, users, lambda history, candidates: [
        text + mask for text in candidate_prompts(scorer.prompt, history, candidates)])


def pack_users(scorer, prompts, max_tokens):
    """Rows of the prompts of users, [[token ids]]; without packing, each prompt is a row of its own.

    The results' places count the candidates of all users in order.
    """
    rows, place = [], 0
    for group in prompts:
        places = range(place, place + len(group))
        place += len(group)
        rows += pack(group, places, max_tokens) if scorer.packs else [Row([], [p], [i]) for p, i in zip(group, places)]
    return rows


def prompt_rows(scorer, users, max_tokens):
    """Rows of the prompts of users [(history texts, candidate texts)], and counts of tokens and of what was cut."""
    prompts, counts = prompt_tokens(scorer, users)
    rows = pack_users(scorer, prompts, max_tokens)
    counts["tokens_unpacked"] = sum(len(prompt) for group in prompts for prompt in group)
    counts["tokens_scored"] = sum(map(row_length, rows))
    return rows, counts


def encode_users(scorer, users, render):
    """Token ids of render(history, candidates) for every user, cut to the scorer's limit; how many users were cut."""
    texts = [render(*user) for user in users]
    flat = iter(scorer.encode([text for group in texts for text in group]))
    ids, counts = [[next(flat) for _ in group] for group in texts], Counter()
    for i, group in enumerate(ids):
        if max(map(len, group)) > scorer.limit:
            ids[i], dropped, halved = shorten(scorer.encode, render, *users[i], scorer.limit)
            counts.update(histories=int(dropped > 0), halved=int(halved > 0))
    return ids, counts


def score_prompts(scorer, users):
    """Prompt-based scores of users [(history texts, candidate texts)]: float64 (candidates of all users,); counts."""
    rows, counts = prompt_rows(scorer, users, scorer.max_tokens)
    scores = np.zeros(sum(len(candidates) for _, candidates in users))
    for batch in fill_batches([row_length(row) for row in rows], scorer.max_tokens):
        batch = [rows[i] for i in batch]
        with torch.inference_mode():
            scores[[place for row in batch for place in row.places]] = answer_gaps(scorer, batch).double().cpu()
    return scores, counts


def packing_refusal(model, family, limit):
    """Why a model's prompts must not be packed (None: they may).

    Packing puts tokens at places that are not their positions: right only where attention depends on position_ids and
    the mask alone. Not so for ALiBi (a bias by place) and for a sliding window that is shorter than a prompt.
    """
    config = model.config.get_text_config()
    if family != "causal":
        return "packing is for decoder-only models"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "its positions cannot be set (ALiBi)"
    if (getattr(config, "sliding_window", None) or math.inf) < limit:
        return f"its sliding window ({config.sliding_window}) is shorter than --max-length ({limit})"
    return None


def check_packing(scorer, users):
    """The scorer, without packing if one user, scored both ways, gets other scores: catches what nobody listed."""
    user = max((user for user in users if len(user[1]) > 1), key=lambda u: sum(map(len, u[0] + u[1])), default=None)
    if not scorer.packs or user is None:
        return scorer
    separate = scorer._replace(packs=False)
    plain, half = score_prompts(separate, [user])[0], scorer.model.dtype in (torch.float16, torch.bfloat16)
    try:
        difference = np.abs(score_prompts(scorer, [user])[0] - plain).max()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:  # its forward takes no mask of this shape
        if isinstance(error, torch.OutOfMemoryError):
            raise
        difference = math.inf
    if difference <= (0.05 if half else 1e-4) * (1 + np.abs(plain).max()):
        return scorer
    say(f"packed and separate prompts differ by {difference:.3g} on {scorer.name}: scoring without packing")
    return separate


def answer_head(head, answers):
    """The two rows of an LM head (torch.nn.Linear) that score the answers, in float32 (float64 stays).

    The model's own forward then returns logits (..., 2) with its soft-capping, scaling and bias; bfloat16 logits would
    tie, and ties distort AUC.
    """
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    two = torch.nn.Linear(head.weight.shape[1], 2, device=head.weight.device, dtype=dtype)
    bias = getattr(head, "bias", None)
    two.weight.data = head.weight.data[answers].to(dtype)
    two.bias.data = torch.zeros_like(two.bias) if bias is None else bias.data[answers].to(dtype)
    two.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return two.requires_grad_(False)

# ------------------------------------------------------------------------------------------------- embedding scoring


def embed(scorer, ids):
    """Embeddings of token lists: a tensor (texts, width), at least float32, with gradient.

    Pooling "last": the state of the last token; "mean": the mean over tokens. Right padding is never pooled.
    """
    length = max(map(len, ids))
    pad = scorer.tokenizer.pad_token_id or 0
    tokens = torch.tensor([list(row) + [pad] * (length - len(row)) for row in ids], device=scorer.model.device)
    size = torch.tensor([[len(row)] for row in ids], device=tokens.device)
    mask = torch.arange(length, device=tokens.device) < size
    states = scorer.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if scorer.pooling == "last":
        return states[torch.arange(len(ids)), size[:, 0] - 1]
    return (states * mask[:, :, None]).sum(1) / size


def embedding_tokens(scorer, histories, items):
    """Token ids of the text of every history (list of texts) and of every item (text), and counts of what was cut."""
    prompt = scorer.prompt
    users, cut = encode_users(scorer, [(history, []) for history in histories],
                              lambda history, _: [fill(prompt["user"], history=history_lines(prompt, history))])
    texts, more = encode_users(scorer, [([], [item]) for item in items],
                               lambda _, candidates: [fill(prompt["candidate"], candidate=candidates[0])])
    return [group[0] for group in users + texts], cut + more


def embed_all(scorer, ids):
    """Embeddings of token lists, each encoded once, in batches by tokens: a float32 array (texts, width)."""
    out = [None] * len(ids)
    for batch in fill_batches([len(row) for row in ids], scorer.max_tokens):
        with torch.inference_mode():
            for index, vector in zip(batch, embed(scorer, [ids[i] for i in batch]).float().cpu().numpy()):
                out[index] = vector
    return out


def score_embeddings(scorer, users, known):
    """Embedding-based scores of users [(history texts, candidate texts)]: cosine(user, item) as float64, and counts.

    known: {item text: embedding}, filled here, so that an item is encoded once over all calls.
    """
    histories = list(dict.fromkeys(tuple(history) for history, _ in users))
    items = list(dict.fromkeys(text for _, candidates in users for text in candidates if text not in known))
    ids, counts = embedding_tokens(scorer, [list(history) for history in histories], items)
    vectors = embed_all(scorer, ids)
    known.update(zip(items, vectors[len(histories):]))
    user_vector = dict(zip(histories, vectors))
    scores = [cosine(user_vector[tuple(history)], known[text]) for history, candidates in users for text in candidates]
    counts["tokens_scored"] = sum(map(len, ids))
    counts["tokens_unpacked"] = counts["tokens_scored"]
    return np.array(scores), counts


def cosine(a, b):
    """a.b / (|a| |b|) in float64, 0 for a zero vector."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b) or 1.0))

# ------------------------------------------------------------------------------------------------------------ models

MODELS = {  # short names; any hub id or local folder works too
    "bert-base": "bert-base-uncased", "bert-large": "bert-large-uncased",
    "opt-350m": "facebook/opt-350m", "opt-1.3b": "facebook/opt-1.3b",
    "llama-7b": "huggyllama/llama-7b", "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B", "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "qwen-2-0.5b": "Qwen/Qwen2-0.5B-Instruct", "qwen-2-1.5b": "Qwen/Qwen2-1.5B-Instruct",
    "qwen-2-7b": "Qwen/Qwen2-7B-Instruct", "deepseek-qwen-2-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "glm-4-9b": "THUDM/glm-4-9b-chat-hf", "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "phi-2": "microsoft/phi-2", "phi-3-small": "microsoft/Phi-3-small-8k-instruct",  # needs --trust-remote-code
    "recgpt-7b": "vinai/RecGPT-7B", "e5-base": "intfloat/e5-base-v2", "e5-large": "intfloat/e5-large-v2",
    "sentence-bert": "efederici/sentence-bert-base",
}


def load_scorer(args):
    """A Scorer for args.model and args.type, in evaluation mode on args.device; flags as in shared_arguments.

    Raises UserError where the model or its tokenizer cannot be loaded or, for prompts, has no LM head.
    """
    prompt = load_prompt(args.prompt)
    name, model, tokenizer, family = load_pretrained(args)
    limit, packs = min(args.max_length, max_positions(model, tokenizer)), False
    if args.type == "prompt":
        answers = answer_tokens(tokenizer, prompt, args.chat_template)
        model.set_output_embeddings(answer_head(model.get_output_embeddings(), answers))
        refusal = packing_refusal(model, family, limit)
        packs = refusal is None
        if refusal and family == "causal":
            say(f"{name}: prompts are scored without packing: {refusal}")
    asked = args.type == "prompt"
    encode = functools.partial(encode_texts, tokenizer, prompt["special_tokens"], args.chat_template and asked,
                               asked and family == "causal")
    pooling = args.pooling if args.pooling != "auto" else "last" if family == "causal" else "mean"
    max_tokens = args.max_tokens or (1024 if model.device.type == "cpu" else 8192)
    return Scorer(name, model, tokenizer, family, packs, encode, prompt, pooling, limit, max_tokens)


def load_pretrained(args):
    """(name, model, tokenizer, family) of args.model, loaded with the class for args.type. Raises UserError."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    name, (device, dtype) = MODELS.get(args.model, args.model), placement(args)
    options = {"trust_remote_code": args.trust_remote_code}
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        family = family_of(config)
        loader = getattr(transformers, "AutoModel" + {
            "embed": "ForTextEncoding" if family == "seq2seq" else "",
            "prompt": {"causal": "ForCausalLM", "masked": "ForMaskedLM", "seq2seq": "ForSeq2SeqLM"}[family]}[args.type])
        model, info = loader.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True, **options)
        model.to(device).eval()
    except torch.OutOfMemoryError:
        raise UserError(f"model {name} does not fit into the memory of {device}") from None
    except Exception as error:  # a hub that is offline or gated, a broken folder, a tokenizer's missing package
        where = "" if Path(name).is_dir() else "no such folder, and the hub gave none (offline, gated, misspelt?): "
        raise UserError(f"model {name} cannot be loaded: {where}{type(error).__name__}: {str(error)[:200]}") from None
    missing = sorted(key for key in info["missing_keys"] if args.type == "prompt" or "pooler" not in key)
    if missing:  # the class has invented them
        what, mend = ("no LM head", ": use --type embed") if args.type == "prompt" else ("incomplete weights", "")
        raise UserError(f"model {name} has {what} ({missing[0]} is missing){mend}")
    if args.type == "prompt" and family == "masked" and tokenizer.mask_token is None:
        raise UserError(f"the tokenizer of {name} has no mask token, which a masked model's prompt needs")
    model.config.use_cache = False
    return name, model, tokenizer, family


def placement(args):
    """(device, name of the dtype) that --device and --dtype mean on this machine. Raises UserError without a GPU."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "cuda" in device and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU here")
    return device, args.dtype if args.dtype != "auto" else "bfloat16" if "cuda" in device else "float32"


def load_adapter(scorer, folder, trainable=False):
    """The scorer with a run's LoRA adapter (float32 at least) on its model. Raises UserError where it does not fit."""
    from peft import PeftModel
    try:
        return scorer._replace(model=PeftModel.from_pretrained(scorer.model, folder, is_trainable=trainable).eval())
    except Exception as error:
        raise UserError(f"adapter {folder} does not fit {scorer.name}: {str(error)[:300]}") from None


def family_of(config):
    """"seq2seq" (T5), "masked" (BERT and encoders) or "causal" (decoder-only), from a model's configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder or config.model_type in ("t5", "mt5", "umt5"):  # a T5 encoder alone denies it
        return "seq2seq"
    decoder = (config.architectures or [""])[0].endswith(("CausalLM", "LMHeadModel"))
    return "masked" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder else "causal"


def max_positions(model, tokenizer):
    """The longest input in tokens that a model has positions for."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or math.inf
    for name, module in model.named_modules():  # RoBERTa's positions start after the padding id
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    return min(positions, tokenizer.model_max_length)

# --------------------------------------------------------------------------------------------------------- baselines

BASELINES = ("random", "popularity", "overlap")


def baseline_scores(kind, seed, name, user, items, popularity):
    """Scores of a user's candidates without a model, to read other numbers against: a list of float.

    random: uniform on [0, 1) by hash; popularity: how often others chose the item (a Counter from count_popularity);
    overlap: cosine of the word counts of the history and the candidate.
    """
    if kind == "random":
        return [digest(seed, name, user["user"], "random", item) / 2**64 for item in user["candidates"]]
    if kind == "popularity":
        return [float(popularity[item]) for item in user["candidates"]]
    words = lambda ids: Counter(word for item in ids for word in re.findall(r"\w+", items[item].lower()))
    norm = lambda counts: math.sqrt(sum(n * n for n in counts.values())) or 1.0
    history = words(user["history"])
    candidates = [words([item]) for item in user["candidates"]]
    return [sum(n * history[word] for word, n in c.items()) / (norm(history) * norm(c)) for c in candidates]

# ----------------------------------------------------------------------------------------------------------- metrics

# What the metrics need. Arrays (samples,): the sample's user (0..users-1, ascending), its label, how many candidates of
# the same user score higher (above) or the same (tied, itself included), and how many of these are positive. Arrays
# (users,): candidates (size) and positives. A metric is a function of Ranks with one value a user: (users,).
Ranks = namedtuple("Ranks", "user label above tied positives_above positives_tied size positives")


def rank_candidates(scores, labels, users):
    """Rank the candidates within each user: Ranks. Users are numbered as np.unique sorts them.

    scores (higher is better), labels (0 or 1), users (numbers or strings): arrays (samples,), in any order. Raises
    UserError on NaN or infinite scores, which have no rank, on other labels, and where there are no samples.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if not scores.size:
        raise UserError("there are no samples to compute metrics from")
    if not np.isfinite(scores).all():
        raise UserError(f"{(~np.isfinite(scores)).sum()} of {scores.size} scores are NaN or infinite")
    if not ((labels == 0) | (labels == 1)).all():
        raise UserError("labels are 0 or 1, and some here are not")
    user = np.unique(users, return_inverse=True)[1]
    order = np.lexsort((-scores, user))
    user, scores, label = user[order], scores[order], labels[order].astype(np.int64)
    new_user = np.r_[True, user[1:] != user[:-1]]
    group = np.cumsum(new_user | np.r_[True, scores[1:] != scores[:-1]]) - 1  # samples of one user that tie
    start, first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]), np.flatnonzero(new_user)
    before = np.r_[0, np.cumsum(label)]  # positives before a place in this order
    end = np.r_[start[1:], len(user)]
    return Ranks(user, label, (start - first[user[start]])[group], (end - start)[group],
                 (before[start] - before[first[user[start]]])[group], (before[end] - before[start])[group],
                 np.bincount(user), np.bincount(user, label).astype(np.int64))


def auc(scores, labels):
    """Area under the ROC curve over all samples (float): P(a positive scores above a negative) + 1/2 P(they tie).

    auc = (1 / PN) sum over positives i of (#negatives below i + 1/2 #negatives tied with i), for P positives and N
    negatives (Hanley & McNeil 1982); NaN with one class only. Arguments and errors: rank_candidates.
    """
    r = rank_candidates(scores, labels, np.zeros(len(labels), int))
    return float(group_auc(r)[0])


def group_auc(r):
    """Each user's own AUC (see auc): (users,), NaN where there is one class only. The authors' code: GAUC, its mean."""
    negatives = (r.size - r.positives)[r.user]
    above, tied = r.above - r.positives_above, r.tied - r.positives_tied  # negatives only
    return mean_by_user(r, (negatives - above - tied / 2) / np.where(negatives, negatives, np.nan))


def mean_by_user(r, value):
    """Mean of a value over each user's positives: an array (users,), NaN for users without a positive."""
    return np.bincount(r.user, np.where(r.label == 1, value, 0.0)) / np.where(r.positives, r.positives, np.nan)


def ndcg(r, k):
    """nDCG@k = DCG@k / ideal DCG@k, DCG@k = sum over positives at rank i <= k of 1 / log2(i + 1): (users,).

    Ties: the expected DCG over random order, where a positive takes each rank of its tied group equally often (McSherry
    & Najork 2008, as for the other metrics at k and mrr). NaN for users without a positive, as in all that follow.
    """
    discount = np.r_[0, np.cumsum(1 / np.log2(np.arange(2, k + 2)))]  # discount[n]: of ranks 1..n
    to = lambda n: discount[np.minimum(n, k)]
    dcg = (to(r.above + r.tied) - to(r.above)) / r.tied
    return mean_by_user(r, dcg) * r.positives / np.where(r.positives, to(r.positives), 1)


def recall(r, k):
    """recall@k = #positives at ranks <= k / #positives: (users,); expected value over random order of ties."""
    return mean_by_user(r, np.clip(k - r.above, 0, r.tied) / r.tied)


def first_positive(r, value):
    """E[value(rank of the user's first positive)] over random order of ties: (users,). value: ranks -> numbers.

    In the first tied group with p positives among g, at ranks a+1..a+g, the first positive comes j-th with probability
    C(g-j, p-1) / C(g, p), here from the survival P(later than j) = prod over i < j of (g-p-i) / (g-i).
    """
    pick = np.flatnonzero((r.label == 1) & (r.positives_above == 0))
    pick = pick[np.unique(r.user[pick], return_index=True)[1]]
    a, g, p = r.above[pick], r.tied[pick], r.positives_tied[pick]
    expected, later = np.zeros(len(pick)), np.ones(len(pick))
    for j in range(1, int((g - p).max(initial=-1)) + 2):
        hit = p / np.maximum(g - j + 1, p)
        expected += later * hit * value(a + j)
        later *= 1 - hit
    out = np.full(len(r.size), np.nan)
    out[r.user[pick]] = expected
    return out


def mrr(r):
    """1 / rank of the user's first positive: (users,); expected value over random order of ties."""
    return first_positive(r, lambda rank: 1 / rank)


def hit(r, k):
    """hit@k: 1 where a positive is at a rank <= k, else 0: (users,); its probability over random order of ties."""
    return first_positive(r, lambda rank: rank <= k)


def lrap(r):
    """Label-ranking average precision: mean over positives i of #positives scoring >= i / #candidates scoring >= i.

    (users,), as scikit-learn's label_ranking_average_precision_score, which takes the last rank of a tied group instead
    of the expected value. The authors' code prints it under the name MRR.
    """
    return mean_by_user(r, (r.positives_above + r.positives_tied) / (r.above + r.tied))


def logloss(scores, labels, users):
    """Mean over a user's samples of -log P(label), P(yes) = 1 / (1 + exp(-score)), score = logit(yes) - logit(no).

    scores, labels, users: as in rank_candidates, which checks them. (users,), in nats; lower is better; log 2 for a
    score of 0. No gap is too large: log(1 + exp(x)) is computed without exp(x).
    """
    user, scores = np.unique(users, return_inverse=True)[1], np.asarray(scores, np.float64)
    return np.bincount(user, np.logaddexp(0, np.where(np.asarray(labels) == 1, -scores, scores))) / np.bincount(user)


METRICS = {
    "group_auc": group_auc,
    "ndcg@1": lambda r: ndcg(r, 1), "ndcg@5": lambda r: ndcg(r, 5), "ndcg@10": lambda r: ndcg(r, 10),
    "mrr": mrr, "lrap": lrap, "recall@1": lambda r: recall(r, 1), "recall@5": lambda r: recall(r, 5),
    "hit@1": lambda r: hit(r, 1), "hit@5": lambda r: hit(r, 5), "hit@10": lambda r: hit(r, 10),
}  # each: Ranks -> value by user; the metric is the mean over the users for whom it is defined
METRIC_NAMES = ["auc", *METRICS, "logloss"]  # the higher the better, but for logloss


def by_user(scores, labels, users, with_logloss=True):
    """{metric: values (users,)} for all metrics but auc, NaN where a user does not count. See rank_candidates."""
    r = rank_candidates(scores, labels, users)
    values = {name: metric(r) for name, metric in METRICS.items()}
    return {**values, "logloss": logloss(scores, labels, users)} if with_logloss else values


def metric(name, scores, labels, users):
    """One of METRIC_NAMES: a float, None where no user defines it. Arguments and errors: rank_candidates."""
    value = np.array([auc(scores, labels)]) if name == "auc" else by_user(scores, labels, users)[name]
    return nanmean(value)


def nanmean(values):
    """Mean without the NaN entries; None where there is nothing else."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None

# --------------------------------------------------------------------------------------------------------- intervals


def bootstrap(scores, labels, users, names, draws=1000, seed=0):
    """Metrics of `draws` resamples of the users: {name: array (draws,)}, NaN where a draw leaves a metric undefined.

    Users are drawn with replacement, all samples of a user together (percentile bootstrap, Efron 1979). Which users are
    drawn depends on seed and number of users only: two models' draws on the same users are paired, and may be
    subtracted. names: some of METRIC_NAMES. Arguments and errors otherwise: rank_candidates.
    """
    values, means = by_user(scores, labels, users), [name for name in names if name != "auc"]
    n, rng = len(values["logloss"]), np.random.default_rng(seed)
    table = np.array([values[name] for name in means]).reshape(-1, n)
    counts, table = ~np.isnan(table), np.nan_to_num(table)
    user, positive = np.unique(users, return_inverse=True)[1], np.asarray(labels) == 1
    tied = np.unique(scores, return_inverse=True)[1]  # samples of equal score have a number, the lowest score 0
    drawn, aucs = np.empty((len(means), draws)), np.empty(draws)
    for draw in range(draws):
        weight = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        with np.errstate(invalid="ignore"):
            drawn[:, draw] = (table @ weight) / (counts @ weight)
            if "auc" in names:  # as in auc(), every sample weighted by how often its user was drawn
                w = weight[user]
                p, q = np.bincount(tied, w * positive), np.bincount(tied, w * ~positive)
                aucs[draw] = p @ (np.cumsum(q) - q / 2) / (p.sum() * q.sum())
    return {name: aucs if name == "auc" else drawn[means.index(name)] for name in names}


def interval(draws, level=0.95):
    """[low, high]: the percentile interval of bootstrap draws (draws,), NaN left out; None where no draw is defined.

    The difference of two models' draws gives the paired test: they differ where its interval excludes 0.
    """
    draws = draws[~np.isnan(draws)]
    return [float(x) for x in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])] if len(draws) else None


def evaluate_scores(scores, labels, users, is_logit=True, draws=1000, seed=0):
    """All metrics with intervals: {auc, ..., "ci": {metric: [low, high]}, "users_counted": {metric: users}}.

    None where a metric or an interval is undefined, so the result is plain JSON. is_logit: scores are differences of
    logits; else logloss is None. The intervals cover the choice of users, not the luck of a training run. Arguments and
    errors otherwise: rank_candidates, bootstrap.
    """
    values = by_user(scores, labels, users, is_logit)
    sampled = bootstrap(scores, labels, users, ["auc", *values], draws, seed)
    result = {**dict.fromkeys(METRIC_NAMES), "auc": nanmean(np.array([auc(scores, labels)]))}
    result.update({name: nanmean(value) for name, value in values.items()})
    result["ci"] = {name: interval(sample) for name, sample in sampled.items()}
    result["users_counted"] = {name: int((~np.isnan(value)).sum()) for name, value in values.items()}
    return result


def reciprocal_rank_average(table, k):
    """RRA@K: how well a training set transfers to the other sets. {source: value in 0..1}, None without a target.

    RRA@K(s) = mean over targets t != s of 1 / rank_t(s) where rank_t(s) <= K, else 0, with rank_t(s) the rank of s
    among the sources other than t by the metric on t. Ties: the expected value over random order. The name is the
    paper's, the formula is our reading. table: {source: {target: metric or None}}, single sources only, of a metric
    where more is better (not logloss); a target with an empty cell (None, or missing) is left out for all sources.
    """
    gain = lambda rank: 1 / rank if rank <= k else 0.0
    targets = list(dict.fromkeys(target for row in table.values() for target in row))
    terms = {source: [] for source in table}
    for target in targets:
        column = {source: row.get(target) for source, row in table.items() if source != target}
        if None in column.values():
            continue
        for source, value in column.items():
            above = sum(other > value for other in column.values())
            tied = sum(other == value for other in column.values())
            terms[source].append(sum(gain(above + i) for i in range(1, tied + 1)) / tied)
    return {source: sum(t) / len(t) if t else None for source, t in terms.items()}

# -------------------------------------------------------------------------------------------- files and command lines

USER = {"user", "history", "candidates", "labels"}  # the keys of a user's line
FORMAT = 1  # version of the standard format: data/<dataset>/{items,train,valid,test}.jsonl and meta.json


class UserError(Exception):
    """Anything the user can mend: one line on standard error, exit code 2."""


def digest(*parts):
    """A 64-bit integer from the parts: blake2b, so the same on every machine, unlike hash()."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def write_atomically(path, text):
    """Write text under a temporary name beside path and rename it: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    """JSON, indented, atomically; NaN is refused with ValueError (it is no JSON)."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """The JSON value of a file. Raises UserError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_meta(data, name):
    """meta.json of a prepared dataset. Raises UserError with the command that prepares it."""
    dataset(name)
    path = Path(data, name, "meta.json")
    if not path.exists():
        what = "demo" if name in DEMO else f"{name} --raw RAW"
        raise UserError(f"dataset {name} is not prepared ({path} is missing); "
                        f"run: python prepare_data.py {what} --out {data} (or is --data wrong?)")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} has format {meta.get('format')}, this version reads {FORMAT}; prepare it again")
    return meta


def read_items(data, name):
    """Texts of a prepared dataset, cut to TEXT_LIMIT characters: {item id: text}, and how many were cut."""
    items = {row["id"]: row["text"] for row in read_lines(Path(data, name, "items.jsonl"))}
    cut = sum(len(text) > TEXT_LIMIT for text in items.values())
    return {key: text[:TEXT_LIMIT] for key, text in items.items()}, cut


def texts_of(user, items):
    """A user's (history texts, candidate texts). Raises UserError where an item has no text."""
    try:
        return [items[i] for i in user["history"]], [items[i] for i in user["candidates"]]
    except KeyError as error:
        raise UserError(f"user {user['user']!r} has item {error}, which items.jsonl lacks; prepare it again") from None


def read_users(data, name, split, limit=None):
    """Iterate over the users of a split in order: {"user", "history" (oldest first), "candidates", "labels"}."""
    path = Path(data, name, f"{split}.jsonl")
    if not path.exists():
        raise UserError(f"dataset {name} has no {split} split ({path} is missing); "
                        "prepare it with --test-size or --train-size")

    def users():
        for number, user in enumerate(read_lines(path), 1):
            if not USER <= user.keys() or not 0 < len(user["candidates"]) == len(user["labels"]):
                raise UserError(f"{path}, line {number}: a user has {', '.join(sorted(USER))}, as many labels as "
                                "candidates and at least one")
            yield user
    return islice(users(), limit)


def read_lines(path, mend="prepare the dataset again"):
    """Yield the JSON values of a .jsonl file. Raises UserError, with what to do, where it is missing or broken."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing; {mend}")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number}: not JSON; {mend}") from None


def read_run(folder, model=None, kind=None):
    """run.json of a finished finetune.py run, {} for no folder. Raises UserError where model or type are other ones."""
    if not folder:
        return {}
    if not Path(folder, "run.json").exists():
        raise UserError(f"{folder} holds no fine-tuned adapter (run.json is missing)")
    run = read_json(Path(folder, "run.json"))
    if not run.get("finished"):
        raise UserError(f"{folder} is unfinished: run its finetune.py command again to finish it")
    if not model:
        return run
    prints = run.get("arguments", {}).get("model_fingerprint"), fingerprint(model)
    same = prints[0] == prints[1] if all(prints) else run["model"] == MODELS.get(model, model)  # a folder may move
    if not same or run["type"] != kind:
        now = "" if same or run["model"] != model else ", whose files have changed"
        raise UserError(f"{folder} is an adapter for --model {run['model']} --type {run['type']}, "
                        f"not for --model {MODELS.get(model, model)} --type {kind}{now}")
    return run


def fingerprint(folder):
    """A hash of a local model's or adapter's files (names, sizes, 16 MB out of each); None where there are none."""
    kinds = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json",
             "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "chat_template*", "*.py")
    parts = []
    for path in sorted({path for kind in kinds for path in Path(folder).glob(kind)} if folder else ()):
        size, content = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            for start in range(0, size, max(1 << 20, size // 16)):
                file.seek(start)
                content.update(file.read(1 << 20))
        parts += [path.name, size, content.hexdigest()]
    return f"{digest(*parts):016x}" if parts else None


def versions():
    """The versions that a result was made with."""
    from importlib.metadata import version
    packages = ("torch", "transformers", "peft", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}


def peak_memory_gb(device):
    """Peak memory in GB: on a GPU since the model was loaded, else resident memory of this process since its start."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def markdown_table(rows):
    """A Markdown table of rows of str; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return "\n".join([head, re.sub("[^|]", "-", head), *lines])


def say(message):
    """A line for the person at the terminal, on standard error, beside progress bars; from torchrun's first process."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


def shared_arguments(parser):
    """The flags that finetune.py, evaluate.py and transfer_matrix.py share, by name and meaning."""
    add = parser.add_argument_group("shared flags").add_argument
    add("--data", default="data", metavar="DIR", help="folder that prepare_data.py wrote (its --out)")
    add("--type", choices=["prompt", "embed"], default="prompt",
        help="score by the Yes/No logits of a prompt or by the cosine of embeddings")
    add("--prompt", metavar="FILE", help="JSON file with wording of your own; keys as in PROMPT in common.py")
    add("--chat-template", action="store_true", help="wrap prompts by the tokenizer's chat template")
    add("--pooling", choices=["auto", "last", "mean"], default="auto",
        help="embedding of a text: its last token (auto: decoder-only models) or the mean over tokens (auto: others)")
    add("--seed", type=whole, metavar="N", default=2025, help="seed of everything random")
    add("--device", help="cpu, cuda, cuda:1, ...; CUDA where there is one if not given")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16", "float64"], default="auto",
        help="of the model's weights; auto: bfloat16 on CUDA, float32 elsewhere")
    add("--max-length", type=positive, metavar="TOKENS", default=1024,
        help="of a prompt, at most; histories are cut to it, oldest items first")
    add("--max-tokens", type=positive, metavar="TOKENS", help="of a forward pass; lower it if memory runs out "
        "(if not given: 8192, on a CPU 1024, where more would leave its cache)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model from the hub")
    add("--overwrite", action="store_true", help="replace outputs made with other arguments")


def folder(text):
    """A path to write a folder to, for argparse."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; it takes a folder")
    return text


def whole(text, least=0):
    """An int from `least` on, below 2**31, for argparse."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} (and below 2**31)")
    return int(text)


def positive(text):
    """An int of at least 1, for argparse."""
    return whole(text, 1)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (UserError) and whose help is the script's docstring, the flags, defaults."""

    class Help(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            silent = action.default in (None, False, argparse.SUPPRESS)
            return action.help + ("" if silent else " (default: %(default)s)")

    def __init__(self, doc, script=None):
        super().__init__(prog=script, description=doc, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{self.prog}: {message} (see --help)")


def run(main, argv=None):
    """Call a script's main and return its exit code: 0, 2 with one line on standard error, 130 after Ctrl-C."""
    try:
        return main(argv) or 0
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, a file-size limit, a folder that cannot be written
        message = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: lower --max-tokens"
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command, without --overwrite, to continue", file=sys.stderr)
        return 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
