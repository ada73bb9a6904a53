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
the second (label 0): the positive stands above the negative, so this user's AUC is 1.

That is prompt-based scoring. Embedding-based scoring needs no answer: the history is one text, the candidate another,
and the score is the cosine of their embeddings.

In reading order: datasets and settings, prompts, prompt scoring, embedding scoring, loading models, how texts may share
a forward pass, metrics, intervals, files and flags. The method is in all but the loading, the forward passes and the
files. Section numbers are the paper's.
"""
import argparse
import hashlib
import inspect
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

# The wording; --prompt FILE.json replaces any of these. What all candidates of a user share comes first, since packing
# computes it once.
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
    if path is None:
        return PROMPT
    changes = read_json(path)
    if not isinstance(changes, dict):
        raise UserError(f"{path} is not a JSON object")
    for key, value in changes.items():
        if key not in PROMPT:
            raise UserError(f"{path}: unknown key {key!r}; the keys are {', '.join(PROMPT)}")
        if type(value) is not type(PROMPT[key]):
            raise UserError(f"{path}: {key} must be of the type of {json.dumps(PROMPT[key])}")
    prompt = {**PROMPT, **changes}
    for key, slot in SLOTS:
        if slot not in prompt[key]:
            raise UserError(f"{path}: {key} lacks {slot}")
    if [type(word) for word in prompt["answers"]] != [str, str]:
        raise UserError(f"{path}: answers must be two words, such as {json.dumps(PROMPT['answers'])}")
    return prompt


def with_texts(user, items):
    """A user of read_users with item texts, cut to TEXT_LIMIT characters, in place of item ids: what is scored.

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


def render_chat(tokenizer, text):
    """The text as a user's message in the tokenizer's chat template, up to where the assistant's answer starts.

    Returns (text before the answer, the space with which the answer begins: " " or ""). The template decides what
    stands before the answer: a line break (GLM-4) belongs to the text, a space (Mistral, Llama-2) to the answer, since
    tokenizers join a space to the word after it. So an answer is rendered, too, and cut off again.
    """
    answer = "an-answer-to-cut-off"  # no template writes this
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        before, _, _ = rendered.rpartition(answer)
    except Exception as error:  # there is no template, or it is broken
        raise UserError(f"--chat-template: {str(error)[:300]}") from None
    if text.strip() not in before:
        raise UserError("--chat-template: the template changes the prompt or leaves the assistant's answer out")
    return before.rstrip(" "), " " if before.endswith(" ") else ""


def answer_token(tokenizer, context, word, chat=False):
    """The id of the token that stands for an answer word after the text `context`.

    (a) tokens(context + word) = tokens(context) + one id: that id. (b) Where the word changes the tokens of the
    context: its own entry in the vocabulary.
    chat: the template has decided what stands before the word, so it is the first token that goes beyond the context.
    Raises UserError where there is no such token.
    """
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(context + word, add_special_tokens=False)["input_ids"]
    token = None
    if after[:len(before)] == before:
        added = after[len(before):]
        if len(added) == 1 or (chat and added):
            token = added[0]
    elif not chat:
        vocabulary = tokenizer.get_vocab()
        token = vocabulary.get(word, vocabulary.get(word.strip()))
    if token is None or token == tokenizer.unk_token_id:
        shown = tokenizer.convert_ids_to_tokens(after)[-5:]
        raise UserError(f"the answer {word!r} is not a single token here: the prompt with it ends in {shown}; "
                        'choose other "answers" with --prompt')
    return token


def answer_tokens(tokenizer, prompt, chat_template=False):
    """[yes, no]: the token ids of the prompt's two answers. Raises UserError where they are the same token."""
    context = candidate_prompts(prompt, ["x"], ["x"])[0]
    tokens = []
    for word in prompt["answers"]:
        before = context
        if chat_template:
            before, space = render_chat(tokenizer, context)
            word = space + word.strip()
        tokens.append(answer_token(tokenizer, before, word, chat_template))
    if tokens[0] == tokens[1]:
        shown = tokenizer.convert_ids_to_tokens(tokens)[0]
        raise UserError(f"both answers {prompt['answers']} are the token {shown!r}")
    return tokens

# ------------------------------------------------------------------------------------------------- prompt scoring

# In the order in which data flows: texts -> token ids -> packed rows -> batches -> arrays and mask -> logits at the
# answers -> scores.


class Scorer(NamedTuple):
    """A model, ready to score. Users, here and below, are those that with_texts gives.

    Layout, which find_layout chooses by what the model allows: "packed", a user's prompts share a row; "padded", a row
    per text, the short ones of a batch padded; "equal", a row per text, in batches of texts of one length.
    """
    name: str  # hub id or folder
    model: torch.nn.Module
    tokenizer: object
    type: str  # "prompt" or "embed"
    family: str  # "causal", "masked" or "seq2seq": see FAMILIES
    layout: str  # "packed", "padded" or "equal"
    prompt: dict  # the wording: see PROMPT
    chat_template: bool
    pooling: str  # "last", "mean" or "cls"; of no use for prompts
    dense: torch.nn.Module  # the layers after pooling; of most models none
    limit: int  # tokens of a text, at most
    max_tokens: int  # tokens of a forward pass, at most
    pad: int  # token id of padding; no token sees it


class Row(NamedTuple):
    """A row of a batch: suffixes (token ids) that each continue the prefix (token ids); one suffix where unpacked."""
    prefix: list
    suffixes: list
    indices: list  # of each suffix: the number of its text, counted over all users of a call


