"""RecBench-MD in one module: how well do foundation models recommend? (arXiv 2508.21354)

A worked sample. A user's history holds two items, and one candidate is asked about. The model reads this prompt:

    A user liked these items, oldest first:
    1. rocket orbit comet report
    2. galaxy and lunar : gravity news

    Would the user also like this item? Answer with Yes or No.
    telescope nebula after planet
    Answer:

and gives a logit to every token that might come next, say 2.1 to " Yes" and 1.4 to " No". The candidate's score is the
difference, 0.7. Another candidate of this user, about football, gets -0.2. The user liked the first (label 1) and not
the second (label 0): the positive ranks above the negative, so this user's AUC is 1.

That is prompt-based scoring. Embedding-based scoring needs no answer: the history is one text, the candidate another,
and the score is the cosine of their embeddings.

In reading order: datasets and settings, prompts, prompt scoring, embedding scoring, metrics, intervals and RRA@K. That
is the method. What follows is plumbing: loading models, files and flags. Section numbers are the paper's.
"""
import argparse
import bisect
import hashlib
import json
import logging
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """Anything that the user can fix: printed as one line on standard error, exit code 2."""

# ------------------------------------------------------------------------------------------- datasets and settings


class Dataset(NamedTuple):
    domain: str
    test: bool  # one of the paper's ten test sets
    finetune: bool  # one of the paper's ten fine-tune sets
    kind: str  # impressions, ratings, sequences: how candidates are chosen, see prepare_data.py
    positives: int  # candidates per user, at most
    negatives: int


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
DEMO = {  # domains of the datasets that `prepare_data.py demo` makes, no download
    "news-a": "news", "news-b": "news", "books-a": "book", "books-b": "book", "shop": "shop",
}
DOMAINS = {**{name: row.domain for name, row in DATASETS.items()}, **DEMO}
SETTINGS = {
    "A/B": "zero-shot (A: one dataset by itself, B: over several; the scores are the same)",
    "C": "single-domain single-dataset: the target alone",
    "D": "single-domain cross-dataset: the target's domain without the target",
    "E": "single-domain multi-dataset: the target's domain with the target",
    "F": "cross-domain cross-dataset: one other domain",
    "G": "multi-domain multi-dataset, without the target",
    "H": "multi-domain multi-dataset, with the target",
}


def setting_of(train, target, domains=DOMAINS):
    """The letter of the setting in which a model trained on the datasets `train` is tested on `target` (section 4).

    domains: {dataset: domain}. The paper states B, C, E, F and H; A, D and G follow from the pattern.
    """
    trained_domains = {domains[name] for name in train}
    if not train:
        return "A/B"
    if set(train) == {target}:
        return "C"
    if trained_domains == {domains[target]}:
        return "E" if target in train else "D"
    if target in train:
        return "H"
    if len(trained_domains) == 1:
        return "F"
    return "G"

# -------------------------------------------------------------------------------------------------------- prompts

# The wording; --prompt FILE.json replaces any of these. What all candidates of a user share comes first, so that it
# can be computed once.
PROMPT = {
    "item": "{n}. {text}",  # one item of the history
    "join": "\n",  # between two of them
    "prompt": "A user liked these items, oldest first:\n{history}\n\n"
              "Would the user also like this item? Answer with Yes or No.\n{candidate}\nAnswer:",
    "user": "A user liked these items, oldest first:\n{history}",  # the two texts of embedding-based scoring
    "candidate": "{candidate}",
    "answers": [" Yes", " No"],
    "special_tokens": True,  # the tokenizer adds its own, such as BOS
}
SLOTS = [("item", "{text}"), ("prompt", "{history}"), ("prompt", "{candidate}"), ("user", "{history}"),
         ("candidate", "{candidate}")]  # what each template must hold
TEXT_LIMIT = 512  # characters of an item text that are used


def load_prompt(path=None):
    """PROMPT with the entries of the JSON file at `path` in place of its own. Raises UserError on a wrong entry."""
    changes = read_json(path) if path else {}
    for key, value in changes.items():
        if type(value) is not type(PROMPT.get(key)):
            raise UserError(f"{path}: {key!r} is no entry, or not of the type, of {json.dumps(PROMPT)}")
    prompt = {**PROMPT, **changes}
    for key, slot in SLOTS:
        if slot not in prompt[key]:
            raise UserError(f"{path}: {key!r} lacks {slot}")
    return prompt


def with_texts(user, items):
    """A user of read_dataset with item texts, cut to TEXT_LIMIT characters, in place of item ids: what is scored.

    {"user": name, "history": [texts, oldest first], "candidates": [texts], "labels": [0 or 1]}
    """
    history = [items[item][:TEXT_LIMIT] for item in user["history"]]
    candidates = [items[item][:TEXT_LIMIT] for item in user["candidates"]]
    return {**user, "history": history, "candidates": candidates}


def fill(template, **values):
    """The template with each {name} replaced by its value, in one pass: braces inside a value stay as they are."""
    def value_of(match):
        return str(values.get(match[1], match[0]))
    return re.sub(r"\{(\w+)\}", value_of, template)


def history_text(prompt, history):
    """The history (item texts, oldest first) as numbered lines."""
    lines = [fill(prompt["item"], n=n, text=text) for n, text in enumerate(history, 1)]
    return prompt["join"].join(lines)


def candidate_prompts(prompt, history, candidates):
    """The prompts of one user, one per candidate: each shows the whole history and one candidate (section 3)."""
    shared = history_text(prompt, history)
    return [fill(prompt["prompt"], history=shared, candidate=text) for text in candidates]


def render_chat(tokenizer, text, user):
    """The text as a message in the tokenizer's chat template, up to the assistant's answer: (text, " " or "").

    The second value is the space with which the answer begins: tokenizers join it to the word after it. What stands
    before an answer is taken from a rendered answer, since some templates' generation prompt lacks the line break after
    its tag (GLM-4). Where a rendered answer lacks what the generation prompt opens, such as an empty thought, the
    generation prompt counts. Raises UserError, naming the user, where the template changes the text.
    """
    answer = "an-answer-to-cut-off"  # no template writes this
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    generation_prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    before, _, _ = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    if not before.startswith(generation_prompt.rstrip(" ")):
        before = generation_prompt
    if text.strip() not in before:
        raise UserError(f"--chat-template: the template changes the prompt of user {user}")
    return before.rstrip(" "), " " if before.endswith(" ") else ""


def answer_tokens(tokenizer, prompt, family, chat_template=False):
    """[yes, no]: the token ids of the prompt's two answers.

    An answer's token is the last one of tokens(prompt + word), and those before it must be tokens(prompt). At a mask or
    in a decoder of its own nothing precedes it. Raises UserError where a word is not one token, or both are the same.
    """
    context, words = "", prompt["answers"]
    if family == "causal":
        context = candidate_prompts(prompt, ["x"], ["x"])[0]
    if chat_template:
        context, space = render_chat(tokenizer, context, "x")
        words = [space + word.strip() for word in words]
        say(f"--chat-template: the answer follows {context[-40:]!r}")
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    tokens = []
    for word in words:
        after = tokenizer(context + word, add_special_tokens=False)["input_ids"]
        if after[:-1] != before or after[-1] == tokenizer.unk_token_id or after[-1] in tokens:
            ends = [tokenizer.convert_ids_to_tokens(ids[-4:]) for ids in (before, after)]
            raise UserError(f"the answer {word!r} is not one token of its own: the prompt ends in {ends[0]}, with it in "
                            f'{ends[1]}; choose other "answers" with --prompt')
        tokens.append(after[-1])
    return tokens

