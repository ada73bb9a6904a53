"""Scores against the plain truth: one prompt, one forward, the model's own full logits at the answer position."""
import builtins
import dis
import inspect
import json
import os
import types
from collections import Counter

import numpy as np
import peft
import pytest
import safetensors.torch
import tiny
import torch
import transformers

import common

SHARED = ["the red moon", "the red", "the red moon river", "blue garden", "the red moon", ""]  # prefixes, a twin
USERS = [  # (history, candidates)
    (["the red moon", "old river song", "storm king"], SHARED),
    (["queen of night"] * 5, ["shadow", "shadow", "light"]),
    (["a storm {candidate}", "two\nlines", "{history}"], ["{candidate}", "moon {n} {", "{}", "moon\n\nlight"]),
    (["x"], ["road"]),
]
OWN_END = {"prompt": "{history}\nlike {candidate}", "item": "- {text}"}  # the prompt ends with the candidate
ANSWERS = {"byte_level": ("ĠYes", "ĠNo"), "word_piece": ("yes", "no"), "sentence_piece": ("▁Yes", "▁No")}
LOADERS = {"bert": transformers.AutoModelForMaskedLM, "roberta": transformers.AutoModelForMaskedLM,
           "t5": transformers.AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(family, tokenizer) -> folder of a tiny model, each built once."""
    made = {}

    def build(family, tokenizer=None, **changes):
        key = str((family, tokenizer, changes))
        if key not in made:
            own = getattr(tiny, tokenizer)() if tokenizer else None
            made[key] = tiny.build(family, tmp_path_factory.mktemp(family), own, **changes)
        return made[key]
    return build


def flags(folder, *more):
    parser = common.Parser("")
    parser.add_argument("--model")
    common.shared_arguments(parser)
    return parser.parse_args(["--model", str(folder), "--device", "cpu", *map(str, more)])


def scorer_of(folder, *more):
    return common.load_scorer(flags(folder, *more))


def scores_of(folder, users, *more):
    return common.score_prompts(scorer_of(folder, *more), users)[0]


def plain_prompts(users, wording=common.PROMPT):
    """The prompts of all users, written with str.split and +."""
    texts = []
    before, rest = wording["prompt"].split("{history}")
    middle, after = rest.split("{candidate}")
    for history, candidates in users:
        line = wording["item"].replace("{text}", "%s")
        lines = [line.replace("{n}", str(n)) % text for n, text in enumerate(history, 1)]
        texts += [before + wording["join"].join(lines) + middle + candidate + after for candidate in candidates]
    return texts


def plain_scores(folder, prompts, kind="causal", words=None, network=None, ends_with_eos=False, **options):
    """logit(yes) - logit(no), one prompt and one forward at a time, from the whole vocabulary's logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = network or LOADERS.get(kind, transformers.AutoModelForCausalLM).from_pretrained(folder, **options).eval()
    vocabulary = tokenizer.get_vocab()
    words = words or next(pair for pair in ANSWERS.values() if pair[0] in vocabulary)
    yes, no = (vocabulary[word] for word in words)
    scores = []
    for text in prompts:
        if kind in ("bert", "roberta"):
            text += tokenizer.mask_token
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = ids[:, :-1] if ends_with_eos else ids
        with torch.no_grad():
            if kind == "t5":
                logits = network(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
            else:  # [SEP] follows BERT's mask; RoBERTa here ends with it
                logits = network(input_ids=ids).logits[0, -2 if kind == "bert" else -1]
        scores.append(float(logits[yes]) - float(logits[no]))
    return np.array(scores)


def assert_same(got, want, spread=0.05):
    assert np.std(want) > spread, "the truth hardly spreads: the test could not fail"
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-5


# ------------------------------------------------------------------------------------------------- families, tokenizers


@pytest.mark.parametrize("family", tiny.PACKED + tiny.UNPACKED + ["bert", "roberta", "t5"])
def test_scores_are_those_of_one_prompt_and_one_forward(model, family):
    scorer = scorer_of(model(family))
    assert scorer.packs == (family in tiny.PACKED) and common.check_packing(scorer, USERS).packs == scorer.packs
    want = plain_scores(model(family), plain_prompts(USERS), kind=family)
    got, counts = common.score_prompts(scorer, USERS)
    assert_same(got, want)
    assert (counts["tokens_scored"] < 0.6 * counts["tokens_unpacked"]) == scorer.packs
    for users in (USERS[::-1], USERS[2:] + USERS[:2]):  # any order of users
        moved = plain_scores(model(family), plain_prompts(users), kind=family)
        assert_same(common.score_prompts(scorer, users)[0], moved)
    for max_tokens in (1, 150):  # packs split, batches of one row or a few
        assert_same(common.score_prompts(scorer._replace(max_tokens=max_tokens), USERS)[0], want)


@pytest.mark.parametrize("tokenizer", ANSWERS)
@pytest.mark.parametrize("wording", [{}, OWN_END])
def test_any_tokenizer_and_candidates_that_are_prefixes_of_one_another(model, tmp_path, tokenizer, wording):
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(wording))
    folder, wording = model("llama", tokenizer), {**common.PROMPT, **wording}
    closed = tokenizer == "word_piece"  # its [SEP] ends every prompt
    want = plain_scores(folder, plain_prompts(USERS, wording))
    assert_same(scores_of(folder, USERS, "--prompt", path), want)
    assert closed or want[0] == want[4] != want[1]
    assert_same(scores_of(folder, USERS, "--prompt", path, "--max-tokens", 60), want)


def test_a_pack_holds_the_longest_common_prefix_once():
    rows = common.pack([[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2, 3]], range(4), 100)
    assert rows == [common.Row([1], [[2, 3], [2], [2, 3, 4], [2, 3]], [0, 1, 2, 3])]  # a rest is never empty
    assert common.pack([[5, 6, 7], [5, 6, 8], [5, 6, 9]], [4, 5, 6], 4) == [
        common.Row([5, 6], [[7], [8]], [4, 5]), common.Row([5, 6], [[9]], [6])]
    assert common.pack([[5, 6]], [0], 1) == [common.Row([5], [[6]], [0])]
    assert common.pack([[1], [2, 3]], [0, 1], 9) == [common.Row([], [[1], [2, 3]], [0, 1])]


def test_batches_hold_every_row_once_within_the_tokens():
    lengths = [5, 1, 9, 3, 3, 20, 1]
    assert common.fill_batches(lengths, 10) == [[5], [2], [0], [3, 4], [1, 6]]


@pytest.mark.parametrize("eager", [False, True])
def test_a_packed_forward_under_both_kinds_of_attention(model, eager):
    scorer = scorer_of(model("llama"))
    scorer.model.set_attn_implementation("eager" if eager else "sdpa")
    assert_same(common.score_prompts(scorer, USERS)[0], plain_scores(model("llama"), plain_prompts(USERS)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mpt", "bert", "t5"])
def test_scores_with_a_lora_adapter(model, tmp_path, family):
    folder = model(family)
    plain = LOADERS.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder)
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, target_modules="all-linear")
    plain = peft.get_peft_model(plain, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    plain.save_pretrained(tmp_path)
    want = plain_scores(folder, plain_prompts(USERS), kind=family, network=plain.eval())
    scorer = common.load_adapter(scorer_of(folder), tmp_path)
    assert_same(common.score_prompts(scorer, USERS)[0], want)
    assert np.abs(want - plain_scores(folder, plain_prompts(USERS), kind=family)).max() > 0.05  # the adapter matters


def test_gradients_packed_are_those_of_separate_prompts(model):
    def gradients(packs):
        scorer = scorer_of(model("llama"), "--dtype", "float64")._replace(packs=packs)
        rows, _ = common.prompt_rows(scorer, USERS, scorer.max_tokens)
        gaps = torch.cat([common.answer_gaps(scorer, [row]) for row in rows])
        gaps = gaps[torch.tensor(np.argsort([place for row in rows for place in row.places]))]
        (gaps * torch.linspace(-1, 1, len(gaps), dtype=gaps.dtype)).sum().backward()
        return {name: p.grad for name, p in scorer.model.named_parameters() if p.grad is not None}
    packed, separate = gradients(True), gradients(False)
    assert len(packed) == len(separate) > 10
    for name, gradient in separate.items():
        assert (packed[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi", "mistral-window", "gemma3-window"])
def test_a_model_that_nobody_listed_is_caught_by_scoring_one_user_both_ways(model, monkeypatch, capsys, family):
    monkeypatch.setattr(common, "packing_refusal", lambda *_: None)
    scorer = scorer_of(model(family))
    assert scorer.packs
    checked = common.check_packing(scorer, USERS)
    assert not checked.packs and "without packing" in capsys.readouterr().err
    assert_same(common.score_prompts(checked, USERS)[0], plain_scores(model(family), plain_prompts(USERS)))


def test_a_window_as_long_as_the_prompts_packs(model):
    assert scorer_of(model("mistral-window", sliding_window=200), "--max-length", 200).packs
    assert not scorer_of(model("mistral-window", sliding_window=200), "--max-length", 201).packs


# -------------------------------------------------------------------------------------------------- precision of scores


def many_users(n):
    words = sorted({word for word in tiny.WORDS if word.isalpha()})
    candidates = [f"{a} {b} {c}" for a in words for b in words[5:] for c in words[9:11]][:n]
    return [(["the red moon", "old river song", "storm king"], candidates)]


def test_bfloat16_scores_stay_distinct_where_bfloat16_logits_tie(model):
    users = many_users(400)
    exact = scores_of(model("llama"), users)
    half = scores_of(model("llama"), users, "--dtype", "bfloat16", "--max-tokens", 2000)
    logits = plain_scores(model("llama"), plain_prompts(users), dtype=torch.bfloat16)
    spread = np.abs(half - exact).max() / exact.std()
    print(f"bfloat16: distinct of 400: scores {len(set(half))}, plain logits {len(set(logits))}; largest difference to "
          f"float32 {np.abs(half - exact).max():.4f} = {spread:.3f} standard deviations of the scores")
    assert len(set(exact)) == len(set(half)) == 400 > len(set(logits)) + 50
    assert spread < 0.3 and np.corrcoef(half, exact)[0, 1] > 0.99


@pytest.mark.parametrize("family", ["gemma2", "cohere", "bert", "t5", "opt-350m"])
def test_the_two_row_head_is_float32_in_a_bfloat16_model(model, family):
    scorer = scorer_of(model(family), "--dtype", "bfloat16")
    rows, _ = common.prompt_rows(scorer, USERS, 8192)
    gaps = common.answer_gaps(scorer, rows)
    head = scorer.model.get_output_embeddings()
    assert gaps.dtype == torch.float64 and head.weight.dtype == torch.float32 and head.weight.shape[0] == 2
    assert not torch.equal(gaps, gaps.bfloat16().double())  # finer than bfloat16


# ------------------------------------------------------------------------------------- prompts, answers, chat templates


@pytest.mark.parametrize("family, tokenizer, special", [
    ("bert", "word_piece", "[MASK]"), ("bert", "word_piece", "[SEP]"), ("roberta", "sentence_piece", "<mask>"),
    ("llama", "byte_level", "</s>"), ("llama", "byte_level", "<pad>"), ("llama", "sentence_piece", "<mask>")])
def test_special_tokens_in_a_title_do_not_move_the_answer(model, family, tokenizer, special):
    users = [([f"the {special} moon", special], [f"red {special}", special, "blue garden"]), *USERS]
    folder = model(family, tokenizer)
    assert_same(scores_of(folder, users), plain_scores(folder, plain_prompts(users), kind=family))


def test_an_eos_that_the_tokenizer_adds_is_taken_off(model, tmp_path):
    folder = tiny.build("llama", tmp_path, tiny.sentence_piece(eos=True))
    assert_same(scores_of(folder, USERS), plain_scores(folder, plain_prompts(USERS), ends_with_eos=True))


def test_chat_template_adds_no_second_bos_and_strips_the_answers(model, tmp_path):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}Question: {{ m['content'] }}\n{% endfor %}" \
                              "{% if add_generation_prompt %}Answer:\n{% endif %}"
    folder = tiny.build("llama", tmp_path, tokenizer)
    scorer = scorer_of(folder, "--chat-template")
    rows, _ = common.prompt_rows(scorer, USERS, 8192)
    assert all((row.prefix + row.rests[0]).count(tokenizer.bos_token_id) == 1 for row in rows)
    prompts = ["Question: " + text + "\nAnswer:\n" for text in plain_prompts(USERS)]  # the tokenizer adds the BOS here
    assert_same(common.score_prompts(scorer, USERS)[0], plain_scores(folder, prompts, words=("Yes", "No")))
    with pytest.raises(common.UserError, match="chat-template"):
        scorer_of(model("llama"), "--chat-template")


def test_special_tokens_false_gives_the_bare_text(model, tmp_path):
    (tmp_path / "bare.json").write_text('{"special_tokens": false}')
    scorer = scorer_of(model("llama"), "--prompt", tmp_path / "bare.json")
    prompts = plain_prompts(USERS)
    assert scorer.encode(prompts) == [ids[1:] for ids in scorer_of(model("llama")).encode(prompts)]


def test_answer_tokens():
    byte_level, pieces, words = tiny.byte_level(), tiny.sentence_piece(), tiny.word_piece()
    assert byte_level.convert_ids_to_tokens(common.answer_token(byte_level, "Answer:", " Yes")) == "ĠYes"  # (a)
    assert byte_level.convert_ids_to_tokens(common.answer_token(byte_level, "Answer:\n", "Yes")) == "Yes"
    assert words.convert_ids_to_tokens(common.answer_token(words, "Answer:", " Yes")) == "yes"
    assert pieces.convert_ids_to_tokens(common.answer_token(pieces, "Answer:", " Yes")) == "▁Yes"
    assert pieces.convert_ids_to_tokens(common.answer_token(pieces, "x", "▁No")) == "▁No"  # (b)
    with pytest.raises(common.UserError, match=r"'Perhaps' is no single token: .*'Answer', ':'.* becomes .*'p', 's'"):
        common.answer_token(byte_level, "Answer:", "Perhaps")


def test_two_answers_that_are_one_token_are_refused(model, tmp_path):
    (tmp_path / "same.json").write_text('{"answers": [" yes", " Yes"]}')
    with pytest.raises(common.UserError, match="both answers"):
        scorer_of(model("bert"), "--prompt", tmp_path / "same.json")


@pytest.mark.parametrize("text, word", [
    ('{"promt": "{history} {candidate}"}', "unknown key 'promt'; a prompt file is a JSON object with keys out of item, join"),
    ('{"prompt": "{history} {candidat}"}', "lacks {candidate}"), ('{"answers": ["yes"]}', "answers"),
    ('{"answers": "yes"}', "wrong value for answers"), ('{"join": 3}', "join"),
    ('[1]', "JSON object"), ('{"item": ', "cannot be read")])
def test_a_prompt_file_with_a_mistake_is_refused(tmp_path, text, word):
    (tmp_path / "prompt.json").write_text(text)
    with pytest.raises(common.UserError, match=word):
        common.load_prompt(tmp_path / "prompt.json")


# ----------------------------------------------------------------------------------------------------------- truncation


def decoded(scorer, history, candidates):
    """The texts that are scored for a user, and the counts."""
    rows, counts = common.prompt_rows(scorer._replace(packs=False), [(history, candidates)], 8192)
    return [scorer.tokenizer.decode(row.rests[0], skip_special_tokens=True) for row in rows], counts, rows


def test_the_oldest_items_go_first_for_all_candidates_of_a_user(model):
    history = [f"old river song {n} king" for n in range(10, 32)]
    candidates = ["moon", "the red moon river stone garden", "light"]
    cut = [(history[-7:], candidates)]
    limit = max(map(len, scorer_of(model("llama")).encode(plain_prompts(cut))))  # the longest of 7 items just fits
    scorer = scorer_of(model("llama"), "--max-length", limit)
    texts, counts, rows = decoded(scorer, history, candidates)
    assert texts == plain_prompts(cut)  # renumbered, one history for all candidates
    assert max(len(row.rests[0]) for row in rows) == limit and counts["histories"] == 1 and counts["halved"] == 0
    shorter, _, _ = decoded(scorer._replace(limit=limit - 1), history, candidates)
    assert shorter == plain_prompts([(history[-6:], candidates)])
    users = [(history, candidates), *USERS]
    assert_same(common.score_prompts(scorer, users)[0], plain_scores(model("llama"), plain_prompts(cut + USERS)))
    assert common.score_prompts(scorer, users)[1]["histories"] == 1


def test_texts_are_halved_when_one_item_is_left(model):
    scorer = scorer_of(model("llama"), "--max-length", 100)
    long = "moon " * 60
    texts, counts, rows = decoded(scorer, ["light", long], [long, "song road"])
    assert max(len(row.rests[0]) for row in rows) <= 100 and counts["halved"] == counts["histories"] == 1
    cuts = [plain_prompts([([long[:300 >> n]], [long[:300 >> n], "song road"[:9 >> n]])]) for n in range(6)]
    assert texts == next(texts for texts in cuts if max(map(len, scorer.encode(texts))) <= 100)
    with pytest.raises(common.UserError, match="the prompt alone is longer than 20 tokens"):
        common.score_prompts(scorer_of(model("llama"), "--max-length", 20), USERS)


@pytest.mark.parametrize("family, key", [
    ("gpt2", "n_positions"), ("bert", "max_position_embeddings"), ("roberta", "max_position_embeddings"),
    ("mpt", "max_seq_len"), ("opt", "max_position_embeddings")])
def test_prompts_fit_the_positions_of_the_model(model, family, key):
    scorer = scorer_of(model(family, **{key: 70}))
    scores, counts = common.score_prompts(scorer, [(["moon light song"] * 40, ["storm", "red road"])])
    assert np.isfinite(scores).all() and counts["histories"] == 1
    assert counts["tokens_unpacked"] > 2 * 60  # and use them


# ----------------------------------------------------------------------------------------------------------- embeddings


def plain_embedding(folder, text, loader, pooling):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, loader).from_pretrained(folder).eval()
    with torch.no_grad():
        states = network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
    return (states[-1] if pooling == "last" else states.mean(0)).double().numpy()


EMBED = [("bert", "AutoModel", "mean"), ("bert-encoder", "AutoModel", "mean"), ("bert", "AutoModel", "last"),
         ("llama", "AutoModel", "last"), ("llama", "AutoModel", "mean"), ("mpt", "AutoModel", "last"),
         ("t5", "T5EncoderModel", "mean"), ("t5-encoder", "T5EncoderModel", "mean")]


@pytest.mark.parametrize("family, loader, pooling", EMBED)
def test_embedding_scores_are_cosines_of_one_text_at_a_time(model, family, loader, pooling):
    folder, users = model(family), USERS[:2] + USERS[3:]
    auto = pooling == ("last" if family in ("llama", "mpt") else "mean")  # the default for the family
    scorer = scorer_of(folder, "--type", "embed", *([] if auto else ["--pooling", pooling]), "--max-tokens", 100)
    want = []
    for history, candidates in users:
        lines = "\n".join(f"{n}. {text}" for n, text in enumerate(history, 1))
        user = plain_embedding(folder, common.PROMPT["user"].replace("{history}", lines), loader, pooling)
        for candidate in candidates:
            item = plain_embedding(folder, candidate, loader, pooling)
            want.append(user @ item / np.linalg.norm(user) / np.linalg.norm(item))
    assert_same(common.score_embeddings(scorer, users, {})[0], np.array(want), spread=0.02)


def test_each_distinct_text_is_encoded_once(model):
    scorer = scorer_of(model("bert"), "--type", "embed")
    seen = Counter()
    scorer.model.register_forward_pre_hook(with_kwargs=True, hook=lambda _, args, inputs: seen.update(
        tuple(row[mask.bool()].tolist()) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])))
    known, users = {}, [*USERS, USERS[0], (["x"], ["road", "the red moon"])]
    first, counts = common.score_embeddings(scorer, users, known)
    again, more = common.score_embeddings(scorer, [(["a song"], SHARED)], known)
    items = {text for _, candidates in users for text in candidates}
    assert set(seen.values()) == {1} and len(seen) == len(items) + 5 and set(known) == items
    assert counts["tokens_scored"] + more["tokens_scored"] == sum(map(len, seen))
    assert (first[:6] == first[-8:-2]).all()