def user_texts(scorer, history, candidates):
    """The texts that hold a user's history: a prompt per candidate or, to embed, the history alone."""
    if scorer.type == "embed":
        return [fill(scorer.prompt["user"], history=history_text(scorer.prompt, history))]
    texts = candidate_prompts(scorer.prompt, history, candidates)
    mask = scorer.tokenizer.mask_token
    if scorer.family == "masked" and mask not in scorer.prompt["prompt"]:  # wording without a place for the answer
        texts = [text + mask for text in texts]
    return texts


def encode(scorer, texts):
    """Token ids of texts, each tokenised whole."""
    special_tokens = scorer.prompt["special_tokens"]
    if scorer.chat_template and scorer.type == "prompt":
        texts = [render_chat(scorer.tokenizer, text)[0] for text in texts]
        special_tokens = False  # the template has written them
    if not texts:
        return []
    tokenizer = scorer.tokenizer
    ids = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
    if special_tokens and scorer.type == "prompt" and scorer.family == "causal":
        bare = tokenizer("yes item", add_special_tokens=False)["input_ids"]
        if tokenizer("yes item")["input_ids"][-1] != bare[-1]:  # it appends EOS or SEP, where the answer has to come
            ids = [tokens[:-1] for tokens in ids]
    # an item without text, a tokenizer without BOS: there must be a state to read
    return [tokens or [tokenizer.eos_token_id or 0] for tokens in ids]