# ------------------------------------------------------------------------------------------------- prompt scoring

# In the order in which data flows: texts -> token ids -> rows -> batches -> arrays and mask -> logits at the answers ->
# scores. All prompts of a user begin with the same history. Two layouts compute it once: "packed" puts a user's prompts
# into one row, "cached" lets them continue one prefix cache.


class Scorer(NamedTuple):
    """A model, ready to score. Users, here and below, are those that with_texts gives."""
    name: str  # hub id or folder
    model: torch.nn.Module
    tokenizer: object
    type: str  # "prompt" or "embed"
    family: str  # "causal", "masked" or "seq2seq": see family_of
    layout: str  # "packed", "cached", "padded" or "equal": see layout_of
    prompt: dict  # the wording: see PROMPT
    chat_template: bool
    answers: list  # [yes, no]: their columns of the logits
    pooling: str  # "last", "mean" or "cls"; of no use for prompts
    dense: torch.nn.Module  # the layers after pooling; most models have none
    lower_case: bool  # whether texts to embed are lower-cased
    limit: int  # tokens per text, at most
    max_tokens: int  # tokens per forward pass, at most
    pad: int  # token id of padding; no token sees it


class Row(NamedTuple):
    """A row of a batch: suffixes (token ids) that each continue the prefix (token ids); one suffix where unshared."""
    prefix: list
    suffixes: list
    indices: list  # per suffix: the number of its text, counted over all users of a call


def user_texts(scorer, user, history):
    """The texts that hold a user's history: one prompt per candidate or, to embed, the history alone."""
    if scorer.type == "embed":
        return [fill(scorer.prompt["user"], history=history_text(scorer.prompt, history))]
    texts = candidate_prompts(scorer.prompt, history, user["candidates"])
    mask = scorer.tokenizer.mask_token
    if scorer.family == "masked" and mask not in scorer.prompt["prompt"]:  # wording without a place for the answer
        texts = [text + mask for text in texts]
    if scorer.chat_template:
        texts = [render_chat(scorer.tokenizer, text, user["user"])[0] for text in texts]
    return texts


def encode(scorer, texts):
    """Token ids of texts, each tokenised whole."""
    tokenizer = scorer.tokenizer
    special_tokens = scorer.prompt["special_tokens"] and not scorer.chat_template  # a template has written them
    if scorer.lower_case:
        texts = [text.lower() for text in texts]
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
    if special_tokens and scorer.type == "prompt" and scorer.family == "causal":
        bare = tokenizer("yes", add_special_tokens=False)["input_ids"]
        if tokenizer("yes")["input_ids"][-1] != bare[-1]:  # it appends EOS or SEP, where the answer has to come
            ids = [tokens[:-1] for tokens in ids]
    # an item without text, a tokenizer without BOS: there must be a state to read
    return [tokens or [tokenizer.eos_token_id or 0] for tokens in ids]


def encode_user(scorer, user):
    """(token ids of the user's texts, how many of the oldest items were dropped so that the longest text fits).

    All texts of a user are cut alike, so they still share their history. Raises UserError where one item is too long.
    """
    def encode_without(dropped):
        return encode(scorer, user_texts(scorer, user, user["history"][dropped:]))

    def fits(dropped):
        return max(map(len, encode_without(dropped))) <= scorer.limit

    ids = encode_without(0)
    if max(map(len, ids)) <= scorer.limit:
        return ids, 0
    most = max(0, len(user["history"]) - 1)  # one item stays
    if not fits(most):
        raise UserError(f"user {user['user']}: more than {scorer.limit} tokens with no more than one item of history: "
                        "raise --max-length, if the model allows it, or shorten the prompt")
    dropped = bisect.bisect_left(range(most), True, key=fits)  # lengths only fall with every item dropped
    return encode_without(dropped), dropped


def common_prefix(ids):
    """Number of tokens that all texts start with. One token of each is left, where its answer is read."""
    shortest = min(map(len, ids))
    for n in range(shortest):
        if len({tokens[n] for tokens in ids}) > 1:
            return n
    return shortest - 1  # the shortest is a beginning of all the others


def row_length(row):
    """Tokens of a row."""
    return len(row.prefix) + sum(map(len, row.suffixes))


def indices_of(rows):
    """The indices of the scores that the rows give, in the order of their suffixes."""
    indices = []
    for row in rows:
        indices += row.indices
    return indices


def rows_of(scorer, per_user):
    """The texts of several users as rows [prefix | suffix 1 | suffix 2 | ...] of at most max_tokens.

    per_user: per user the texts, per text the token ids. A row holds one suffix at least, and only one in the layouts
    that do not share. Each text was tokenised whole, so the result is that of separate texts, for any tokenizer.
    """
    shares = scorer.layout in ("packed", "cached")
    rows, index = [], 0
    for ids in per_user:
        shared = common_prefix(ids)
        row = None  # the next suffix starts a row
        for tokens in ids:
            suffix = tokens[shared:]
            if row is None or not shares or row_length(row) + len(suffix) > scorer.max_tokens:
                row = Row(tokens[:shared], [], [])
                rows.append(row)
            row.suffixes.append(suffix)
            row.indices.append(index)
            index += 1
    return rows


def fill_batches(scorer, rows):
    """The rows in batches, longest first, of at most max_tokens with their padding (one row at least).

    A batch also ends where lengths fall below two thirds of its longest, so that little is spent on padding; in the
    layout "equal" where the length changes. In the layout "cached" a row is a batch: its suffixes fill it.
    """
    shortest_share = {"equal": 1.0, "cached": math.inf}.get(scorer.layout, 2 / 3)
    batches, batch, longest = [], [], 0
    for row in sorted(rows, key=row_length, reverse=True):
        too_many = (len(batch) + 1) * longest > scorer.max_tokens
        if not batch or too_many or row_length(row) < shortest_share * longest:
            batch, longest = [], row_length(row)
            batches.append(batch)
        batch.append(row)
    return batches


def lay_out(rows, pad):
    """Rows as arrays (rows, longest): token ids, positions, segments; and where suffixes end, (suffixes, 2).

    A suffix ends at the (row, column) of its last token. Segments: 0 for the prefix, 1, 2, ... for the suffixes, -1 for
    padding. Positions restart after the prefix in every suffix, as if it alone followed the prefix.
    """
    shape = len(rows), max(map(row_length, rows))
    ids = np.full(shape, pad)
    positions = np.zeros(shape, int)
    segments = np.full(shape, -1)
    last = []
    for r, row in enumerate(rows):
        start = 0
        for number, tokens in enumerate([row.prefix, *row.suffixes]):
            end = start + len(tokens)
            position = len(row.prefix) if number > 0 else 0
            ids[r, start:end] = tokens
            positions[r, start:end] = np.arange(position, position + len(tokens))
            segments[r, start:end] = number
            if number > 0:
                last.append((r, end - 1))
            start = end
    return ids, positions, segments, np.array(last)