def test_an_item_without_any_token_has_an_embedding(model):
    scorer = scorer_of(model("llama"), "--type", "embed")
    bare = scorer._replace(encode=lambda texts: common.encode_texts(scorer.tokenizer, False, False, False, texts))
    assert bare.encode(["", "moon"])[0] == [scorer.tokenizer.eos_token_id]
    scores, _ = common.score_embeddings(bare, [(["moon"], ["", "light"])], {})
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_long_texts_are_cut_for_embeddings_too(model):
    scorer = scorer_of(model("bert"), "--type", "embed", "--max-length", 40)
    scores, counts = common.score_embeddings(scorer, [(["the red moon"] * 30, ["moon " * 100, "light"])], {})
    assert np.isfinite(scores).all() and counts["histories"] == 1 and counts["halved"] == 1
    users, _ = common.embedding_tokens(scorer, [["the red moon"] * 30], [])
    assert len(users[0]) <= 40


@pytest.mark.skipif("RECBENCH_ENCODER" not in os.environ, reason="RECBENCH_ENCODER: folder of a sentence encoder")
def test_a_real_sentence_encoder_tells_related_texts_from_others(tmp_path):
    folder = os.environ["RECBENCH_ENCODER"]
    items = ["A trip to the moon in a spaceship", "Easy recipes with tomatoes"]
    users = [(["A rocket to the moon", "Space travel and planets"], items),
             (["Italian cooking for beginners", "How to bake bread"], items)]
    got = common.score_embeddings(scorer_of(folder, "--type", "embed"), users, {})[0]
    print("related and unrelated:", got.round(3))
    assert got[0] > got[1] + 0.1 and got[3] > got[2] + 0.1
    want = []
    for history, candidates in users:
        lines = "\n".join(f"{n}. {text}" for n, text in enumerate(history, 1))
        user = plain_embedding(folder, common.PROMPT["user"].replace("{history}", lines), "AutoModel", "mean")
        items = [plain_embedding(folder, text, "AutoModel", "mean") for text in candidates]
        want += [user @ item / np.linalg.norm(user) / np.linalg.norm(item) for item in items]
    assert_same(got, np.array(want))