def encode_user(scorer, user):
    """(token ids of the user's texts, how many of the oldest items were dropped so that the longest text fits).

    All texts of a user are cut alike, so they still share their history. Raises UserError where one item is too long.
    """
    for dropped in range(max(1, len(user["history"]))):
        ids = encode(scorer, user_texts(scorer, user["history"][dropped:], user["candidates"]))
        longest = max(map(len, ids))
        if longest <= scorer.limit:
            return ids, dropped
    raise UserError(f"user {user['user']} needs {longest} tokens with no more than one item of history, but at most "
                    f"{scorer.limit} fit: raise --max-length, if the model allows it, or shorten the prompt")


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

    per_user: of each user the texts, of each text the token ids. A row holds one suffix at least; where the model must
    not pack, only one. Each text was tokenised whole, so the result is that of separate texts, for any tokenizer.
    """
    rows, index = [], 0
    for ids in per_user:
        shared = common_prefix(ids)
        row = None  # the next suffix starts a row
        for tokens in ids:
            suffix = tokens[shared:]
            if row is None or scorer.layout != "packed" or row_length(row) + len(suffix) > scorer.max_tokens:
                row = Row(tokens[:shared], [], [])
                rows.append(row)
            row.suffixes.append(suffix)
            row.indices.append(index)
            index += 1
    return rows


def fill_batches(scorer, rows):
    """The rows in batches, longest first, of at most max_tokens with their padding (one row at least).

    A batch also ends where lengths fall below two thirds of its longest, so that little is spent on padding; in the
    layout "equal" where the length changes.
    """
    shortest_share = 1.0 if scorer.layout == "equal" else 2 / 3
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


def packed_mask(segments):
    """Who sees whom: a boolean tensor (rows, 1, length, length) from the segments (rows, length).

    A token sees itself and what stands before it in the prefix and in its own suffix, nothing of the other suffixes:

        prefix a b, suffixes c d and e f     a b c d e f
                                          a  1 . . . . .
                                          b  1 1 . . . .
                                          c  1 1 1 . . .        each suffix computes exactly what it would
                                          d  1 1 1 1 . .        compute in a prompt of its own, since its
                                          e  1 1 . . 1 .        positions, too, continue the prefix
                                          f  1 1 . . 1 1
    """
    query, key = segments[:, :, None], segments[:, None, :]
    visible = (key == 0) | (key == query)  # padding sees the prefix, since a softmax over nothing is NaN
    return visible.tril()[:, None]


def model_inputs(scorer, rows):
    """What a model is given, and where suffixes end (see lay_out): there a decoder-only model answers."""
    device, dtype = scorer.model.device, scorer.model.dtype
    ids, positions, segments, last = lay_out(rows, scorer.pad)
    segments = torch.tensor(segments, device=device)
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": (segments >= 0).long()}
    if scorer.layout == "packed":
        blocked = ~packed_mask(segments)
        inputs["attention_mask"] = blocked.to(dtype) * torch.finfo(dtype).min  # to be added: eager takes no boolean one
        inputs["position_ids"] = torch.tensor(positions, device=device)
    return inputs, last


def masked_inputs(scorer, rows):
    """What a masked model is given, and where the answers are read: at the last mask token of each row."""
    inputs, answers = model_inputs(scorer, rows)
    is_mask = inputs["input_ids"] == scorer.tokenizer.mask_token_id
    columns = torch.arange(is_mask.shape[1], device=is_mask.device)
    answers[:, 1] = (is_mask * columns).amax(1).cpu()  # the highest column that holds one
    return inputs, answers


def seq2seq_inputs(scorer, rows):
    """What an encoder-decoder model is given, and where the answers are read: at the first decoder position."""
    inputs, answers = model_inputs(scorer, rows)
    start = scorer.model.config.decoder_start_token_id
    inputs["decoder_input_ids"] = torch.full((len(rows), 1), start, device=scorer.model.device)
    answers[:, 1] = 0
    return inputs, answers


class Family(NamedTuple):
    prompt_class: str  # the class of transformers that brings the LM head
    embed_class: str  # the one without it
    inputs: object  # (scorer, rows) -> the model's inputs and the (row, column) of each answer
    pooling: str  # of embeddings, if the model's own files name none


FAMILIES = {  # a new family of models is added here
    "causal": Family("AutoModelForCausalLM", "AutoModel", model_inputs, "last"),
    "masked": Family("AutoModelForMaskedLM", "AutoModel", masked_inputs, "mean"),
    "seq2seq": Family("AutoModelForSeq2SeqLM", "AutoModelForTextEncoding", seq2seq_inputs, "mean"),
}
YES, NO = 0, 1  # the LM head was cut to these two rows when the model was loaded: see cut_head


def answer_logits(scorer, rows):
    """The logits at the answer of every suffix of the rows, in order: float64 (suffixes, 2), with gradient.

    Before the LM head is cut: (suffixes, vocabulary).
    """
    inputs, answers = FAMILIES[scorer.family].inputs(scorer, rows)
    logits = scorer.model(**inputs).logits  # (rows, length, 2)
    return logits[answers[:, 0], answers[:, 1]].double()


def score_rows(scorer, rows):
    """logit(yes) - logit(no) of every suffix of the rows, in order: a float64 tensor (suffixes,), with gradient."""
    logits = answer_logits(scorer, rows)
    return logits[:, YES] - logits[:, NO]


def in_batches(scorer, rows, forward):
    """What forward, score_rows or embed_rows, gives for all rows: a tensor, each score or embedding at its index."""
    results, indices = [], []
    for batch in fill_batches(scorer, rows):
        results.append(forward(scorer, batch))
        indices += indices_of(batch)
    return torch.cat(results)[np.argsort(indices)]  # undo the order of the batches


def score_prompts(scorer, users):
    """Prompt-based scores of users: ([float64 (candidates,) per user], what it took).

    What it took: tokens_scored, tokens_unpacked (in separate prompts), dropped (history items per user, to fit).
    """
    per_user, numbers, dropped, tokens_unpacked = [], [], [], 0
    for user in users:
        ids, cut = encode_user(scorer, user)
        distinct = {}  # of equal prompts one is scored, so that rounding cannot tell them apart
        for tokens in ids:
            distinct.setdefault(tuple(tokens), len(distinct))
        per_user.append(list(distinct))
        numbers.append([distinct[tuple(tokens)] for tokens in ids])
        dropped.append(cut)
        tokens_unpacked += sum(map(len, ids))
    rows = rows_of(scorer, per_user)
    with torch.no_grad():
        scores = in_batches(scorer, rows, score_rows).cpu().numpy()
    ends = np.cumsum(list(map(len, per_user)))
    by_user = np.split(scores, ends[:-1])
    tokens_scored = sum(map(row_length, rows))
    took = {"tokens_scored": tokens_scored, "tokens_unpacked": tokens_unpacked, "dropped": dropped}
    return [own[number] for own, number in zip(by_user, numbers)], took

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
        mask = inputs["attention_mask"][:, :, None]
        pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(scorer.dense(pooled))


def embed(scorer, ids):
    """Embeddings of texts (token ids), in their order: as embed_rows."""
    rows = rows_of(scorer, [ids])  # as of one user: unpacked, a row is its text, whatever prefix is found
    return in_batches(scorer, rows, embed_rows)


def encode_items(scorer, texts):
    """Token ids of item texts. Raises UserError where one is longer than scorer.limit."""
    ids = encode(scorer, [fill(scorer.prompt["candidate"], candidate=text) for text in texts])
    for text, tokens in zip(texts, ids):
        if len(tokens) > scorer.limit:
            raise UserError(f"the item text {text[:40]!r}... has {len(tokens)} tokens, but at most {scorer.limit} fit: "
                            "raise --max-length, if the model allows it")
    return ids


def score_embeddings(scorer, users, known):
    """Embedding-based scores of users, cosine(history, candidate); returns as score_prompts.

    known: {item text: embedding}, filled here, so that an item is encoded once over all calls; it takes 8 bytes times
    the width per distinct item (20,000 items of width 4,096: 0.7 GB).
    """
    ids, dropped, new = [], [], {}
    for user in users:
        history_ids, cut = encode_user(scorer, user)
        ids += history_ids  # of one text
        dropped.append(cut)
        for text in user["candidates"]:
            if text not in known:
                new[text] = None  # a dict, as a set in order
    ids += encode_items(scorer, list(new))
    with torch.no_grad():
        vectors = embed(scorer, ids).cpu().numpy()
    known.update(zip(new, vectors[len(users):].copy()))  # a view would keep the users' in memory
    scores = []
    for user, vector in zip(users, vectors):
        cosines = [vector @ known[text] for text in user["candidates"]]
        scores.append(np.array(cosines))
    tokens = sum(map(len, ids))
    return scores, {"tokens_scored": tokens, "tokens_unpacked": tokens, "dropped": dropped}


def scores_of(scorer, users, known):
    """Scores of users by the scorer's type: as score_prompts or, with known, score_embeddings."""
    if scorer.type == "embed":
        return score_embeddings(scorer, users, known)
    return score_prompts(scorer, users)

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


def model_name(model):
    """The folder or hub id that --model means; a folder goes before a short name."""
    return model if Path(model).is_dir() else MODELS.get(model, model)


def placement(args):
    """(device, dtype) that --device and --dtype mean on this machine, as strings. Raises UserError without a GPU."""
    cuda = torch.cuda.is_available()
    device = args.device or ("cuda" if cuda else "cpu")
    if "cuda" in device and not cuda:
        raise UserError(f"--device {device}: torch sees no CUDA GPU here")
    if args.dtype != "auto":
        return device, args.dtype
    return device, "bfloat16" if "cuda" in device else "float32"