def packed_mask(segments, positions, window=None, chunk=None):
    """Who sees whom in packed rows: a boolean tensor (rows, 1, length, length) from segments and positions, as lay_out's.

    A token sees itself and what stands before it in the prefix and in its own suffix, nothing of the other suffixes:

        prefix a b, suffixes c d and e f     a b c d e f
                                          a  1 . . . . .
                                          b  1 1 . . . .
                                          c  1 1 1 . . .        each suffix computes exactly what it would
                                          d  1 1 1 1 . .        compute in a prompt of its own, since its
                                          e  1 1 . . 1 .        positions, too, continue the prefix
                                          f  . 1 . . 1 1        <- with a window of 3: f is at position 3, a at 0

    window, chunk: a model's own limits on attention, by position, as in separate prompts.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    visible = (key == 0) | (key == query)  # padding sees the prefix, since a softmax over nothing is NaN
    query, key = positions[:, :, None], positions[:, None, :]
    if window:
        visible &= query - key < window
    if chunk:
        visible &= query // chunk == key // chunk
    return visible.tril()[:, None]


def packed_masks(model, segments, positions):
    """packed_mask as the model takes it: added to attention scores; a dict where its layers differ in kind."""
    config, dtype = model.config.get_text_config(), model.dtype
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    limits = {"sliding_attention": (window, None), "chunked_attention": (None, chunk)}
    layer_types = getattr(config, "layer_types", None)
    masks = {}
    for kind in set(layer_types or ["sliding_attention"]):
        blocked = ~packed_mask(segments, positions, *limits.get(kind, ()))
        masks[kind] = blocked.to(dtype) * torch.finfo(dtype).min  # eager attention takes no boolean mask
    return masks if layer_types else masks["sliding_attention"]


def model_inputs(scorer, rows):
    """What a model is given for a batch, and where suffixes end (see lay_out): there a decoder-only model answers."""
    prefix = []
    if scorer.layout == "cached":  # the batch is one row: its suffixes become the rows
        prefix, suffixes, _ = rows[0]
        rows = [Row([], [suffix], []) for suffix in suffixes]
    device = scorer.model.device
    ids, positions, segments, last = lay_out(rows, scorer.pad)
    segments = torch.tensor(segments, device=device)
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": (segments >= 0).long()}
    if scorer.layout == "packed":
        inputs["position_ids"] = torch.tensor(positions, device=device)
        inputs["attention_mask"] = packed_masks(scorer.model, segments, inputs["position_ids"])
    if prefix:
        inputs["past_key_values"] = prefix_cache(scorer, prefix, len(rows))
        inputs["use_cache"] = True
        sees_prefix = torch.ones(len(rows), len(prefix), dtype=torch.long, device=device)
        inputs["attention_mask"] = torch.cat([sees_prefix, inputs["attention_mask"]], dim=1)
    return inputs, last


def prefix_cache(scorer, prefix, copies):
    """The model's cache after the prefix (token ids), computed once and repeated for as many suffixes."""
    ids = torch.tensor([prefix], device=scorer.model.device)
    cache = scorer.model(input_ids=ids, use_cache=True).past_key_values
    cache.reorder_cache(torch.zeros(copies, dtype=torch.long, device=ids.device))
    return cache


def score_rows(scorer, rows):
    """logit(yes) - logit(no) of every suffix of the rows, in order: a float64 tensor (suffixes,), with gradient."""
    inputs, answers = model_inputs(scorer, rows)
    if scorer.family == "masked":  # the answer is read at the last mask token of each row
        is_mask = inputs["input_ids"] == scorer.tokenizer.mask_token_id
        columns = torch.arange(is_mask.shape[1], device=is_mask.device)
        answers[:, 1] = (is_mask * columns).amax(1).cpu()
    if scorer.family == "seq2seq":  # at the first decoder position
        start = scorer.model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(rows), 1), start, device=scorer.model.device)
        answers[:, 1] = 0
    logits = scorer.model(**inputs).logits  # (rows, length, 2), since the LM head has been cut: see cut_head
    logits = logits[answers[:, 0], answers[:, 1]].double()
    yes, no = scorer.answers
    return logits[:, yes] - logits[:, no]


def in_batches(scorer, rows, forward):
    """What forward, score_rows or embed_rows, gives for all rows: a tensor, each score or embedding at its index."""
    results, indices = [], []
    for batch in fill_batches(scorer, rows):
        results.append(forward(scorer, batch))
        indices += indices_of(batch)
    return torch.cat(results)[np.argsort(indices)]  # undo the order of the batches


def score_prompts(scorer, users):
    """Prompt-based scores of users: ([float64 (candidates,) per user], cost).

    cost: tokens_scored, tokens_unshared (in separate prompts), dropped (history items per user, to fit).
    """
    per_user, distinct, dropped = [], [], []
    for user in users:
        ids, cut = encode_user(scorer, user)
        ids = list(map(tuple, ids))
        per_user.append(ids)
        distinct.append(list(dict.fromkeys(ids)))  # equal prompts run once, so that rounding cannot tell them apart
        dropped.append(cut)
    rows = rows_of(scorer, distinct)
    with torch.no_grad():
        scores = in_batches(scorer, rows, score_rows).cpu().numpy()
    all_scores, start = [], 0
    for ids, once in zip(per_user, distinct):
        score_of = dict(zip(once, scores[start:]))
        all_scores.append(np.array([score_of[tokens] for tokens in ids]))
        start += len(once)
    tokens_unshared = sum(len(tokens) for ids in per_user for tokens in ids)
    cost = {"tokens_scored": sum(map(row_length, rows)), "tokens_unshared": tokens_unshared, "dropped": dropped}
    return all_scores, cost

# ----------------------------------------------------------------------------------------------- embedding scoring


def embed_rows(scorer, rows):
    """Embeddings of rows of one text each: a float64 tensor (rows, width), each of length 1, with gradient.

    Pooling takes the state of the first token ("cls"), of the last one, or the mean over tokens; never of padding.
    """
    inputs, last = model_inputs(scorer, rows)
    states = scorer.model(**inputs).last_hidden_state.double()  # (rows, length, width)
    if scorer.pooling == "cls":
        pooled = states[:, 0]
    elif scorer.pooling == "last":
        pooled = states[last[:, 0], last[:, 1]]
    else:
        mask = inputs["attention_mask"][:, :, None].to(states.device)
        pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(scorer.dense(pooled))


def embed(scorer, ids):
    """Embeddings of texts (token ids), in their order: as embed_rows."""
    rows = rows_of(scorer, [ids])  # as of one user: unshared, a row is its text, whatever prefix is found
    return in_batches(scorer, rows, embed_rows)