# ---------------------------------------------------------------------------------------------------- models, baselines


@pytest.mark.parametrize("family", ["bert-encoder", "t5-encoder"])
def test_a_model_without_lm_head_is_refused_for_prompts(model, family):
    with pytest.raises(common.UserError, match="has no LM head .*--type embed"):
        scorer_of(model(family))


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(model, tmp_path):
    tokenizer = tiny.word_piece()
    tokenizer.mask_token = None
    with pytest.raises(common.UserError, match="no mask token"):
        scorer_of(tiny.build("bert", tmp_path, tokenizer))


def test_baselines_by_hand():
    items = {"a": "Red moon rising", "b": "the RED moon", "c": "green tea", "d": "moon, moon red"}
    user = {"user": "u", "history": ["a"], "candidates": ["b", "c", "d"]}
    overlap = common.baseline_scores("overlap", 1, "books", user, items, None)
    assert overlap == pytest.approx([2 / 3, 0, 3 / np.sqrt(3 * 5)])
    assert common.baseline_scores("popularity", 1, "books", user, items, Counter(b=3, d=1)) == [3, 0, 1]
    of = [(1, "books", "u"), (2, "books", "u"), (1, "mind", "u"), (1, "books", "v"), (1, "books", "u")]
    random = [common.baseline_scores("random", seed, name, {**user, "user": i}, items, None) for seed, name, i in of]
    assert random[0] == random[4] and len({x for scores in random for x in scores}) == 12
    many = [common.baseline_scores("random", 1, "books", {**user, "user": n}, items, None) for n in range(3000)]
    assert 0 <= np.min(many) and np.max(many) < 1 and abs(np.mean(many) - 0.5) < 0.01