def load_scorer(args):
    """A Scorer for args.model and args.type, in evaluation mode on args.device; flags as in shared_arguments.

    Raises UserError, one line, where the model cannot be loaded, has no LM head for prompts, or scores wrongly.
    """
    name = model_name(args.model)
    say(f"{name}: loading, and checking on made-up texts how texts may share a forward pass")
    try:
        scorer = load_pretrained(args, name)
        if args.type == "prompt":
            cut_head(scorer)
        return scorer._replace(layout=find_layout(scorer))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an offline or gated hub, a broken folder, a missing package, an odd architecture
        where = ""
        if isinstance(error, OSError) and not Path(name).is_dir():
            where = "no such folder, and not on the hub (offline, gated, misspelt?): "
        raise UserError(f"model {name} cannot be used: {where}{type(error).__name__}: {str(error)[:200]}") from None


def load_pretrained(args, name):
    """The Scorer of a model folder or hub id, its layout still to be found."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry without a network
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if Path(name, "adapter_config.json").exists():  # transformers would load the adapter, too
        raise UserError(f"{name} holds an adapter: give it as --adapter, and its base model as --model")
    prompt = load_prompt(args.prompt)
    device, dtype = placement(args)
    remote = {"trust_remote_code": args.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(name, **remote)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **remote)
    if isinstance(tokenizer.chat_template, str) and "strftime_now" in tokenizer.chat_template:
        # it writes today's date: here every day the same, or scores would change
        tokenizer.chat_template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + tokenizer.chat_template
    family = family_of(config)
    class_name = FAMILIES[family].prompt_class if args.type == "prompt" else FAMILIES[family].embed_class
    loader = getattr(transformers, class_name)
    model, info = loader.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True, **remote)
    model.config.use_cache = False
    model.to(device).eval()
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device)
    pooling, dense = args.pooling, torch.nn.Sequential()
    if args.type == "embed":
        pooling, dense = sentence_modules(name, args.pooling, FAMILIES[family].pooling)
    limit = min(args.max_length, max_positions(model, tokenizer))
    max_tokens = args.max_tokens or (1024 if device.startswith("cpu") else 8192)
    scorer = Scorer(
        name=name, model=model, tokenizer=tokenizer, type=args.type, family=family, layout="padded", prompt=prompt,
        chat_template=args.chat_template, pooling=pooling, dense=dense.to(device, torch.float64), limit=limit,
        max_tokens=max_tokens, pad=tokenizer.pad_token_id or 0)
    check_model(scorer, info["missing_keys"])
    return scorer


def family_of(config):
    """"seq2seq" (T5), "masked" (BERT and encoders) or "causal" (decoder-only), from a model's configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.is_encoder_decoder or config.model_type in ("t5", "mt5", "umt5"):  # a T5 encoder alone says false
        return "seq2seq"
    saved_class = (config.architectures or [""])[0]
    if saved_class.endswith("WithLMHeadModel"):  # XLM and Flaubert: either
        return "causal" if getattr(config, "causal", False) else "masked"
    if saved_class.endswith(("CausalLM", "LMHeadModel")):
        return "causal"
    return "masked" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def check_model(scorer, missing):
    """Raise UserError where a model that has been loaded cannot give scores.

    missing: names of the weights that its file lacks, which transformers then invents.
    """
    name, tokenizer = scorer.name, scorer.tokenizer
    missing = [key for key in missing if "pooler" not in key]  # scores use none
    if missing and scorer.type == "prompt":
        raise UserError(f"model {name} has no LM head ({min(missing)} is missing): use --type embed")
    if missing:
        raise UserError(f"model {name} has incomplete weights ({min(missing)} is missing)")
    tokens = tokenizer("yes item", add_special_tokens=False)["input_ids"]
    if not tokens or set(tokens) == {tokenizer.unk_token_id}:
        raise UserError(f"the tokenizer of {name} does not know the words 'yes' and 'item': are its files missing?")
    vocabulary_size = scorer.model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary_size:
        raise UserError(f"the tokenizer of {name} has token {highest}, the model embeds {vocabulary_size}: "
                        "they do not belong together")
    if scorer.type == "embed":
        return
    if scorer.model.config.model_type == "xlnet":
        raise UserError(f"the LM head of {name} predicts the token that it reads, not the next one: use --type embed")
    if scorer.family == "masked" and tokenizer.mask_token is None:
        raise UserError(f"the tokenizer of {name} has no mask token, which a masked model's prompt needs")
    if scorer.family == "seq2seq" and getattr(scorer.model.config, "decoder_start_token_id", None) is None:
        raise UserError(f"the configuration of {name} names no decoder_start_token_id, where the answer is read")


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
    return min(limit for limit in limits if limit > 0)  # XLNet says -1 for no limit