def encode_items(scorer, texts):
    """Token ids of item texts. Raises UserError where one is longer than scorer.limit."""
    ids = encode(scorer, [fill(scorer.prompt["candidate"], candidate=text) for text in texts])
    for text, tokens in zip(texts, ids):
        if len(tokens) > scorer.limit:
            raise UserError(f"the item text {text[:40]!r}... has {len(tokens)} tokens, but at most {scorer.limit} fit: "
                            "raise --max-length, if the model allows it")
    return ids


def score_embeddings(scorer, users, embeddings):
    """Embedding-based scores of users, cosine(history, candidate); returns as score_prompts.

    embeddings: {item text: its embedding}, filled here, so that an item is encoded once over all calls; it takes 8
    bytes times the width per distinct item (20,000 items of width 4,096: 0.7 GB).
    """
    ids, dropped, new = [], [], {}
    for user in users:
        history_ids, cut = encode_user(scorer, user)
        ids += history_ids  # of one text
        dropped.append(cut)
        for text in user["candidates"]:
            if text not in embeddings:
                new[text] = None  # a dict, as a set in order
    ids += encode_items(scorer, list(new))
    with torch.no_grad():
        vectors = embed(scorer, ids).cpu().numpy()
    embeddings.update(zip(new, vectors[len(users):].copy()))  # a view would keep the users' in memory
    scores = []
    for user, vector in zip(users, vectors):
        cosines = [vector @ embeddings[text] for text in user["candidates"]]
        scores.append(np.array(cosines))
    tokens = sum(map(len, ids))
    return scores, {"tokens_scored": tokens, "tokens_unshared": tokens, "dropped": dropped}


def scores_of(scorer, users, embeddings):
    """Scores of users by the scorer's type: as score_prompts or, with embeddings, score_embeddings."""
    if scorer.type == "embed":
        return score_embeddings(scorer, users, embeddings)
    return score_prompts(scorer, users)

# --------------------------------------------------------------------------------------------------------- metrics

# Each is a function of ONE user's scores (higher is better) and labels (0 or 1), at least one of them 1: float and int
# arrays (candidates,). The result is the mean over such users; "group_auc" is the mean of auc over those who have a
# negative, too. Only the metric "auc" is no mean: it is auc of the samples of all users at once (see weighted_auc).
# Where scores tie, all but lrap are the expected value over random order of the tied ones (McSherry & Najork 2008), so
# a constant scorer gets chance level and never the luck of the sort.


def auc(scores, labels):
    """Area under the ROC curve: P(a positive scores above a negative) + 1/2 P(they tie). NaN with one class only."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    if not len(positives) or not len(negatives):
        return math.nan
    wins = 0.0
    for score in positives:
        wins += (score > negatives).sum() + 0.5 * (score == negatives).sum()
    return wins / (len(positives) * len(negatives))


def ranks_of(score, scores):
    """The ranks at which a score may stand among scores, each equally likely: several where it ties."""
    above = (scores > score).sum()
    tied = (scores == score).sum()
    return np.arange(above + 1, above + tied + 1)


def discount(ranks, k):
    """1 / log2(rank + 1) of ranks up to k, 0 beyond."""
    return (ranks <= k) / np.log2(ranks + 1)


def ndcg(scores, labels, k):
    """nDCG@k: the discounted gain of the positives' ranks, as a share of the best that there is."""
    gain = 0.0
    for score, count in zip(*np.unique(scores[labels == 1], return_counts=True)):
        gain += count * discount(ranks_of(score, scores), k).mean()
    best = discount(np.arange(1, labels.sum() + 1), k).sum()
    return gain / best


def first_positive(scores, labels):
    """(ranks, probabilities): where the first positive may stand under random order of ties.

    With p positives among the g candidates that tie at the top positive's score, the first positive comes j-th among
    them with probability C(g - j, p - 1) / C(g, p): p / g for j = 1, then times (g - j - p + 1) / (g - j) for each next.
    """
    top = scores[labels == 1].max()
    ranks = ranks_of(top, scores)
    g, p = len(ranks), int(labels[scores == top].sum())
    j = np.arange(1, g - p + 1)  # at the latest, all other candidates come before
    ratios = (g - j - p + 1) / (g - j)
    return ranks[:g - p + 1], p / g * np.cumprod([1, *ratios])


def mrr(scores, labels):
    """1 / rank of the first positive."""
    ranks, chances = first_positive(scores, labels)
    return (chances / ranks).sum()


def hit(scores, labels, k):
    """1 where a positive is at a rank up to k, else 0."""
    ranks, chances = first_positive(scores, labels)
    return chances[ranks <= k].sum()


def lrap(scores, labels):
    """Label-ranking average precision: the mean over positives of the share of positives among what scores as high.

    As scikit-learn's, pessimistic where scores tie.
    """
    precisions = []
    for score in scores[labels == 1]:
        as_high = scores >= score
        precisions.append(labels[as_high].sum() / as_high.sum())
    return np.mean(precisions)


# group_auc is GAUC in the authors' code, lrap MRR
METRIC_NAMES = ["auc", "group_auc", "ndcg@1", "ndcg@5", "ndcg@10", "mrr", "lrap", "hit@1", "hit@5", "hit@10"]
USER_METRICS = {"group_auc": auc, "ndcg": ndcg, "mrr": mrr, "lrap": lrap, "hit": hit}


def user_metric(name, scores, labels):
    """One of METRIC_NAMES of one user; not "auc", which is over the samples of all users: see weighted_auc."""
    if not labels.any():
        return math.nan
    kind, _, k = name.partition("@")
    metric = USER_METRICS[kind]
    return metric(scores, labels, int(k)) if k else metric(scores, labels)

# ----------------------------------------------------------------------------------------- intervals and RRA@K

FEWEST_USERS = 10  # of fewer, a bootstrap says too little: no interval


def bootstrap(name, users, draws=1000, seed=0):
    """A metric over users, [(scores, labels)], then over `draws` resamples of them: an array (1 + draws,).

    NaN where undefined, and for all resamples where fewer than FEWEST_USERS count. Users are drawn with replacement, all
    samples of a user together (percentile bootstrap, Efron 1979). Which are drawn depends on the seed and the number of
    users alone: the arrays of two models on the same users are paired, and may be subtracted. Raises UserError where a
    score is NaN or infinite.
    """
    scores = np.concatenate([scores for scores, _ in users])
    bad = (~np.isfinite(scores)).sum()
    if bad:
        raise UserError(f"{bad} of {len(scores)} scores are NaN or infinite: try another --dtype")
    if name == "auc":
        statistic, values = weighted_auc, all_samples(users)
    else:
        statistic, values = weighted_mean, np.array([user_metric(name, *user) for user in users])
    n = len(users)
    result = np.full(1 + draws, math.nan)
    result[0] = statistic(values, np.ones(n, int))  # each user once
    if users_counted(name, users) < FEWEST_USERS:
        return result
    rng = np.random.default_rng(seed)
    for draw in range(1, 1 + draws):
        drawn = rng.integers(n, size=n)
        # how often each user was drawn is all that a metric needs: no sample is copied
        result[draw] = statistic(values, np.bincount(drawn, minlength=n))
    return result


def users_counted(name, users):
    """How many of the users, [(scores, labels)], a metric counts: see the comment on metrics."""
    if name == "auc":
        return len(users)
    with_positive = [labels for _, labels in users if labels.any()]
    return sum(name != "group_auc" or not labels.all() for labels in with_positive)