# --------------------------------------------------------------------------------------------------------- to copy from


def names_used(code):
    """Global names that a function's code, and the code inside it, refers to."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    loads = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return loads.union(*map(names_used, inner))


def test_every_function_of_common_can_be_copied_with_the_imports_and_public_names_it_uses():
    functions = {name: f for name, f in vars(common).items() if inspect.isfunction(f) and f.__module__ == "common"}
    assert len(functions) > 60
    for name, function in functions.items():
        used = names_used(function.__code__) - {"__class__"}
        assert not [n for n in used if n.startswith("_") and not n.startswith("__")], f"{name} uses a private name"
        assert used <= set(vars(common)) | set(vars(builtins)), f"{name} refers to {used - set(vars(common))}"
        assert not function.__closure__, f"{name} closes over another function's variables"
        state = [n for n in used & set(vars(common)) if isinstance(vars(common)[n], (list, set, np.ndarray, Counter))]
        assert not [n for n in state if not n.isupper()], f"{name} uses changing module state"
    assert not [n for f in functions.values() for n in f.__code__.co_names if n in ("globals", "setattr")]


def test_weights_that_are_not_there_are_no_embeddings(tmp_path):
    folder = tiny.build("bert", tmp_path / "bert")
    weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
    safetensors.torch.save_file({k: v for k, v in weights.items() if "attention.self.query" not in k}, f"{folder}/model.safetensors")
    with pytest.raises(common.UserError, match="incomplete weights .*query"):
        scorer_of(folder, "--type", "embed")