def sentence_modules(name, pooling, default):
    """(pooling, dense layers after it): with --pooling auto as the model's own sentence-transformers files say.

    Raises UserError where they name something that is not supported here.
    """
    modules = read_model_file(name, "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    # in this order, each if it is there; "" without modules.json
    if not re.fullmatch("(Transformer(,Pooling)?(,Dense)*(,Normalize)?)?", ",".join(kinds)):
        raise UserError(f"model {name} embeds through {', '.join(kinds)}, which is not supported")
    dense = torch.nn.Sequential()
    for kind, module in zip(kinds, modules):  # a cosine needs no Normalize
        if kind == "Pooling" and pooling == "auto":
            pooling = pooling_of(name, module["path"])
            say(f"{name}: pooling {pooling}, by its sentence-transformers files")
        if kind == "Dense":
            dense.append(load_dense(name, module["path"]))
    if pooling == "auto":
        pooling = default
        say(f"{name}: pooling {pooling}, since its files name none (or the hub is out of reach: then give --pooling)")
    return pooling, dense


def pooling_of(name, path):
    """"cls", "mean" or "last", as the folder `path` of the model says. Raises UserError for any other."""
    settings = read_model_file(name, f"{path}/config.json")
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in names:
        raise UserError(f"model {name} pools by {' and '.join(modes) or 'nothing'}, which is not supported: "
                        "choose with --pooling")
    return names[modes[0]]


def load_dense(name, path):
    """A dense layer that follows pooling (sentence-T5), with its activation; linear is its name in the weights file."""
    from transformers.modeling_utils import load_state_dict
    settings = read_model_file(name, f"{path}/config.json")
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


def tolerance(dtype, values):
    """By how much scores of about these values may differ through rounding.

    In bfloat16 rounding has been seen to move scores by 0.15 where a wrong position moved them by 0.9 to 3; a fault
    smaller than that passes.
    """
    share = 0.15 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    return share * (1 + float(values.abs().max()))


def made_up_text(scorer, length, seed):
    """Token ids of a text of this length, from all but the special tokens; a masked model's prompt ends in its mask."""
    vocabulary_size = scorer.model.get_input_embeddings().weight.shape[0]
    ordinary = np.delete(np.arange(vocabulary_size), scorer.tokenizer.all_special_ids)
    tokens = np.random.default_rng(seed).choice(ordinary, length).tolist()
    if scorer.family == "masked" and scorer.type == "prompt":
        tokens[-1] = scorer.tokenizer.mask_token_id
    return tokens


def cut_head(scorer):
    """Replace the LM head by its two rows of the answers, in float32 at least (float64 stays).

    The model's own forward then gives logits (..., 2), with its soft-capping, scaling and bias. bfloat16 logits would
    tie, and ties distort AUC. Raises UserError where the two logits differ from those of the whole head.
    """
    tokens = answer_tokens(scorer.tokenizer, scorer.prompt, scorer.chat_template)
    rows = rows_of(scorer, [[made_up_text(scorer, 8, 0)]])
    with torch.no_grad():
        expected = answer_logits(scorer, rows)[:, tokens]
        replace_head(scorer.model, tokens)
        cut = answer_logits(scorer, rows)
    # of another shape where forward does not use the new head
    if cut.shape != expected.shape or (cut - expected).abs().max() > tolerance(scorer.model.dtype, expected):
        raise UserError(f"the LM head of {scorer.name} is not a plain matrix, so it cannot be cut to two answers")


def replace_head(model, tokens):
    """Put a linear layer of two rows, those of the token ids `tokens`, in place of the LM head."""
    head = model.get_output_embeddings()
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    two = torch.nn.Linear(head.weight.shape[1], 2, device=head.weight.device, dtype=dtype)
    two.weight.data = head.weight.data[tokens].to(dtype)
    two.bias.data.zero_()
    if getattr(head, "bias", None) is not None:
        two.bias.data = head.bias.data[tokens].to(dtype)
    two.register_forward_pre_hook(cast_input)
    two.requires_grad_(False)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is head:  # not set_output_embeddings: T5Gemma's changes the (tied) input embeddings, too
            model.set_submodule(path, two)
    if hasattr(model, "final_logits_bias"):  # BART adds it after the head
        model.final_logits_bias = model.final_logits_bias[:, tokens]


def cast_input(module, inputs):
    """Before a layer runs: its input in the type of its weights."""
    return (inputs[0].to(module.weight.dtype),)


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

# ----------------------------------------------------------------------------- how texts may share a forward pass


def find_layout(scorer):
    """The layout (see Scorer) in which texts share a forward pass without changing each other's scores.

    No list of architectures is complete, so the loaded model itself is tried on made-up token ids: on packed rows as
    long as any that will be run, and on texts beside up to 1,024 tokens of padding. Raises UserError where the model
    gives other scores each time.
    """
    if scorer.type == "prompt" and scorer.family == "causal":
        fault = packing_fault(scorer)
        if fault is None:
            return "packed"
        say(f"{scorer.name}: prompts are scored without packing: {fault}")
    if padding_changes(scorer):
        say(f"{scorer.name}: padding changes its scores, so a batch holds texts of equal length")
        return "equal"
    return "padded"


def packing_fault(scorer):
    """Why this model must not be packed, None where it may."""
    if "position_ids" not in inspect.signature(scorer.model.forward).parameters:
        return "its forward takes no position_ids"
    config = scorer.model.config.get_text_config()
    for key in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, key, None)
        if window and window < scorer.limit:  # the mask of a packed row holds no window
            return f"its attention window ({window}) is shorter than a prompt may be ({scorer.limit})"
    prompts = prompts_of_a_row(scorer)
    changed = [prompts[0][:-1] + made_up_text(scorer, 1, 0), *prompts[1:]]  # another token in the first suffix
    packed = scorer._replace(layout="packed", max_tokens=math.inf)  # all in one row
    inputs, _ = model_inputs(scorer, rows_of(scorer, [prompts[:1]]))
    from_0 = torch.arange(len(prompts[0]), device=scorer.model.device)[None]
    try:
        with torch.no_grad():
            logits = scorer.model(**inputs).logits
            logits_from_0 = scorer.model(**inputs, position_ids=from_0).logits
        scores = scores_or_embeddings(packed, prompts)
        scores_changed = scores_or_embeddings(packed, changed)
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return f"its forward does not take the mask of packed rows ({type(error).__name__})"
    # (1) its own positions must count from 0, as those of packed rows do (RoBERTa's do not)
    if not torch.equal(logits, logits_from_0):
        return "it does not count positions from 0"
    # (2) leak: the scores of the other suffixes must not move by a single bit
    if (scores_changed[1:] != scores[1:]).any():
        return "a candidate's score depends on the candidates beside it (layers that carry a state along the row)"
    # (3) positions: packed scores must be those of separate prompts
    separate = scores_or_embeddings(scorer, [prompts[0], prompts[-1]])  # beside the prefix and far from it
    difference = (scores[[0, -1]] - separate).abs().max()
    if difference > tolerance(scorer.model.dtype, separate):
        return f"packed and separate scores differ by {difference:.2g} (attention depends on the position in the row)"
    return None