def weighted_mean(values, times):
    """The mean of values (users,) without NaN entries, each user counted so many times; NaN where none counts."""
    counted = ~np.isnan(values)
    total = times[counted].sum()
    if not total:
        return math.nan
    return values[counted] @ times[counted] / total


def all_samples(users):
    """(user, label, level) of the samples of all users: arrays (samples,); level 0 is the lowest score, 1 the next."""
    user = np.repeat(np.arange(len(users)), [len(scores) for scores, _ in users])
    label = np.concatenate([labels for _, labels in users])
    _, level = np.unique(np.concatenate([scores for scores, _ in users]), return_inverse=True)
    return user, label, level


def weighted_auc(samples, times):
    """AUC over all samples, each counted as often as its user, times (users,): the sums of auc, level by level."""
    user, label, level = samples
    positives = np.bincount(level, times[user] * label)
    negatives = np.bincount(level, times[user] * (1 - label))
    pairs = positives.sum() * negatives.sum()
    if not pairs:
        return math.nan
    below = np.cumsum(negatives) - negatives
    return positives @ (below + negatives / 2) / pairs


def mean_metric(name, users):
    """One of METRIC_NAMES over users, [(scores, labels)]: a float, NaN where it is undefined for all."""
    return float(bootstrap(name, users, draws=0)[0])


def estimate(values):
    """{"value": float, "ci": [low, high] or None} of what bootstrap returns; None where the metric is undefined.

    The 95% percentile interval leaves out draws without a value. Given the difference of two models' arrays, it is
    paired: the models differ where it excludes 0. It covers the choice of users, not the luck of a training run.
    """
    if math.isnan(values[0]):
        return None
    draws = values[1:][~np.isnan(values[1:])]
    interval = np.quantile(draws, [0.025, 0.975]).tolist() if len(draws) else None
    return {"value": float(values[0]), "ci": interval}


def evaluate_users(users, draws=1000, seed=0):
    """All metrics of users, [(scores, labels)]: {metric: value, "ci": {metric: [low, high]}, "users_counted": {...}}.

    None where a metric or interval is undefined, so the result is plain JSON.
    """
    result = {"ci": {}, "users_counted": {}}
    for name in METRIC_NAMES:
        found = estimate(bootstrap(name, users, draws, seed)) or {"value": None, "ci": None}
        result[name], result["ci"][name] = found["value"], found["ci"]
        result["users_counted"][name] = users_counted(name, users)
    return result


def reciprocal_rank_average(table, k):
    """RRA@K: how well a training set transfers to other sets. {source: value in 0..1}, None without a target.

    RRA@K(s) = mean over targets t != s of 1 / rank_t(s) where rank_t(s) <= K, else 0; rank_t(s) is the rank of s among
    the sources other than t by the metric on t. Ties: the expected value over random order. The name is the paper's,
    the formula is our reading. It ranks sources and knows nothing of harm: the first of two that both fall below
    zero-shot still gets 1. table: {source: {target: metric or None}}, single sources only; a target with an empty cell
    is left out for all sources.
    """
    targets = {}
    for cells in table.values():
        targets.update(cells)
    terms = {source: [] for source in table}
    for target in targets:
        column = {source: cells.get(target) for source, cells in table.items() if source != target}
        if None in column.values():
            continue
        values = np.array(list(column.values()))
        for source, value in column.items():
            ranks = ranks_of(value, values)
            terms[source].append(np.mean((ranks <= k) / ranks))
    return {source: float(np.mean(found)) if found else None for source, found in terms.items()}

# ------------------------------------------------------------------------------------------------- loading models

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
    "sentence-bert": "efederici/sentence-bert-base", "sentence-t5": "sentence-transformers/sentence-t5-base",
}
AUTO_CLASSES = {  # by family: the class of transformers that brings the LM head, and the one without it
    "causal": ("AutoModelForCausalLM", "AutoModel"),
    "masked": ("AutoModelForMaskedLM", "AutoModel"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "AutoModelForTextEncoding"),
}
# How texts may share a forward pass, by config.model_type; tests/test_architectures.py proves each entry and tells
# whether another type may be added. A type in none of the lists runs in batches of one length, right for any model.
PACKED = """
afmoe apertus arcee aria_text axk1 axk2 beam biogpt bitnet codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl
cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo
flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text git glm
glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite
granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4_text longcat_flash mellum mimo_v2_flash
minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moss_transcribe_diarize
nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe
seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xglm youtu
""".split()
CACHED = """
bailing_hybrid bloom deepseek_v4 falcon falcon_h1 gpt_neo granitemoehybrid inkling2_text inkling_text kimi_linear lfm2
lfm2_moe lfm3 mpt nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text zamba2 zaya
""".split()
PADDED = """
albert audioflamingo3 bamba bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
data2vec-text deberta deberta-v2 distilbert electra ernie esm esmc eurobert falcon_mamba glmasr granite_speech
granite_speech_plus gte jamba jina_embeddings_v3 layoutlm longformer longt5 luke m2m_100 mamba mamba2 marian mbart
megatron-bert minimax mobilebert modernbert modernvbert moshi mpnet mra mt5 musicflamingo mvp neomme nllb-moe nomic_bert
openai-gpt pegasus pegasus_x plbart qwen2_audio qwen3_asr recurrent_gemma rembert roberta roberta-prelayernorm roc_bert
roformer rwkv squeezebert switch_transformers t5 t5gemma t5gemma2 tapas trocr ultrabert ultravbert umt5 vibevoice_asr
voxtral xlm-roberta xlm-roberta-xl xlstm xmod zamba
""".split()
# XLNet's LM head predicts the token that it reads, Reformer hashes at random, XLM may be masked or causal
UNUSABLE = "flaubert reformer xlm xlnet".split()
LM_CLASSES = ("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration", "PreTraining")  # how their names end
MADE_UP_USER = {
    "user": "made up", "history": ["red apple pie", "a new song of the night", "river"], "labels": [1, 0, 0],
    "candidates": ["green tea", "the old king and the queen of the moon garden", "storm"]}


def model_name(model):
    """The folder or hub id that --model means; a folder goes before a short name."""
    return model if Path(model).is_dir() else MODELS.get(model, model)


def placement(args):
    """(device, dtype) that --device and --dtype mean on this machine, as strings."""
    cuda = torch.cuda.is_available()
    device = args.device or ("cuda" if cuda else "cpu")
    if args.dtype != "auto":
        return device, args.dtype
    return device, "bfloat16" if cuda and device != "cpu" else "float32"


def load_scorer(args):
    """A Scorer for args.model and args.type, in evaluation mode on args.device; flags as in shared_arguments.

    Raises UserError, one line, where the model cannot be loaded or cannot give scores.
    """
    name = model_name(args.model)
    say(f"loading {name}")
    try:
        return checked(load_pretrained(args, name))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an offline or gated hub, a broken folder, a missing package, an odd architecture
        where = ""
        if isinstance(error, OSError) and not Path(name).is_dir():
            where = "no such folder, and not on the hub (offline, gated, misspelt?): "
        raise UserError(f"model {name} cannot be used: {where}{type(error).__name__}: {str(error)[:200]}") from None


