"""Scores against the plain truth: one prompt, one forward, the model's own full logits at the answer position."""
import builtins
import dis
import inspect
import json
import os
import shutil
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


def user(name, history, candidates):
    return {"user": name, "history": history, "candidates": candidates}


USERS = [
    user("a", ["the red moon", "old river song", "storm king"], SHARED),
    user("b", ["queen of night"] * 5, ["shadow", "shadow", "light"]),
    user("c", ["a storm {candidate}", "two\nlines", "{history}"], ["{candidate}", "moon {n} {", "{}", "moon\n\nlight"]),
    user("d", ["x"], ["road"]),
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


def scorer_of(folder, *flags):
    parser = common.Parser("")
    parser.add_argument("--model")
    common.shared_arguments(parser)
    return common.load_scorer(parser.parse_args(["--model", str(folder), "--device", "cpu", *map(str, flags)]))


def score(scorer, users=USERS):
    return np.concatenate(common.score_prompts(scorer, users)[0])


def plain_prompts(users, wording=common.PROMPT):
    """The prompts of all users, written with str.split and +."""
    texts = []
    before, rest = wording["prompt"].split("{history}")
    middle, after = rest.split("{candidate}")
    for one in users:
        line = wording["item"].replace("{text}", "%s")
        lines = [line.replace("{n}", str(n)) % text for n, text in enumerate(one["history"], 1)]
        history = wording["join"].join(lines)
        texts += [before + history + middle + candidate + after for candidate in one["candidates"]]
    return texts


def plain_scores(folder, prompts, kind="causal", words=None, network=None, ends_with_eos=False, **options):
    """logit(yes) - logit(no), one prompt and one forward at a time, from the whole vocabulary's logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = network or LOADERS.get(kind, transformers.AutoModelForCausalLM).from_pretrained(folder, **options).eval()
    vocabulary = tokenizer.get_vocab()
    words = words or next(pair for pair in ANSWERS.values() if pair[0] in vocabulary)
    scores = []
    for text in prompts:
        if kind in ("bert", "roberta") and tokenizer.mask_token not in text[-12:]:
            text += tokenizer.mask_token
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = ids[:, :-1] if ends_with_eos else ids
        with torch.no_grad():
            if kind == "t5":
                logits = network(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
            elif kind in LOADERS:
                logits = network(input_ids=ids).logits[0, ids[0].tolist().index(tokenizer.mask_token_id, -3)]
            else:
                logits = network(input_ids=ids).logits[0, -1]
        scores.append(float(logits[vocabulary[words[0]]]) - float(logits[vocabulary[words[1]]]))
    return np.array(scores)


def assert_same(got, want, spread=0.05):
    assert np.std(want) > spread, "the truth hardly spreads: the test could not fail"
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-5


# ------------------------------------------------------------------------------------------------- families, tokenizers


@pytest.mark.parametrize("family", tiny.PACKED + tiny.UNPACKED + ["bert", "roberta", "t5"])
def test_scores_are_those_of_one_prompt_and_one_forward(model, family):
    scorer = scorer_of(model(family))
    assert (scorer.layout == "packed") == (family in tiny.PACKED)
    want = plain_scores(model(family), plain_prompts(USERS), kind=family)
    got, cost = common.score_prompts(scorer, USERS)
    assert [len(scores) for scores in got] == [6, 3, 4, 1]
    assert_same(np.concatenate(got), want)
    assert (cost["tokens_scored"] < 0.6 * cost["tokens_unpacked"]) == (family in tiny.PACKED)
    moved = plain_scores(model(family), plain_prompts(USERS[::-1]), kind=family)
    assert_same(score(scorer, USERS[::-1]), moved)
    for max_tokens in (1, 150):  # packs split, batches of one row or a few
        assert_same(score(scorer._replace(max_tokens=max_tokens)), want)


@pytest.mark.parametrize("tokenizer", ANSWERS)
@pytest.mark.parametrize("wording", [{}, OWN_END])
def test_any_tokenizer_and_candidates_that_are_prefixes_of_one_another(model, tmp_path, tokenizer, wording):
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(wording))
    folder, wording = model("llama", tokenizer), {**common.PROMPT, **wording}
    appends = tokenizer == "word_piece"  # [SEP], where the answer has to come
    want = plain_scores(folder, plain_prompts(USERS, wording), ends_with_eos=appends)
    scorer = scorer_of(folder, "--prompt", path)
    assert_same(score(scorer), want)
    assert want[0] == want[4] != want[1]
    assert_same(score(scorer._replace(max_tokens=60)), want)


def test_a_wording_that_ends_in_a_special_token_keeps_it(model, tmp_path):
    wording = {**common.PROMPT, "prompt": common.PROMPT["prompt"] + "</s>"}
    (tmp_path / "prompt.json").write_text(json.dumps(wording))
    want = plain_scores(model("llama", "byte_level"), plain_prompts(USERS, wording))
    assert_same(score(scorer_of(model("llama", "byte_level"), "--prompt", tmp_path / "prompt.json")), want)


@pytest.mark.parametrize("max_tokens", [1000, 120])
def test_equal_candidates_get_equal_scores_whatever_the_rounding(model, max_tokens):
    titles = ["the red moon", "old river song", "the red moon", "storm", "the red moon", "storm king"]
    scorer = scorer_of(model("llama"), "--dtype", "bfloat16", "--max-tokens", max_tokens)
    [scores, other], _ = common.score_prompts(scorer, [user("twins", ["old river"], titles), USERS[0]])
    assert scores[0] == scores[2] == scores[4] and len(set(scores)) == 4 and len(other) == len(USERS[0]["candidates"])
    exact = score(scorer_of(model("llama")), [user("twins", ["old river"], titles)])
    assert np.abs(scores - exact).max() < 0.1


def test_an_adapter_s_folder_is_no_base_model(model, tmp_path):
    shutil.copytree(model("llama"), tmp_path / "both")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    peft.get_peft_model(network, peft.LoraConfig()).save_pretrained(tmp_path / "both")
    with pytest.raises(common.UserError, match="holds an adapter: give it as --adapter"):
        scorer_of(tmp_path / "both")


def test_a_row_holds_the_longest_common_prefix_once(model):
    packed = scorer_of(model("llama"))._replace(layout="packed", max_tokens=100)
    assert common.rows_of(packed, [[[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2, 3]]]) == [
        common.Row([1], [[2, 3], [2], [2, 3, 4], [2, 3]], [0, 1, 2, 3])]  # a suffix is never empty
    short = packed._replace(max_tokens=4)
    assert common.rows_of(short, [[[5, 6]], [[5, 6, 7], [5, 6, 8], [5, 6, 9]]]) == [
        common.Row([5], [[6]], [0]), common.Row([5, 6], [[7], [8]], [1, 2]), common.Row([5, 6], [[9]], [3])]
    assert common.rows_of(packed._replace(max_tokens=1), [[[5, 6]]]) == [common.Row([5], [[6]], [0])]
    assert common.rows_of(packed, [[[1], [2, 3]]]) == [common.Row([], [[1], [2, 3]], [0, 1])]
    assert common.rows_of(packed._replace(layout="padded"), [[[5, 6], [5, 7]], [[5, 8]]]) == [
        common.Row([5], [[6]], [0]), common.Row([5], [[7]], [1]), common.Row([5], [[8]], [2])]


def test_batches_hold_every_row_once_within_the_tokens(model):
    scorer = scorer_of(model("llama"))._replace(max_tokens=10)

    def batches(scorer, lengths):
        rows = [common.Row([], [[7] * length], [i]) for i, length in enumerate(lengths)]
        return [common.indices_of(batch) for batch in common.fill_batches(scorer, rows)]
    assert batches(scorer, [5, 1, 9, 3, 3, 20, 1]) == [[5], [2], [0], [3, 4], [1, 6]]
    assert batches(scorer._replace(layout="equal", max_tokens=99), [4, 3, 4, 5]) == [[3], [0, 2], [1]]


def test_the_mask_is_that_of_the_picture():
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, -1]])
    shown = ["1......", "11.....", "111....", "1111...", "111.1..", "111.11."]
    mask = common.packed_mask(segments)[0, 0]
    for row, line in zip(mask, shown):
        assert "".join("1" if seen else "." for seen in row) == line


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_forward_under_both_kinds_of_attention(model, attention):
    scorer = scorer_of(model("llama"))
    scorer.model.set_attn_implementation(attention)
    assert_same(score(scorer), plain_scores(model("llama"), plain_prompts(USERS)))


def save_lora(network, folder):
    """The network with a LoRA adapter that matters, which is saved in the folder."""
    network = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5,
                                                           target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    network.save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mpt", "bert", "t5"])
def test_scores_with_a_lora_adapter(model, tmp_path, family):
    folder = model(family)
    network = save_lora(LOADERS.get(family, transformers.AutoModelForCausalLM).from_pretrained(folder), tmp_path)
    want = plain_scores(folder, plain_prompts(USERS), kind=family, network=network)
    scorer = common.load_adapter(scorer_of(folder), tmp_path)
    assert_same(score(scorer), want)
    assert np.abs(want - plain_scores(folder, plain_prompts(USERS), kind=family)).max() > 0.05  # the adapter matters


@pytest.mark.parametrize("change", ["renamed", "half"])
def test_an_adapter_whose_weights_do_not_match_is_refused(model, tmp_path, change):
    """peft itself would leave the base model's scores in place, with a warning at most."""
    folder = model("llama")
    save_lora(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    if change == "renamed":
        weights = {key.replace("self_attn", "attention"): value for key, value in weights.items()}
    else:
        weights = {key: value for key, value in weights.items() if "layers.0" in key}
    safetensors.torch.save_file(weights, file)
    with pytest.raises(common.UserError, match="does not fit .* weights are missing"):
        common.load_adapter(scorer_of(folder), tmp_path)


def test_gradients_packed_are_those_of_separate_prompts(model):
    def gradients(layout):
        scorer = scorer_of(model("llama"), "--dtype", "float64")._replace(layout=layout)
        rows = common.rows_of(scorer, [common.encode_user(scorer, one)[0] for one in USERS])
        scores = torch.cat([common.score_rows(scorer, [row]) for row in rows])  # one user after the other
        (scores * torch.linspace(-1, 1, len(scores), dtype=scores.dtype)).sum().backward()
        return {name: p.grad for name, p in scorer.model.named_parameters() if p.grad is not None}
    packed, separate = gradients("packed"), gradients("padded")
    assert len(packed) == len(separate) > 10
    for name, gradient in separate.items():
        assert (packed[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


# ------------------------------------------------------------------------ how a model may be batched: it is asked itself


def tiny_network(folder, config_name, model_name, tokenizer=None, scale=6.0, **changes):
    """A tiny model of a class that tiny.FAMILIES lacks, scaled up so that scores spread."""
    tokenizer = tokenizer or tiny.byte_level()
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(vocab_size=len(tokenizer) + 4, pad_token_id=0, **changes)
    network = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(scale) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
STATEFUL = {  # layers that carry a state from token to token
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", dict(SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])),
    "mamba": ("MambaConfig", "MambaForCausalLM", dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", dict(SMALL, num_key_value_heads=2, num_local_experts=2, block_size=8,
                                                           layer_types=["linear_attention", "full_attention"])),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STATEFUL)
def test_layers_with_a_state_are_not_packed(tmp_path, capsys, name, dtype):
    config_name, model_name, changes = STATEFUL[name]
    folder = tiny_network(tmp_path, config_name, model_name, scale=3.0, **changes)
    scorer = scorer_of(folder, "--dtype", dtype)
    assert scorer.layout != "packed"
    message = capsys.readouterr().err
    assert "without packing" in message and "ALiBi" not in message
    if dtype == "float32":
        want = plain_scores(folder, plain_prompts(USERS))
        assert np.abs(score(scorer) - want).max() < 1e-4 * (1 + np.abs(want).max())


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi"])
def test_positions_by_place_are_noticed_though_the_forward_takes_position_ids(model, monkeypatch, family):
    scorer = scorer_of(model(family))
    monkeypatch.setattr(common.inspect, "signature", lambda function: type("", (), {"parameters": ["position_ids"]}))
    assert "packed and separate scores differ" in common.packing_fault(scorer) or "mask" in common.packing_fault(scorer)


@pytest.mark.parametrize("score_type", ["prompt", "embed"])
def test_a_model_that_is_random_on_long_texts_alone_is_refused(model, monkeypatch, score_type):
    """Reformer's hashing: its short texts are always the same, and felt their padding before."""
    def noise(module, inputs, output):
        return output + torch.randn_like(output) if output.shape[1] > 40 else output
    load = common.load_pretrained

    def load_noisy(args, name):
        scorer = load(args, name)
        scorer.model.get_input_embeddings().register_forward_hook(noise)
        return scorer
    monkeypatch.setattr(common, "load_pretrained", load_noisy)
    with pytest.raises(common.UserError, match="another score on a second run"):
        scorer_of(model("bert"), "--type", score_type)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_do_not_start_at_0_are_noticed_whatever_the_rounding(tmp_path, capsys, dtype):
    """RoBERTa's start behind the padding id. Its scores move by less than bfloat16's rounding may."""
    folder = tiny_network(tmp_path, "RobertaConfig", "RobertaForCausalLM", scale=0.5, is_decoder=True,
                          max_position_embeddings=514, **SMALL)
    assert scorer_of(folder, "--dtype", dtype).layout == "padded"
    assert "it does not count positions from 0" in capsys.readouterr().err


@pytest.mark.parametrize("users", [USERS[3:] + USERS[:1], None])
def test_a_window_that_only_later_users_reach(tmp_path, users):
    """GPT-Neo: local attention over 256 places; the first user is short, the last one's row is longer."""
    folder = tiny_network(tmp_path, "GPTNeoConfig", "GPTNeoForCausalLM", hidden_size=32, num_layers=2, num_heads=4,
                          attention_types=[[["global", "local"], 1]], window_size=256)
    long = user("long", [f"old river song {n} king" for n in range(12)], [f"moon {n} river" * 8 for n in range(9)])
    users = (users or USERS) + [long]
    assert_same(score(scorer_of(folder), users), plain_scores(folder, plain_prompts(users)))


def test_a_window_as_long_as_the_prompts_packs(model):
    folder = model("mistral-window", sliding_window=200)
    assert scorer_of(folder, "--max-length", 200).layout == "packed"
    assert scorer_of(folder, "--max-length", 201).layout == "padded"


FEEL_PADDING = {
    "fnet": ("FNetConfig", "FNetForMaskedLM", dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48)),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", dict(SMALL, embedding_size=32)),
    "nystromformer": ("NystromformerConfig", "NystromformerForMaskedLM", dict(SMALL, num_landmarks=16,
                                                                              segment_means_seq_len=16)),
    "yoso": ("YosoConfig", "YosoForMaskedLM", dict(SMALL, use_expectation=True)),
    "funnel": ("FunnelConfig", "FunnelForMaskedLM", dict(d_model=32, d_head=8, n_head=4, d_inner=48, block_sizes=[1, 1])),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FEEL_PADDING)
def test_models_that_feel_padding_get_batches_of_one_length(tmp_path, name, dtype):
    if (name, dtype) == ("fnet", "bfloat16"):
        pytest.skip("torch has no bfloat16 Fourier transform here")
    config_name, model_name, changes = FEEL_PADDING[name]
    folder = tiny_network(tmp_path, config_name, model_name, tiny.word_piece(), **changes)
    scorer = scorer_of(folder, "--dtype", dtype)
    assert scorer.layout == "equal"
    if dtype == "float32":
        want = plain_scores(folder, plain_prompts(USERS), kind="bert", words=("yes", "no"))
        assert np.abs(score(scorer) - want).max() < 1e-4 * (1 + np.abs(want).max())


def test_a_model_that_cannot_embed_short_texts_is_refused_in_one_line(tmp_path):
    """Funnel pools neighbouring tokens and fails on texts of three: said at loading, no traceback while scoring."""
    sizes = dict(d_model=32, d_head=8, n_head=4, d_inner=48, block_sizes=[1, 1, 1])
    folder = tiny_network(tmp_path, "FunnelConfig", "FunnelForMaskedLM", tiny.word_piece(), **sizes)
    with pytest.raises(common.UserError, match="cannot be used"):
        scorer_of(folder, "--type", "embed")


def test_longrope_prompts_stay_below_the_original_length(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 200}
    folder = tiny_network(tmp_path, "Phi3Config", "Phi3ForCausalLM", **SMALL, max_position_embeddings=800,
                          original_max_position_embeddings=200, rope_parameters=rope)
    assert scorer_of(folder).limit == 200


@pytest.mark.parametrize("family, config_name, model_name, changes", [
    ("bart", "BartConfig", "BartForConditionalGeneration",
     dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
          encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=512, decoder_start_token_id=0)),
    ("mobilebert", "MobileBertConfig", "MobileBertForMaskedLM", dict(SMALL, embedding_size=16)),
])
def test_odd_heads_and_positions_are_scored_or_refused_in_one_line(tmp_path, family, config_name, model_name, changes):
    """BART: a bias of vocabulary size. MobileBERT: a head of two matrices."""
    tokenizer = {"bart": tiny.sentence_piece(eos=True), "mobilebert": tiny.word_piece()}.get(family)
    folder = tiny_network(tmp_path, config_name, model_name, tokenizer, **changes)
    if family == "mobilebert":
        with pytest.raises(common.UserError, match="cannot be used: RuntimeError"):
            scorer_of(folder)
        return
    kind = {"bart": "t5"}.get(family, family)
    network = getattr(transformers, model_name).from_pretrained(folder).eval()
    want = plain_scores(folder, plain_prompts(USERS), kind=kind, network=network)
    assert np.abs(score(scorer_of(folder)) - want).max() < 1e-5 * (1 + np.abs(want).max())


def test_xlnet_has_embeddings_and_no_next_token(tmp_path):
    folder = tiny_network(tmp_path, "XLNetConfig", "XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48)
    assert scorer_of(folder, "--type", "embed").limit == 1024  # its -1 positions mean no limit
    with pytest.raises(common.UserError, match="predicts the token that it reads"):
        scorer_of(folder)


def test_what_a_configuration_lacks_is_one_line(tmp_path):
    folder = tiny.build("t5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="names no decoder_start_token_id"):
        scorer_of(folder)


# -------------------------------------------------------------------------------------------------- precision of scores


def test_bfloat16_scores_stay_distinct_where_bfloat16_logits_tie(model):
    words = sorted({word for word in tiny.WORDS if word.isalpha()})
    candidates = [f"{a} {b} {c}" for a in words for b in words[5:] for c in words[9:11]][:400]
    users = [user("many", ["the red moon", "old river song", "storm king"], candidates)]
    exact = score(scorer_of(model("llama")), users)
    half = score(scorer_of(model("llama"), "--dtype", "bfloat16", "--max-tokens", 2000), users)
    logits = plain_scores(model("llama"), plain_prompts(users), dtype=torch.bfloat16)
    assert len(set(exact)) == len(set(half)) == 400 > len(set(logits)) + 50
    assert np.abs(half - exact).max() < 1.2 * np.abs(logits - exact).max() and np.corrcoef(half, exact)[0, 1] > 0.98


@pytest.mark.parametrize("family", ["gemma2", "cohere", "bert", "t5", "opt-350m"])
def test_the_two_row_head_is_float32_in_a_bfloat16_model(model, family):
    scorer = scorer_of(model(family), "--dtype", "bfloat16")
    rows = common.rows_of(scorer, [common.encode_user(scorer, USERS[0])[0]])
    scores = common.score_rows(scorer, rows)
    head = scorer.model.get_output_embeddings()
    assert scores.dtype == torch.float64 and head.weight.dtype == torch.float32 and head.weight.shape[0] == 2
    assert not torch.equal(scores, scores.bfloat16().double())  # finer than bfloat16


# ------------------------------------------------------------------------------------- prompts, answers, chat templates


@pytest.mark.parametrize("family, tokenizer, special", [
    ("bert", "word_piece", "[MASK]"), ("bert", "word_piece", "[SEP]"), ("roberta", "sentence_piece", "<mask>"),
    ("llama", "byte_level", "</s>"), ("llama", "byte_level", "<pad>"), ("llama", "sentence_piece", "<mask>")])
def test_special_tokens_in_a_title_do_not_move_the_answer(model, family, tokenizer, special):
    users = [user("s", [f"the {special} moon", special], [f"red {special}", special, "blue garden"]), *USERS]
    folder = model(family, tokenizer)
    assert_same(score(scorer_of(folder), users), plain_scores(folder, plain_prompts(users), kind=family))


def test_a_prompt_with_a_mask_of_its_own_is_answered_there(model, tmp_path):
    """No second mask is put at its end."""
    wording = {**common.PROMPT, "prompt": "{history}\nlike {candidate} ? [MASK] ."}
    (tmp_path / "prompt.json").write_text(json.dumps(wording))
    scorer = scorer_of(model("bert"), "--prompt", tmp_path / "prompt.json")
    ids, _ = common.encode_user(scorer, USERS[0])
    assert all(prompt.count(scorer.tokenizer.mask_token_id) == 1 for prompt in ids)
    assert_same(score(scorer), plain_scores(model("bert"), plain_prompts(USERS, wording), kind="bert"))


def test_an_eos_that_the_tokenizer_adds_is_taken_off(tmp_path):
    folder = tiny.build("llama", tmp_path, tiny.sentence_piece(eos=True))
    assert_same(score(scorer_of(folder)), plain_scores(folder, plain_prompts(USERS), ends_with_eos=True))


TURN = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
TEMPLATES = {  # template, what stands around the prompt, the answers as the template renders them
    "chatml": (TURN + "<|user|>\n{{ m['content'] }}\n{% else %}<|assistant|>\n{{ m['content'] }}\n{% endif %}"
               "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
               "<|user|>\n{}\n<|assistant|>\n", ("Yes", "No")),
    "mistral": (TURN + "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
                "[INST] {} [/INST]", ("ĠYes", "ĠNo")),  # a space before the answer, which is part of its token
    "glm": (TURN + "<|user|>\n{{ m['content'] }}{% else %}<|assistant|>\n{{ m['content'] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "<|user|>\n{}<|assistant|>\n", ("Yes", "No")),  # a line break that the generation prompt leaves out
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_itself_says_what_the_answers_are(tmp_path, name):
    template, around, words = TEMPLATES[name]
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = template
    folder = tiny.build("llama", tmp_path, tokenizer)
    scorer = scorer_of(folder, "--chat-template")
    ids, _ = common.encode_user(scorer, USERS[0])
    assert all(prompt.count(tokenizer.bos_token_id) == 1 for prompt in ids)  # no second one
    before, after = around.split("{}")
    prompts = [before + text + after for text in plain_prompts(USERS)]  # the tokenizer adds the BOS here
    assert_same(score(scorer), plain_scores(folder, prompts, words=words))


def test_an_answer_may_be_a_letter_that_the_template_writes_too(tmp_path):
    tokenizer = tiny.byte_level()
    template, around, _ = TEMPLATES["chatml"]
    tokenizer.chat_template = template.replace("{{ m['content'] }}\n{% endif %}", "{{ m['content'] }}<|im_end|>{% endif %}")
    folder = tiny.build("llama", tmp_path, tokenizer)
    (tmp_path / "letters.json").write_text('{"answers": ["n", "i"]}')
    before, after = around.split("{}")
    prompts = [before + text + after for text in plain_prompts(USERS)]
    scorer = scorer_of(folder, "--chat-template", "--prompt", tmp_path / "letters.json")
    assert_same(score(scorer), plain_scores(folder, prompts, words=("n", "i")))


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}\n{% endif %}{% endfor %}",
    TURN + "<|user|>\n{{ m['content'][:40] }}\n{% else %}{{ m['content'] }}{% endif %}{% endfor %}"])
def test_a_template_that_leaves_the_answer_out_or_cuts_the_prompt_is_refused(tmp_path, template):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = template
    with pytest.raises(common.UserError, match="changes the prompt or leaves the assistant's answer out"):
        scorer_of(tiny.build("llama", tmp_path, tokenizer), "--chat-template")


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = "{% if strftime_now is defined %}{% set day = '%d (%b)' %}{{ strftime_now(day) }}{% endif %}" \
        + TEMPLATES["chatml"][0]
    scorer = scorer_of(tiny.build("llama", tmp_path, tokenizer), "--chat-template")
    text, _ = common.render_chat(scorer.tokenizer, "x")
    assert text.startswith("26 Jul 2024<s><|user|>")


def test_no_chat_template_is_one_line(model):
    with pytest.raises(common.UserError, match="chat-template"):
        scorer_of(model("llama"), "--chat-template")


def test_special_tokens_false_gives_the_bare_text(model, tmp_path):
    (tmp_path / "bare.json").write_text('{"special_tokens": false}')
    bare, usual = scorer_of(model("llama"), "--prompt", tmp_path / "bare.json"), scorer_of(model("llama"))
    texts = plain_prompts(USERS)
    assert common.encode(bare, texts) == [ids[1:] for ids in common.encode(usual, texts)]


def test_answer_tokens():
    byte_level, pieces, words = tiny.byte_level(), tiny.sentence_piece(), tiny.word_piece()
    for tokenizer, context, word, token in [
            (byte_level, "Answer:", " Yes", "ĠYes"), (byte_level, "Answer:\n", "Yes", "Yes"),  # (a)
            (words, "Answer:", " Yes", "yes"), (pieces, "Answer:", " Yes", "▁Yes"), (pieces, "x", "▁No", "▁No")]:  # (b)
        assert tokenizer.convert_ids_to_tokens(common.answer_token(tokenizer, context, word)) == token
    with pytest.raises(common.UserError, match="'Perhaps' is not a single token here: .*'p', 's'"):
        common.answer_token(byte_level, "Answer:", "Perhaps")
    vocabulary = {**byte_level.get_vocab(), "Perhaps": 5}  # an entry that never comes next: the word is written in letters
    byte_level.get_vocab = lambda: vocabulary
    with pytest.raises(common.UserError, match="'Perhaps' is not a single token here"):
        common.answer_token(byte_level, "Answer:", "Perhaps")


@pytest.mark.parametrize("answers, says", [
    ([" yes", " Yes"], "both answers"), (["☃", "yes"], "is not a single token"), (["yes", "☃"], "is not a single token")])
def test_answers_that_are_one_token_or_unknown_are_refused(model, tmp_path, answers, says):
    """"☃" is [UNK] to this tokenizer: refused also where only one answer is."""
    (tmp_path / "prompt.json").write_text(json.dumps({"answers": answers}))
    with pytest.raises(common.UserError, match=says):
        scorer_of(model("bert"), "--prompt", tmp_path / "prompt.json")


@pytest.mark.parametrize("text, says", [
    ('{"promt": "{history} {candidate}"}', "unknown key 'promt'; the keys are item, join"),
    ('{"prompt": "{history} {candidat}"}', "lacks {candidate}"), ('{"answers": ["yes"]}', "answers"),
    ('{"answers": "yes"}', "answers must be of the type"), ('{"join": 3}', "join"),
    ('[1]', "JSON object"), ('{"item": ', "is not JSON")])
def test_a_prompt_file_with_a_mistake_is_refused(tmp_path, text, says):
    (tmp_path / "prompt.json").write_text(text)
    with pytest.raises(common.UserError, match=says):
        common.load_prompt(tmp_path / "prompt.json")


# ----------------------------------------------------------------------------------------------------------- truncation


def test_the_oldest_items_go_first_for_all_candidates_of_a_user(model):
    history = [f"old river song {n} king" for n in range(10, 32)]
    long = user("long", history, ["moon", "the red moon river stone garden", "light"])
    shorter = {**long, "history": history[-7:]}
    scorer = scorer_of(model("llama"))
    limit = max(map(len, common.encode(scorer, plain_prompts([shorter]))))  # the longest of 7 items just fits
    scorer = scorer._replace(limit=limit)
    assert common.encode_user(scorer, long) == (common.encode(scorer, plain_prompts([shorter])), 15)  # renumbered
    assert common.encode_user(scorer._replace(limit=limit - 1), long)[1] == 16
    scores, cost = common.score_prompts(scorer, [long, *USERS])
    assert_same(np.concatenate(scores), plain_scores(model("llama"), plain_prompts([shorter, *USERS])))
    assert cost["dropped"] == [15, 0, 0, 0, 0]


def test_what_does_not_fit_with_one_item_is_one_line_that_names_the_user(model):
    with pytest.raises(common.UserError, match="user a needs .* tokens with no more than one item of history, but at most 20"):
        score(scorer_of(model("llama"), "--max-length", 20))


@pytest.mark.parametrize("family, key", [
    ("gpt2", "n_positions"), ("bert", "max_position_embeddings"), ("roberta", "max_position_embeddings"),
    ("mpt", "max_seq_len"), ("opt", "max_position_embeddings")])
def test_prompts_fit_the_positions_of_the_model(model, family, key):
    scorer = scorer_of(model(family, **{key: 70}))
    scores, cost = common.score_prompts(scorer, [user("u", ["moon light song"] * 40, ["storm", "red road"])])
    assert np.isfinite(scores[0]).all() and cost["dropped"][0] > 0
    assert cost["tokens_unpacked"] > 2 * 60  # and use them


# ----------------------------------------------------------------------------------------------------------- embeddings


def plain_embedding(folder, text, loader, pooling):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, loader).from_pretrained(folder).eval()
    with torch.no_grad():
        states = network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
    return {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]


def plain_cosines(folder, users, loader, pooling, dense=None):
    cosines = []
    for one in users:
        lines = "\n".join(f"{n}. {text}" for n, text in enumerate(one["history"], 1))
        vectors = []
        for text in [common.PROMPT["user"].replace("{history}", lines), *one["candidates"]]:
            vector = plain_embedding(folder, text, loader, pooling)
            vectors.append(dense(vector).detach().double().numpy() if dense else vector.double().numpy())
        for item in vectors[1:]:
            cosines.append(vectors[0] @ item / np.linalg.norm(vectors[0]) / np.linalg.norm(item))
    return np.array(cosines)


EMBED = [("bert", "AutoModel", "mean"), ("bert-encoder", "AutoModel", "mean"), ("bert", "AutoModel", "last"),
         ("bert", "AutoModel", "cls"), ("llama", "AutoModel", "last"), ("llama", "AutoModel", "mean"),
         ("mpt", "AutoModel", "last"), ("t5", "T5EncoderModel", "mean"), ("t5-encoder", "T5EncoderModel", "mean")]


def embed_scores(scorer, users):
    return np.concatenate(common.score_embeddings(scorer, users, {})[0])


@pytest.mark.parametrize("family, loader, pooling", EMBED)
def test_embedding_scores_are_cosines_of_one_text_at_a_time(model, family, loader, pooling):
    folder, users = model(family), USERS[:2] + USERS[3:]
    auto = pooling == ("last" if family in ("llama", "mpt") else "mean")  # the default for the family
    scorer = scorer_of(folder, "--type", "embed", *([] if auto else ["--pooling", pooling]), "--max-tokens", 100)
    assert_same(embed_scores(scorer, users), plain_cosines(folder, users, loader, pooling), spread=0.01)


def sentence_transformers_files(folder, pooling, dense=None):
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
               {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
               {"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}]
    if dense:
        modules.insert(2, {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense/config.json").write_text(json.dumps({
            "in_features": 32, "out_features": 8, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity"}))
        safetensors.torch.save_file({"linear.weight": dense.weight.data}, folder / "2_Dense/model.safetensors")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("modes, pooling", [
    ({"pooling_mode_cls_token": True}, "cls"), ({"pooling_mode_mean_tokens": True}, "mean"),
    ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "last"),
    ({"pooling_mode_max_tokens": True}, None), ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None)])
def test_pooling_follows_the_models_own_files(tmp_path, capsys, modes, pooling):
    folder = tiny.build("bert", tmp_path)
    sentence_transformers_files(tmp_path, modes)
    if pooling is None:
        with pytest.raises(common.UserError, match="which is not supported: choose with --pooling"):
            scorer_of(folder, "--type", "embed")
        assert scorer_of(folder, "--type", "embed", "--pooling", "mean").pooling == "mean"
        return
    scorer = scorer_of(folder, "--type", "embed")
    assert scorer.pooling == pooling and f"pooling {pooling}" in capsys.readouterr().err
    assert_same(embed_scores(scorer, USERS[:2]), plain_cosines(folder, USERS[:2], "AutoModel", pooling), spread=0.01)
    assert scorer_of(folder, "--type", "embed", "--pooling", "mean").pooling == "mean"


def test_a_dense_layer_after_pooling(tmp_path):
    """As in sentence-T5."""
    folder = tiny.build("t5-encoder", tmp_path)
    torch.manual_seed(5)
    dense = torch.nn.Linear(32, 8, bias=False)
    sentence_transformers_files(tmp_path, {"pooling_mode_mean_tokens": True}, dense)
    want = plain_cosines(folder, USERS[:2], "T5EncoderModel", "mean", dense)
    assert_same(embed_scores(scorer_of(folder, "--type", "embed"), USERS[:2]), want, spread=0.01)
    modules = json.loads((tmp_path / "modules.json").read_text())
    second = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())  # two dense layers, as in EmbeddingGemma
    modules.insert(3, {**modules[2], "path": "3_Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "3_Dense").mkdir()
    (tmp_path / "3_Dense/config.json").write_text('{"in_features": 8, "out_features": 8}')
    weights = {"linear.weight": second[0].weight.data, "linear.bias": second[0].bias.data}
    safetensors.torch.save_file(weights, tmp_path / "3_Dense/model.safetensors")
    want = plain_cosines(folder, USERS[:2], "T5EncoderModel", "mean", torch.nn.Sequential(dense, second))
    assert_same(embed_scores(scorer_of(folder, "--type", "embed"), USERS[:2]), want, spread=0.01)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 2], [0, 1, 1, 2], [3, 0, 1, 2]])
def test_other_modules_or_another_order_are_refused(tmp_path, order):
    folder = tiny.build("bert", tmp_path)
    sentence_transformers_files(tmp_path, {"pooling_mode_mean_tokens": True})
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"path": "4_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps([modules[n] for n in order]))
    with pytest.raises(common.UserError, match="Pooling.*, which is not supported"):
        scorer_of(folder, "--type", "embed")


def test_each_distinct_text_is_encoded_once(model):
    scorer = scorer_of(model("bert"), "--type", "embed")
    seen = Counter()

    def count(_, args, inputs):
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
            seen[tuple(row[mask.bool()].tolist())] += 1
    scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    known, users = {}, [*USERS, user("e", ["y"], ["road", "the red moon"])]
    first, cost = common.score_embeddings(scorer, users, known)
    again, more = common.score_embeddings(scorer, [user("f", ["a song"], SHARED)], known)
    items = {text for one in users for text in one["candidates"]}
    assert set(seen.values()) == {1} and len(seen) == len(items) + 6 and set(known) == items
    assert cost["tokens_scored"] + more["tokens_scored"] == sum(map(len, seen))


def test_an_item_without_any_token_has_an_embedding(model, tmp_path):
    (tmp_path / "bare.json").write_text('{"special_tokens": false}')
    scorer = scorer_of(model("llama"), "--type", "embed", "--prompt", tmp_path / "bare.json")
    assert common.encode(scorer, ["", "moon"])[0] == [scorer.tokenizer.eos_token_id]
    scores = embed_scores(scorer, [user("u", ["moon"], ["", "light"])])
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_long_histories_are_cut_for_embeddings_and_long_items_refused(model):
    scorer = scorer_of(model("bert"), "--type", "embed", "--max-length", 40)
    scores, cost = common.score_embeddings(scorer, [user("u", ["the red moon"] * 30, ["light"])], {})
    assert np.isfinite(scores[0]).all() and cost["dropped"][0] > 0
    with pytest.raises(common.UserError, match="'moon moon .* has 102 tokens, but at most 40 fit"):
        common.score_embeddings(scorer, [user("u", ["red"], ["moon " * 100])], {})


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", ["bert-encoder", "t5-encoder"])
def test_a_model_without_lm_head_is_refused_for_prompts(model, family):
    with pytest.raises(common.UserError, match="has no LM head .*--type embed"):
        scorer_of(model(family))


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(tmp_path):
    tokenizer = tiny.word_piece()
    tokenizer.mask_token = None
    with pytest.raises(common.UserError, match="no mask token"):
        scorer_of(tiny.build("bert", tmp_path, tokenizer))


@pytest.mark.parametrize("kind", ["prompt", "embed"])
def test_a_folder_without_tokenizer_files_is_refused(tmp_path, kind):
    folder = tiny.build("bert", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(common.UserError, match="tokenizer|cannot be used"):
        scorer_of(folder, "--type", kind)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = tiny.build("llama", tmp_path)
    tokenizer = tiny.byte_level()
    tokenizer.add_tokens([f"extra{n}" for n in range(30)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(common.UserError, match="they do not belong"):
        scorer_of(folder)


def test_a_folder_goes_before_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.model_name("bert-base") == "bert-base-uncased"
    tiny.build("bert", tmp_path / "bert-base")
    assert common.model_name("bert-base") == "bert-base" and scorer_of("bert-base").name == "bert-base"


def test_a_model_that_is_not_there_is_one_line():
    with pytest.raises(common.UserError, match="no such folder, and not on the hub"):
        scorer_of("nobody/nothing")


def test_weights_that_are_not_there_are_no_embeddings(tmp_path):
    folder = tiny.build("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: value for key, value in weights.items() if "self.query" not in key}, file)
    with pytest.raises(common.UserError, match="incomplete weights .*query"):
        scorer_of(folder, "--type", "embed")


@pytest.mark.skipif("RECBENCH_ENCODER" not in os.environ, reason="RECBENCH_ENCODER: folder of a sentence encoder")
def test_a_real_sentence_encoder_tells_related_texts_from_others():
    folder = os.environ["RECBENCH_ENCODER"]
    items = ["A trip to the moon in a spaceship", "Easy recipes with tomatoes"]
    users = [user("space", ["A rocket to the moon", "Space travel and planets"], items),
             user("cook", ["Italian cooking for beginners", "How to bake bread"], items)]
    got = embed_scores(scorer_of(folder, "--type", "embed"), users)
    assert got[0] > got[1] + 0.1 and got[3] > got[2] + 0.1
    assert_same(got, plain_cosines(folder, users, "AutoModel", "mean"))


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
        assert used <= set(vars(common)) | set(vars(builtins)), f"{name} refers to {used - set(vars(common))}"
        assert not function.__closure__, f"{name} closes over another function's variables"
        state = [n for n in used & set(vars(common)) if isinstance(vars(common)[n], (list, set, np.ndarray, Counter))]
        assert not [n for n in state if not n.isupper()], f"{name} uses changing module state"