def prompts_of_a_row(scorer):
    """Made-up prompts of one user, as many as fill a forward pass in one row, two at least.

    As in real rows, suffixes are short and, since the prefix is long, some stand far from it. The first is one token.
    """
    prefix = made_up_text(scorer, max(1, scorer.limit // 2), 0)
    lengths = [1, 4, 16, 64]  # of titles, and one longer
    prompts, size = [], len(prefix)
    while size < scorer.max_tokens or len(prompts) < 2:
        length = min(lengths[len(prompts) % 4], max(1, scorer.limit - len(prefix)))
        prompts.append(prefix + made_up_text(scorer, length, len(prompts) + 1))
        size += length
    return prompts


def padding_changes(scorer):
    """Whether a text's score or embedding changes when a longer text stands beside it in the batch.

    Raises UserError where a second run of the same text gives another one, or NaN.
    """
    long = made_up_text(scorer, min(scorer.limit, 1024), 0)
    if not torch.equal(scores_or_embeddings(scorer, [long]), scores_or_embeddings(scorer, [long])):
        raise UserError(f"model {scorer.name} gives NaN, or another score on a second run, so they mean nothing: "
                        "try --dtype float32")
    lengths = [len(long) // 2, len(long) // 16]  # little padding, and much
    if scorer.type == "embed":
        lengths.insert(0, 3)  # a title; first, since a model that cannot run one (Funnel) has to fail here
    for length in lengths:
        short = made_up_text(scorer, max(2, length), 1)
        alone = scores_or_embeddings(scorer, [short])
        beside = scores_or_embeddings(scorer, [short, long])[0]
        beside_other_pad = scores_or_embeddings(scorer._replace(pad=long[0]), [short, long])[0]
        if not torch.equal(beside, beside_other_pad):  # the padding's content must not be felt at all
            return True
        if (alone[0] - beside).norm() > tolerance(scorer.model.dtype, alone):  # nor its length, but for rounding
            return True
    return False


def scores_or_embeddings(scorer, ids):
    """What a batch of texts (token ids) gives: scores (texts,) or embeddings of length 1 (texts, width)."""
    rows = rows_of(scorer, [ids])
    with torch.no_grad():
        return embed_rows(scorer, rows) if scorer.type == "embed" else score_rows(scorer, rows)

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
    for score in scores[labels == 1]:
        gain += discount(ranks_of(score, scores), k).mean()
    best = discount(np.arange(1, labels.sum() + 1), k).sum()
    return gain / best


def first_positive(scores, labels):
    """(ranks, probabilities): where the first positive may stand under random order of ties.

    With p positives among the g candidates that tie at the top positive's score, the first positive comes j-th among
    them with probability C(g - j, p - 1) / C(g, p): the other p - 1 are among the g - j behind it.
    """
    top = scores[labels == 1].max()
    ranks = ranks_of(top, scores)
    g, p = len(ranks), int(labels[scores == top].sum())
    chances = []
    for j in range(1, g - p + 2):  # at the latest, all other candidates come before
        chances.append(math.comb(g - j, p - 1) / math.comb(g, p))
    return ranks[:len(chances)], np.array(chances)


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


def metric_per_user(name, users):
    """A metric of each of the users, [(scores, labels)]: an array (users,), NaN where a user does not count."""
    return np.array([user_metric(name, scores, labels) for scores, labels in users])


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

# ------------------------------------------------------------------------------------------------------- intervals


def bootstrap(name, users, draws=1000, seed=0):
    """A metric over users, [(scores, labels)], then over `draws` resamples of them: an array (1 + draws,).

    NaN where undefined. Users are drawn with replacement, all samples of a user together (percentile bootstrap, Efron
    1979). Which are drawn depends on the seed and the number of users alone: the arrays of two models on the same users
    are paired, and may be subtracted. Raises UserError where a score is NaN or infinite.
    """
    scores = np.concatenate([scores for scores, _ in users])
    bad = (~np.isfinite(scores)).sum()
    if bad:
        raise UserError(f"{bad} of {len(scores)} scores are NaN or infinite; try --dtype float32")
    if name == "auc":
        statistic, values = weighted_auc, all_samples(users)
    else:
        statistic, values = weighted_mean, metric_per_user(name, users)
    rng = np.random.default_rng(seed)
    n = len(users)
    result = [statistic(values, np.ones(n, int))]  # each user once
    for _ in range(draws):
        drawn = rng.integers(n, size=n)
        result.append(statistic(values, np.bincount(drawn, minlength=n)))  # each as often as drawn
    return np.array(result)


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
        if name != "auc":
            result["users_counted"][name] = int(np.isfinite(metric_per_user(name, users)).sum())
    return result

# ------------------------------------------------------------------------------------------------- files and flags

# Of what follows, the method needs `digest`, the hash by which samples are chosen, and `read_users`.

FORMAT = 1  # version of the standard format: data/<dataset>/{items,train,valid,test}.jsonl and meta.json
SPLITS = ("train", "valid", "test")


def digest(*parts):
    """A 64-bit integer from the parts: blake2b, so the same on every machine, unlike hash()."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def write_atomically(path, text):
    """Write text under a temporary name beside path and rename it: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half surrogates, as JSON writes them
    os.replace(temporary, path)


def write_json(path, value):
    """JSON, indented, atomically; NaN is refused with ValueError (it is no JSON)."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    """The JSON value of a file. Raises UserError where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def read_lines(path):
    """Yield (line number, JSON object) of a .jsonl file. Raises UserError where a line is broken."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number}: not JSON") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, value


def read_meta(data, name):
    """meta.json of a prepared dataset. Raises UserError with what to do."""
    if Path(name).name != name:
        raise UserError(f"{name!r} is not a dataset's name: it is {Path(name).name!r}, and --data says in which folder")
    path = Path(data, name, "meta.json")
    if not path.exists():
        if name not in DOMAINS:
            raise UserError(f"unknown dataset {name!r}; there are {', '.join(DOMAINS)}; one of your own is a folder "
                            f"{Path(data, name)} with a meta.json")
        what = "demo" if name in DEMO else f"{name} --raw RAW"
        raise UserError(f"dataset {name} is not prepared ({path} is missing); "
                        f"run: python prepare_data.py {what} --out {data} (or is --data wrong?)")
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("domain"), str):
        raise UserError(f'{path}: this version reads {{"format": {FORMAT}, "domain": "...", ...}}; prepare it again')
    return meta


def check_datasets(data, names, split):
    """{name: meta.json} of datasets, each prepared and with this split; repeats are merged. Raises UserError."""
    metas = {}
    for name in names:
        metas[name] = read_meta(data, name)
        path = Path(data, name, f"{split}.jsonl")
        if not path.exists():
            raise UserError(f"dataset {name} has no {split} split ({path} is missing); "
                            "prepare it with --test-size or --train-size")
    return metas


def prepared(data, split):
    """Names of the datasets in the folder data that have this split: the benchmark's, in its order, then others."""
    found = set()
    for path in Path(data).glob(f"[!.]*/{split}.jsonl"):  # with a dot: it is being written, see prepare_data.py
        if path.with_name("meta.json").exists():
            found.add(path.parent.name)
    return [name for name in DOMAINS if name in found] + sorted(found - set(DOMAINS))


def domains_of(metas):
    """{dataset: domain} of the benchmark's datasets and of those with these meta.json."""
    return {**DOMAINS, **{name: meta["domain"] for name, meta in metas.items()}}


def data_sha256(data, name):
    """sha256 over the items and splits of a dataset: what its results were computed from."""
    content = hashlib.sha256()
    for part in ("items", *SPLITS):
        path = Path(data, name, f"{part}.jsonl")
        if path.exists():
            content.update(f"{part} {path.stat().st_size}\n".encode())  # where one file ends and the next begins
            content.update(path.read_bytes())
    return content.hexdigest()


def read_items(data, name):
    """Item texts of a dataset: {item id: text}. Raises UserError, naming the line."""
    path = Path(data, name, "items.jsonl")
    items = {}
    for number, row in read_lines(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}, line {number}: an item is {{"id": "...", "text": "..."}}, both strings')
        if re.search("[\ud800-\udfff]", row["text"]):  # JSON's escapes can write one
            raise UserError(f"{path}, line {number}: the text holds half a surrogate pair, which is no character")
        if row["id"] in items:
            raise UserError(f"{path}, line {number}: the id {row['id']!r} is there twice")
        items[row["id"]] = row["text"]
    return items


def read_users(data, name, split, limit=None):
    """The users of a split, in order, and the texts of the dataset's items: ([user], {item id: text}).

    A user is {"user": name, "history": [item ids, oldest first], "candidates": [item ids], "labels": [0 or 1]}. Each
    line is checked as it is read. Raises UserError with file, line number and what is wrong.
    """
    items = read_items(data, name)
    path = Path(data, name, f"{split}.jsonl")
    users = []
    for number, user in read_lines(path):
        fault = user_fault(user, items)
        if fault:
            raise UserError(f"{path}, line {number}: {fault}")
        users.append(user)
        if len(users) == limit:
            break
    if not users:
        raise UserError(f"{path} is empty: there are no users")
    return users, items


def user_fault(user, items):
    """What is wrong with a user's line, None where nothing is."""
    if not isinstance(user.get("user"), str):
        return '"user" must be a string'
    for key in ("history", "candidates"):
        ids = user.get(key)
        if not isinstance(ids, list):
            return f'"{key}" must be a list of item ids'
        for item in ids:
            if not isinstance(item, str) or item not in items:
                return f'"{key}" holds {item!r}, which is no item id of items.jsonl'
    labels = user.get("labels")
    if not user["candidates"] or not isinstance(labels, list) or len(labels) != len(user["candidates"]):
        return '"labels" must hold one label per candidate, and there must be at least one candidate'
    for label in labels:
        if type(label) is not int or label not in (0, 1):
            return f"a label is 0 or 1, not {json.dumps(label)}"
    return None


def items_of(users):
    """The ids of the items of users, sorted."""
    ids = set()
    for user in users:
        ids.update(user["history"], user["candidates"])
    return sorted(ids)


def count_long_texts(users, items):
    """How many of the items of users have a text that with_texts cuts."""
    return sum(len(items[item]) > TEXT_LIMIT for item in items_of(users))


def folder_sha256(folder, pattern="**/*"):
    """A hash of a folder's files, so that another content under an old name is noticed: names, sizes, samples.

    Of a file of a megabyte or less all is read, of a larger one 64 places: retraining changes all of them, an edit of
    some weights may go unseen.
    """
    content = hashlib.sha256()
    for path in sorted(Path(folder).glob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            size = path.stat().st_size
            content.update(f"{path.relative_to(folder)} {size}\n".encode())
            with open(path, "rb") as file:
                for part in range(64):  # of 16 KiB
                    file.seek(size * part // 64)
                    content.update(file.read(2**14))
    return content.hexdigest()


def adapter_identity(run):
    """What identifies the adapter of a finetune.py run in a job; None without one."""
    return folder_sha256(run, "adapter_*") if run else None


def model_identity(model):
    """What identifies a model in a job: a hub id, or the hash of a local folder, which may move."""
    name = model_name(model)
    return f"sha256 {folder_sha256(name)}" if Path(name).is_dir() else name


def job_of(args, ignored):
    """What an output is made of: a dict of the arguments, with what the prompt, the dtype and the model are in the end.

    Left out are arguments that change nothing or no more than rounding, those named here and in `ignored`. What is in
    the folder --data changes results: callers add its data_sha256.
    """
    ignored = ("data", "out", "device", "overwrite", "trust_remote_code", "max_tokens", *ignored)
    job = {key: value for key, value in vars(args).items() if key not in ignored}
    job["prompt"] = load_prompt(args.prompt)
    _, job["dtype"] = placement(args)
    job["model"] = model_identity(args.model)
    return job


def job_in(path):
    """The "job" in an output (.jsonl: in its first line); {} where another program wrote it, None without a file."""
    if not Path(path).exists():
        return None
    with open(path, "rb") as file:
        text = file.readline() if Path(path).suffix == ".jsonl" else file.read()
    try:
        return dict(json.loads(text)["job"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def job_status(path, job, found, finished):
    """What to do about an output at `path`: "start", "continue" or "finished".

    found: what job_in gives for what stands there. Raises UserError where that is another job, or none.
    """
    if found is None:
        return "start"
    if not found:
        raise UserError(f"{path} was not made by this script, or parts of it are gone or edited: "
                        "choose another --out or give --overwrite")
    changed = [key for key in {**job, **found} if job.get(key) != found.get(key)]
    if changed:
        raise UserError(f"{path} was made with a different {', '.join(changed)}: "
                        "choose another --out or give --overwrite")
    return "finished" if finished else "continue"


def read_run(folder, args):
    """run.json of a finetune.py run; without one, that of the base model, which has seen no dataset.

    Raises UserError where the run is unfinished or of another model or type.
    """
    if not folder:
        return {"train_chain": [], "valid_chain": [], "domains": {}}
    path = Path(folder, "run.json")
    if not job_in(path):
        raise UserError(f"{folder} holds no finished run of finetune.py (run.json is missing or of another program)")
    run = read_json(path)
    if run["job"]["model"] != model_identity(args.model) or run["type"] != args.type:
        raise UserError(f"{folder} is an adapter for --model {run['model']} --type {run['type']}, not for "
                        f"--model {args.model} --type {args.type} (or the model's files have changed)")
    return run


def versions():
    """The versions that a result was made with."""
    from importlib.metadata import version
    packages = ("torch", "transformers", "peft", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}


def peak_memory_gb(device):
    """Peak memory in GB: on a GPU since the model was loaded, else of this process; None on Windows."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS says bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def markdown_table(rows):
    """A Markdown table of rows of str; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(message):
    """A line on standard error, beside progress bars; from torchrun's first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


def whole_number(text, least=0):
    """An int from `least` on, below 2**31, for argparse."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} (and below 2**31)")
    return int(text)


def positive_number(text):
    """An int of at least 1, for argparse."""
    return whole_number(text, 1)


def output_folder(text):
    """A path to write a folder to, for argparse."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, and a folder is needed")
    return text


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it stands, and the defaults of the flags that have one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (UserError) and whose help is the script's docstring."""

    def __init__(self, doc, script=None):
        super().__init__(prog=script, description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{self.prog}: {message} (see --help)")


def shared_arguments(parser):
    """The flags that finetune.py, evaluate.py and transfer_matrix.py share."""
    add = parser.add_argument_group("shared flags").add_argument
    add("--data", default="data", metavar="DIR", help="folder that prepare_data.py wrote (its --out)")
    add("--type", choices=["prompt", "embed"], default="prompt",
        help="score by the Yes/No logits of a prompt or by the cosine of embeddings")
    add("--prompt", metavar="FILE", help="JSON file with wording of your own; keys as in PROMPT in common.py")
    add("--chat-template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    add("--pooling", choices=["auto", "cls", "mean", "last"], default="auto",
        help="embedding of a text: its first token, the mean over tokens, or its last token; auto: as the model's own "
             "files say, else last for decoder-only models and mean for others")
    add("--seed", type=whole_number, metavar="N", default=2025, help="seed of everything random")
    add("--device", help="cpu, cuda, cuda:1, ... (if not given: CUDA where available)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16", "float64"], default="auto",
        help="of the model's weights; auto: bfloat16 on CUDA, float32 elsewhere")
    add("--max-length", type=positive_number, metavar="TOKENS", default=1024,
        help="tokens per text, at most; histories are cut to it, oldest items first")
    add("--max-tokens", type=positive_number, metavar="TOKENS", help="tokens per forward pass; lower it if memory runs "
        "out (if not given: 8192, on a CPU 1024, where more would leave its cache)")
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