def load_pretrained(args, name):
    """The Scorer of a model folder or hub id, its LM head still whole."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry without a network
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if Path(name, "adapter_config.json").exists():  # transformers would load the adapter, too
        raise UserError(f"{name} holds an adapter: give finetune.py's as --adapter; {MERGE}")
    embeds = args.type == "embed"
    files = sentence_files(name, args.pooling) if embeds else NO_SENTENCE_FILES
    remote = {"trust_remote_code": args.trust_remote_code, "subfolder": files["subfolder"]}
    config = transformers.AutoConfig.from_pretrained(name, **remote)
    family = family_of(config)
    check_config(config, name, embeds)
    tokenizer = load_tokenizer(name, remote)
    if family == "masked" and not embeds and tokenizer.mask_token is None:
        raise UserError(f"the tokenizer of {name} has no mask token, which a masked model's prompt needs")
    device, dtype = placement(args)
    loader = getattr(transformers, AUTO_CLASSES[family][embeds])
    model, info = loader.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True,
                                         device_map="auto" if device == "auto" else None, **remote)
    missing = [key for key in info["missing_keys"] if "pooler" not in key]  # scores use none
    if missing:  # transformers would invent them
        raise UserError(f"model {name} lacks weights, such as {min(missing)}" +
                        ("" if embeds else ": without an LM head, use --type embed"))
    if device != "auto":
        model.to(device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model.eval().config.use_cache = False
    pooling = files["pooling"] or ("last" if family == "causal" else "mean")
    if embeds:
        say(f"{name}: pooling {pooling}")
    limits = [args.max_length, files["max_seq_length"] or math.inf, max_positions(model, tokenizer)]
    return Scorer(
        name=name, model=model, tokenizer=tokenizer, type=args.type, family=family,
        layout=layout_of(model.config, family, embeds), prompt=load_prompt(args.prompt),
        chat_template=args.chat_template and not embeds, answers=[], pooling=pooling,
        dense=files["dense"].to(model.device, torch.float64), lower_case=files["do_lower_case"], limit=min(limits),
        max_tokens=args.max_tokens or (1024 if device == "cpu" else 8192), pad=tokenizer.pad_token_id or 0)


def load_tokenizer(name, remote):
    """The tokenizer of a model. Raises UserError where it does not know words."""
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **remote)
    tokens = tokenizer("yes item", add_special_tokens=False)["input_ids"]
    if not tokens or set(tokens) == {tokenizer.unk_token_id}:
        raise UserError(f"the tokenizer of {name} does not know the words 'yes' and 'item': are its files missing?")
    if isinstance(tokenizer.chat_template, str) and "strftime_now" in tokenizer.chat_template:
        # it writes today's date: here every day the same, or scores would change
        tokenizer.chat_template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + tokenizer.chat_template
    return tokenizer


def family_of(config):
    """"seq2seq" (T5), "masked" (BERT and encoders) or "causal" (decoder-only), from a model's configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder or config.model_type in ("t5", "mt5", "umt5"):  # a T5 encoder alone says false
        return "seq2seq"
    saved_class = (config.architectures or [""])[0]
    if saved_class.endswith(("CausalLM", "LMHeadModel")):
        return "causal"
    return "masked" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def check_config(config, name, embeds):
    """Raise UserError for a model that loads without a word and gives scores that mean nothing."""
    saved_class = (config.architectures or ["CausalLM"])[0]
    no_lm = not embeds and not saved_class.endswith(LM_CLASSES)  # a classifier or reward model whose head would be tied
    if no_lm or config.model_type in UNUSABLE:
        kind = "embed" if embeds else "prompt"
        raise UserError(f"model {name} ({config.model_type}, {saved_class}) cannot be scored with --type {kind}")


def layout_of(config, family, embeds):
    """How texts share a forward pass. "packed": a user's prompts in one row, kept apart by the mask. "cached": each
    prompt continues one prefix cache. "padded": a row per text, the short ones of a batch padded. "equal": a row per
    text, in batches of one length."""
    kind = config.model_type
    if family == "causal" and not embeds:
        if kind in PACKED and not getattr(config, "alibi", False):  # ALiBi takes the place in the row for the position
            return "packed"
        if kind in CACHED:
            return "cached"
    causal = kind in PACKED or kind in CACHED  # each token sees only what stands before it, so never padding
    return "padded" if kind in PADDED or (causal and embeds) else "equal"


def max_positions(model, tokenizer):
    """The longest input in tokens that a model has positions for."""
    config = model.config.get_text_config()
    limits = [tokenizer.model_max_length]
    for key in ("max_position_embeddings", "max_seq_len", "n_positions"):
        limits.append(getattr(config, key, None) or math.inf)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond the original length, one long text changes all texts of its batch
        limits.append(config.original_max_position_embeddings)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa's start after the padding id
    return min(limit for limit in limits if limit > 0)  # some say -1 for no limit


def checked(scorer):
    """The scorer, its LM head cut, in a layout that gives a made-up user the scores of one text at a time.

    Where its own layout does not, texts run one at a time. Raises UserError where that, too, differs.
    """
    alone = scorer._replace(layout="equal", max_tokens=1)
    tokens = []
    if scorer.type == "prompt":
        tokens = answer_tokens(scorer.tokenizer, scorer.prompt, scorer.family, scorer.chat_template)
    [expected], _ = scores_of(alone._replace(answers=tokens), [MADE_UP_USER], {})
    if scorer.type == "prompt":
        cut_head(scorer.model, tokens)
    share = 0.15 if scorer.model.dtype in (torch.bfloat16, torch.float16) else 1e-3  # of rounding, seen in real models
    for candidate in (scorer, alone):
        candidate = candidate._replace(answers=[0, 1])
        [scores], _ = scores_of(candidate, [MADE_UP_USER], {})
        if np.abs(scores - expected).max() <= share * (1 + np.abs(expected).max()):
            return candidate
        say(f"{scorer.name}: the layout {candidate.layout!r} changes its scores, so texts run one at a time")
    raise UserError(f"model {scorer.name} gives NaN or other scores each time in {scorer.model.dtype}, or its LM head "
                    "cannot be cut to two answers")


def cut_head(model, tokens):
    """Replace the LM head by its two rows of the answers (token ids `tokens`), in float32 at least.

    The model's own forward then gives logits (..., 2), with its soft-capping, scaling and bias. bfloat16 logits would
    tie, and ties distort AUC.
    """
    head = model.get_output_embeddings()
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    two_rows = torch.nn.Linear(head.weight.shape[1], 2, device=head.weight.device, dtype=dtype)
    two_rows.weight.data = head.weight.data[tokens].to(dtype)
    two_rows.bias.data.zero_()
    if getattr(head, "bias", None) is not None:
        two_rows.bias.data = head.bias.data[tokens].to(dtype)
    two_rows.register_forward_pre_hook(cast_input)
    two_rows.requires_grad_(False)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is head:  # not set_output_embeddings: T5Gemma's changes the (tied) input embeddings, too
            model.set_submodule(path, two_rows)


def cast_input(module, inputs):
    """Before a layer runs: its input in the type, and on the device, of its weights."""
    return (inputs[0].to(module.weight),)


NO_SENTENCE_FILES = {"subfolder": "", "pooling": None, "dense": torch.nn.Sequential(), "max_seq_length": None,
                     "do_lower_case": False}


def sentence_files(name, pooling):
    """What a model's own sentence-transformers files say, by the keys of NO_SENTENCE_FILES.

    pooling: of --pooling; "auto" takes the files'. Raises UserError where they name something unsupported.
    """
    found = {**NO_SENTENCE_FILES, "dense": torch.nn.Sequential()}
    modules = read_model_file(name, "modules.json")
    types = ",".join(module["type"] for module in modules)
    own = r"sentence_transformers\.[\w.]*"  # any other is code of the model's own
    if not re.fullmatch(f"({own}Transformer(,{own}Pooling)?(,{own}Dense)*(,{own}Normalize)?)?", types):
        raise UserError(f"model {name} embeds through {types}, which is not supported")
    for module in modules:  # a cosine needs no Normalize
        kind = module["type"].rsplit(".", 1)[-1]
        settings = read_model_file(name, f"{module['path']}/config.json".lstrip("/"))
        if kind == "Transformer":
            found["subfolder"] = module["path"]
            found.update(read_model_file(name, f"{module['path']}/sentence_bert_config.json".lstrip("/")))
        if kind == "Pooling" and pooling == "auto":
            found["pooling"] = pooling_of(name, settings)
        if kind == "Dense":
            found["dense"].append(load_dense(name, module["path"], settings))
    default = read_model_file(name, "config_sentence_transformers.json").get("default_prompt_name")
    if default:
        say(f"{name}: its default prompt {default!r} is not added; give it in --prompt, keys user and candidate")
    return found if pooling == "auto" else {**found, "pooling": pooling}


def pooling_of(name, settings):
    """"cls", "mean" or "last", from the settings of a Pooling module, old or new. Raises UserError for any other."""
    names = {"cls": "cls", "mean": "mean", "lasttoken": "last", "pooling_mode_cls_token": "cls",
             "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    old = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    mode = settings.get("pooling_mode", "+".join(old))
    if mode not in names:
        raise UserError(f"model {name} pools by {mode or 'nothing'}, which is not supported: choose with --pooling")
    return names[mode]


def load_dense(name, path, settings):
    """A dense layer that follows pooling (sentence-T5), with its activation; linear is its name in the weights file."""
    from transformers.modeling_utils import load_state_dict
    file = model_file(name, f"{path}/model.safetensors") or model_file(name, f"{path}/pytorch_model.bin")
    dense = torch.nn.Sequential()
    dense.linear = torch.nn.Linear(settings["in_features"], settings["out_features"], settings.get("bias", True))
    dense.load_state_dict(load_state_dict(file))
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1]
    return dense.append(getattr(torch.nn, activation)()).requires_grad_(False)


def model_file(name, file):
    """The path of a file of a model folder or hub id; None where it has no such file."""
    from transformers.utils import cached_file
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def read_model_file(name, file):
    """The JSON value of a file of a model folder or hub id; {} where it has no such file."""
    path = model_file(name, file)
    return read_json(path) if path else {}


def load_adapter(scorer, folder, trainable=False):
    """The scorer with a run's LoRA adapter on its model; peft keeps adapters in float32 at least.

    Raises UserError where the adapter does not fit, or where a LoRA module of the model finds no weights in its file.
    """
    import peft
    try:
        model = peft.PeftModel.from_pretrained(scorer.model, folder, is_trainable=trainable,
                                               torch_device=str(scorer.model.device)).eval()
        saved = set(peft.load_peft_weights(folder, device="cpu"))
        wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:
        raise UserError(f"adapter {folder} does not fit {scorer.name}: {str(error)[:300]}") from None
    if saved != wanted:  # peft would leave the model's own weights in place
        raise UserError(f"adapter {folder} does not fit {scorer.name}: {len(wanted - saved)} weights are missing and "
                        f"{len(saved - wanted)} unknown, such as {min(saved ^ wanted)}")
    return scorer._replace(model=model)

# ------------------------------------------------------------------------------------------------- files and flags

FORMAT = 1  # version of the standard format: data/<dataset>/{items,train,valid,test}.jsonl and meta.json
SPLITS = ("train", "valid", "test")


def digest(*parts):
    """A 64-bit integer from the parts: blake2b, so the same on every machine, unlike hash()."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Data(NamedTuple):
    """A prepared dataset. A user is {"user": name, "history": [item ids, oldest first], "candidates": [item ids],
    "labels": [0 or 1]}."""
    name: str
    domain: str
    items: dict  # {item id: text}
    first: dict  # {item id: seconds at which it first occurs in the raw data}, where that is known
    splits: dict  # {"train", "valid", "test": users, in order}; [] where there is no such file
    sha256: str  # of the bytes of items and splits as they were read


def read_dataset(data, name, *needed):
    """The dataset `name` of the folder `data`: a Data. needed: the splits that must have users.

    Raises UserError where it is not prepared or, with file and line number, where a line is wrong.
    """
    folder = Path(data, name)
    if not (folder / "meta.json").exists():
        what = "demo" if name in DEMO else f"{name} --raw RAW"
        raise UserError(f"dataset {name} is not prepared ({folder / 'meta.json'} is missing): python prepare_data.py {what} "
                        f"--out {data} makes it, if it is one of {', '.join(DOMAINS)}; or is --data wrong?")
    meta = read_json(folder / "meta.json")
    if meta.get("format") != FORMAT or "domain" not in meta:
        raise UserError(f'{folder}/meta.json: this version reads {{"format": {FORMAT}, "domain": "...", ...}}')
    content = hashlib.sha256()
    items, first = read_items(folder / "items.jsonl", content)
    official = meta.get("job", {}).get("from_recbench", False)  # kept letter for letter, repeats too
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        splits[split] = read_users(path, items, official, content) if path.exists() else []
        if split in needed and not splits[split]:
            raise UserError(f"dataset {name} has no {split} users ({path}); prepare it with --test-size or --train-size")
    return Data(name, meta["domain"], items, first, splits, content.hexdigest())


def read_items(path, content):
    """({item id: text}, {item id: first}) of items.jsonl; content: a hash that is fed the bytes. Raises UserError."""
    items, first = {}, {}
    for number, row in read_lines(path, content):
        item, text = row.get("id"), row.get("text")
        if not isinstance(item, str) or not isinstance(text, str) or item in items:
            raise UserError(f'{path}, line {number}: an item is {{"id": "...", "text": "..."}}, each id once')
        items[item] = text
        if "first" in row:
            first[item] = row["first"]
    return items, first


def read_users(path, items, official, content):
    """The users of a split. official: candidates may repeat; content: a hash that is fed the bytes. Raises UserError."""
    users = {}
    for number, user in read_lines(path, content):
        try:
            name, candidates, labels = user["user"], user["candidates"], user["labels"]
            once = official or len(set(candidates)) == len(candidates)
            ids_known = items.keys() >= {*user["history"], *candidates}
            labels_fit = len(labels) == len(candidates) > 0 and {0, 1} >= set(labels)
            right = once and ids_known and labels_fit and name not in users
        except (KeyError, TypeError):
            right = False
        if not right:
            raise UserError(f'{path}, line {number}: a user is {{"user": "...", "history": [ids], "candidates": [ids], '
                            '"labels": [0 or 1 per candidate]}, each name once, each candidate once per user, ids as in '
                            "items.jsonl")
        users[name] = user
    return list(users.values())


def prepared(data, split):
    """Names of the datasets in the folder data that have this split, sorted."""
    found = Path(data).glob(f"[!.]*/{split}.jsonl")  # with a dot: it is being written, see prepare_data.py
    return sorted(path.parent.name for path in found if path.with_name("meta.json").exists())


def items_of(users):
    """The ids of the items of users, sorted."""
    ids = set()
    for user in users:
        ids.update(user["history"], user["candidates"])
    return sorted(ids)


def count_long_texts(users, items):
    """How many of the items of users have a text that with_texts cuts."""
    return sum(len(items[item]) > TEXT_LIMIT for item in items_of(users))


def write_atomically(path, text):
    """Write text under a name of this process beside path and rename it: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half surrogates, as JSON writes them
    os.replace(temporary, path)


def write_json(path, value):
    """JSON, indented, atomically; NaN is refused with ValueError (it is no JSON)."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """The JSON object of a file. Raises UserError where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def read_lines(path, content=None):
    """Yield (line number, JSON object) of a .jsonl file. Raises UserError where a line is broken.

    content: a hash that is fed the bytes as they are read, if given.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if content:
                content.update(line)
            try:
                yield number, dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise UserError(f"{path}, line {number}: not a JSON object") from None


# Every output holds the job that it was made of: arguments, data, model, adapter. So a killed run continues by the same
# command, a finished one is not run again, and no result is taken for another's.


def job_of(args, ignored):
    """The job of an output, but for data and adapter: arguments, with what the prompt, the dtype and the model are.

    Left out are arguments that change nothing or no more than rounding, those named here and in `ignored`.
    """
    ignored = ("data", "out", "device", "overwrite", "trust_remote_code", "max_tokens", *ignored)
    job = {key: value for key, value in vars(args).items() if key not in ignored}
    job["prompt"] = load_prompt(args.prompt)
    _, job["dtype"] = placement(args)
    job["model"] = model_identity(args.model)
    return job


def model_identity(model):
    """What identifies a model in a job: a hub id or, of a local folder, its config, weight and tokenizer files."""
    name = model_name(model)
    if not Path(name).is_dir():
        return name
    files = {}
    for pattern in ("config.json", "*.safetensors", "*.bin", "*.model", "tokenizer*", "vocab*"):
        for path in sorted(Path(name).glob(pattern)):
            files[path.name] = [path.stat().st_size, int(path.stat().st_mtime)]
    return files


def adapter_identity(run):
    """What identifies the adapter of a finetune.py run in a job: a hash of its weights; None without one."""
    if not run:
        return None
    with open(Path(run, "adapter_model.safetensors"), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_there(path, job, overwrite=False):
    """Whether the output file `path` is there, made by this very job; with overwrite, nothing counts as there.

    The job stands under "job" in a .json or .pt file, or in the first line of a .jsonl file. Raises UserError where the
    file was made by another job, or cannot be read.
    """
    path = Path(path)
    if overwrite or not path.exists():
        return False
    try:
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".jsonl":
            _, content = next(read_lines(path))
        else:
            content = read_json(path)
        found = content["job"]
        changed = [key for key in {**job, **found} if job.get(key) != found.get(key)]
    except Exception:  # another program's, or damaged
        changed = ["program, or damaged since"]
    if changed:
        raise UserError(f"{path} was made with another {', '.join(changed)}: choose another --out or give --overwrite")
    return True


MERGE = "one made elsewhere has to be merged into its base model (peft's merge_and_unload), saved and given as --model"


def read_run(folder, args):
    """run.json of a finetune.py run; without one, that of the base model, which has seen no dataset.

    Raises UserError where the run is unfinished or of another model or type.
    """
    if not folder:
        return {"train_chain": [], "valid_chain": [], "domains": {}, "beats_base": True}
    path = Path(folder, "run.json")
    if not path.exists():
        raise UserError(f"{folder} holds no finished adapter of finetune.py ({path} is missing); {MERGE}")
    run = read_json(path)
    if run["job"]["model"] != model_identity(args.model) or run["type"] != args.type:
        raise UserError(f"{folder} is an adapter for --model {run['model']} --type {run['type']}, not for "
                        f"--model {args.model} --type {args.type} (or the model's files have changed)")
    return run


def versions():
    """The versions that a result was made with."""
    from importlib.metadata import version
    return {package: version(package) for package in ("torch", "transformers", "peft", "numpy")}


def peak_memory_gb():
    """Peak memory of the GPU in GB since the model was loaded; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def markdown_table(rows):
    """A Markdown table of rows of str; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        lines.append("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    return "\n".join(lines)


def say(message):
    """A line on standard error, beside progress bars; from torchrun's first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


def positive_int(text):
    """An int of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def argument_parser(doc):
    """argparse with a script's docstring as its help, and no abbreviated flags."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False)


def shared_arguments(parser):
    """The flags that finetune.py and evaluate.py share; transfer_matrix.py passes them on."""
    add = parser.add_argument_group("shared flags").add_argument
    add("--data", default="data", metavar="DIR", help="folder that prepare_data.py wrote (default: %(default)s)")
    add("--type", choices=["prompt", "embed"], default="prompt",
        help="score by the Yes/No logits of a prompt (default) or by the cosine of embeddings")
    add("--prompt", metavar="FILE", help="JSON file with wording of your own; keys as in PROMPT in common.py")
    add("--chat-template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    add("--pooling", choices=["auto", "cls", "mean", "last"], default="auto",
        help="embedding of a text: its first token, the mean over tokens, or its last token; auto (default): as the "
             "model's own files say, else last for decoder-only models and mean for others")
    add("--seed", type=int, metavar="N", default=2025, help="seed of everything random (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU); auto: scoring only, the layers of "
        "one model over all GPUs")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16", "float64"], default="auto",
        help="of the model's weights; auto (default): bfloat16 on a GPU, float32 elsewhere")
    add("--max-length", type=positive_int, metavar="TOKENS", default=1024,
        help="tokens per text, at most (default: %(default)s); histories are cut to it, oldest items first")
    add("--max-tokens", type=positive_int, metavar="TOKENS", help="tokens per forward pass; lower it if memory runs out "
        "(default: 8192; on a CPU 1024, where more would leave its cache)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model from the hub")
    add("--overwrite", action="store_true", help="start over and replace what is there")


def run_script(main, argv=None):
    """Call a script's main and return its exit code; 2 with one line on standard error, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal or a file: "?" for what its encoding lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        return main(argv) or 0
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        message = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: lower --max-tokens, or take a smaller model"
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again, without --overwrite", file=sys.stderr)
        return 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
