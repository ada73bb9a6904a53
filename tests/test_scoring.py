"""Scores against the plain truth: one prompt, one forward, the model's own full logits at the answer position."""
import json
import os

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
SPECIAL_END = {"prompt": common.PROMPT["prompt"] + "</s>"}
OWN_MASK = {"prompt": "{history}\nlike {candidate} ? [MASK] ."}
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


@pytest.fixture
def wording(tmp_path):
    """wording(changes) -> the flags that choose it."""
    def write(changes):
        write_json(tmp_path / "prompt.json", changes)
        return "--prompt", tmp_path / "prompt.json"
    return write


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def scorer_of(folder, *flags):
    parser = common.argument_parser("")
    parser.add_argument("--model")
    common.shared_arguments(parser)
    return common.load_scorer(parser.parse_args(["--model", str(folder), "--device", "cpu", *map(str, flags)]))


def score(scorer, users=USERS):
    return np.concatenate(common.scores_of(scorer, users, {})[0])


def plain_prompts(users, changes):
    """The prompts of all users, written with replace."""
    wording = {**common.PROMPT, **changes}
    template = wording["prompt"].replace("{history}", "\0").replace("{candidate}", "\1")  # titles may hold braces
    texts = []
    for one in users:
        lines = []
        for n, text in enumerate(one["history"], 1):
            lines.append(wording["item"].replace("{n}", str(n)).replace("{text}", text))
        for candidate in one["candidates"]:
            texts.append(template.replace("\0", "\n".join(lines)).replace("\1", candidate))
    return texts


def load_plain(folder, **options):
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    return LOADERS.get(kind, transformers.AutoModelForCausalLM).from_pretrained(folder, **options).eval()


def plain_scores(folder, users=USERS, changes={}, words=None, network=None, drop_last=False):
    """logit(yes) - logit(no), one prompt and one forward at a time, from the whole vocabulary's logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = network or load_plain(folder)
    kind = network.config.model_type
    vocabulary = tokenizer.get_vocab()
    yes, no = words or next(pair for pair in ANSWERS.values() if pair[0] in vocabulary)
    scores = []
    for text in plain_prompts(users, changes):
        if kind in ("bert", "roberta") and changes != OWN_MASK:
            text += tokenizer.mask_token
        ids = tokenizer(text, add_special_tokens=changes.get("special_tokens", True))["input_ids"]
        inputs, answer = {"input_ids": torch.tensor([ids[:-1] if drop_last else ids])}, -1
        if kind == "t5":
            inputs["decoder_input_ids"], answer = torch.tensor([[0]]), 0
        elif kind in LOADERS:
            answer = ids.index(tokenizer.mask_token_id, -3)
        with torch.no_grad():
            logits = network(**inputs).logits[0, answer].float()
        scores.append(float(logits[vocabulary[yes]] - logits[vocabulary[no]]))
    return np.array(scores)


def assert_same(got, want, spread=0.05):
    assert np.std(want) > spread, "the truth hardly spreads: the test could not fail"
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-5


def assert_true_scores(folder, *flags, users=USERS, **truth):
    """What the folder's model gives is what plain_scores gives with the arguments `truth`."""
    assert_same(score(scorer_of(folder, *flags), users), plain_scores(folder, users, **truth))


# ------------------------------------------------------------------------------------------------- families, tokenizers


@pytest.mark.parametrize("family", tiny.PACKED + tiny.CACHED + tiny.PADDED)
def test_scores_are_those_of_one_prompt_and_one_forward(model, family):
    """Among them attention windows of 8 and 16 tokens, chunks of 16, ALiBi, and layers with a state."""
    scorer = scorer_of(model(family))
    assert family in getattr(tiny, scorer.layout.upper())
    want = plain_scores(model(family))
    scores, cost = common.score_prompts(scorer, USERS)
    assert list(map(len, scores)) == [6, 3, 4, 1]
    assert_same(np.concatenate(scores), want)
    assert (cost["tokens_scored"] < 0.6 * cost["tokens_unshared"]) == (family not in tiny.PADDED)
    for changes in ({"max_tokens": 1}, {"max_tokens": 150}, {"layout": "equal"}):
        assert_same(score(scorer._replace(**changes)), want)


@pytest.mark.parametrize("tokenizer", ANSWERS)
@pytest.mark.parametrize("changes", [{}, OWN_END, SPECIAL_END])
def test_any_tokenizer_and_candidates_that_are_prefixes_of_one_another(model, wording, tokenizer, changes):
    appends = tokenizer == "word_piece"  # [SEP], where the answer has to come
    flags = "--max-tokens", 100, *wording(changes)
    assert_true_scores(model("llama", tokenizer), *flags, changes=changes, drop_last=appends)


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3-next"])
@pytest.mark.parametrize("special_tokens", [True, False])
def test_prompts_that_share_no_more_than_bos(model, wording, family, special_tokens):
    changes = {"prompt": "{candidate} with\n{history}\nAnswer:", "special_tokens": special_tokens}
    assert_true_scores(model(family), *wording(changes), changes=changes)


def test_equal_candidates_are_scored_once(model):
    """So they get equal scores, whatever the rounding."""
    scorer = scorer_of(model("llama"))
    [scores], cost = common.score_prompts(scorer, [user("twins", ["old river"], ["storm", "moon", "storm"])])
    _, once = common.score_prompts(scorer, [user("once", ["old river"], ["storm", "moon"])])
    assert scores[0] == scores[2] != scores[1]
    assert cost["tokens_scored"] == once["tokens_scored"]


@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_a_packed_forward_under_eager_attention(model, family):
    scorer = scorer_of(model(family))
    scorer.model.set_attn_implementation("eager")
    assert_same(score(scorer), plain_scores(model(family)))


def test_gradients_packed_are_those_of_separate_prompts(model):
    gradients = {}
    for layout in ("packed", "padded"):
        scorer = scorer_of(model("gemma3-window"), "--dtype", "float64")._replace(layout=layout)
        rows = common.rows_of(scorer, [common.encode_user(scorer, one)[0] for one in USERS])
        scores = torch.cat([common.score_rows(scorer, [row]) for row in rows])  # one user after the other
        (scores * torch.linspace(-1, 1, len(scores), dtype=scores.dtype)).sum().backward()
        gradients[layout] = [p.grad for p in scorer.model.parameters() if p.grad is not None]
    assert len(gradients["packed"]) == len(gradients["padded"]) > 10
    for packed, separate in zip(*gradients.values()):
        assert (packed - separate).abs().max() <= 1e-6 * separate.abs().max()


# ------------------------------------------------------------------------------------------------------ rows and layouts


@pytest.mark.parametrize("layout", ["packed", "cached", "padded", "equal"])
def test_batches_hold_every_text_once_within_the_tokens(model, layout):
    scorer = scorer_of(model("llama"))._replace(layout=layout, max_tokens=100)
    rows = common.rows_of(scorer, [common.encode_user(scorer, one)[0] for one in USERS])
    indices = []
    for batch in common.fill_batches(scorer, rows):
        lengths = list(map(common.row_length, batch))
        assert max(lengths) * len(batch) <= 100
        indices += common.indices_of(batch)
    assert sorted(indices) == list(range(14))


@pytest.mark.parametrize("limit, shown", [
    ({}, ["1.....", "11....", "111...", "1111..", "11..1.", "11..11"]),
    ({"window": 3}, ["1.....", "11....", "111...", ".111..", "11..1.", ".1..11"]),
    ({"chunk": 2}, ["1.....", "11....", "..1...", "..11..", "....1.", "....11"])])
def test_the_mask_is_that_of_the_picture(limit, shown):
    segments, positions = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 3, 2, 3]])
    mask = common.packed_mask(segments, positions, **limit)[0, 0]
    for row, line in zip(mask, shown):
        assert row.tolist() == [mark == "1" for mark in line]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_wrong_layout_falls_back_to_one_text_at_a_time_and_says_so(model, monkeypatch, capsys, family):
    monkeypatch.setattr(common, "layout_of", lambda *arguments: "packed")
    scorer = scorer_of(model(family))
    assert "packed" in capsys.readouterr().err
    assert (scorer.layout, scorer.max_tokens) == ("equal", 1)
    assert_same(score(scorer), plain_scores(model(family)))


# ------------------------------------------------------------------------------------------------------- LoRA adapters


def save_lora(folder, run):
    """The model of the folder with a LoRA adapter that matters, which is saved in the folder `run`."""
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, target_modules="all-linear")
    network = peft.get_peft_model(load_plain(folder), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    network.save_pretrained(run)
    return network.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "bert", "t5"])
def test_scores_with_a_lora_adapter(model, tmp_path, family):
    want = plain_scores(model(family), network=save_lora(model(family), tmp_path))
    scorer = scorer_of(model(family))
    without = score(scorer)
    assert_same(score(common.load_adapter(scorer, tmp_path)), want)
    assert np.abs(want - without).max() > 0.05


@pytest.mark.parametrize("change", ["renamed", "half", "other sizes"])
def test_an_adapter_that_does_not_fit_is_refused(model, tmp_path, change):
    """peft itself would leave the base model's scores in place, with a warning at most."""
    save_lora(model("llama", hidden_size=64 if change == "other sizes" else 32), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    if change == "renamed":
        weights = {key.replace("self_attn", "attention"): value for key, value in weights.items()}
    if change == "half":
        weights = {key: value for key, value in weights.items() if "layers.0" in key}
    safetensors.torch.save_file(weights, file)
    with pytest.raises(common.UserError, match=str(tmp_path)):
        common.load_adapter(scorer_of(model("llama")), tmp_path)


def test_an_adapter_s_folder_is_no_base_model(tmp_path):
    write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(common.UserError, match=f"{tmp_path} .*--adapter"):
        scorer_of(tmp_path)


# -------------------------------------------------------------------------------------------------- precision of scores


def test_bfloat16_scores_stay_distinct_where_bfloat16_logits_tie(model):
    candidates = [f"{a} {b}" for a in tiny.WORDS[-16:] for b in tiny.WORDS[-8:]]
    users = [user("many", ["the red moon", "old river song", "storm king"], candidates)]
    logits = plain_scores(model("llama"), users, network=load_plain(model("llama"), dtype=torch.bfloat16))
    scores = score(scorer_of(model("llama"), "--dtype", "bfloat16"), users)
    assert len(set(scores)) == 128 > len(set(logits)) + 10


# ------------------------------------------------------------------------------------- prompts, answers, chat templates


@pytest.mark.parametrize("family, tokenizer, special", [
    ("bert", "word_piece", "[MASK]"), ("bert", "word_piece", "[SEP]"), ("roberta", "sentence_piece", "<mask>"),
    ("llama", "byte_level", "</s>"), ("llama", "byte_level", "<pad>")])
def test_special_tokens_in_a_title_do_not_move_the_answer(model, family, tokenizer, special):
    users = [user("s", [f"the {special} moon", special], [f"red {special}", special, "blue garden"]), *USERS]
    assert_true_scores(model(family, tokenizer), users=users)


def test_a_prompt_with_a_mask_of_its_own_is_answered_there(model, wording):
    assert_true_scores(model("bert"), *wording(OWN_MASK), changes=OWN_MASK)


def test_an_eos_that_the_tokenizer_adds_is_taken_off(tmp_path):
    folder = tiny.build("llama", tmp_path, tiny.sentence_piece(eos=True))
    assert_true_scores(folder, drop_last=True)


@pytest.mark.parametrize("score_type", ["prompt", "embed"])
def test_an_empty_history_and_an_item_without_a_token_are_scored(model, wording, score_type):
    scorer = scorer_of(model("llama"), "--type", score_type, *wording({"special_tokens": False}))
    scores = score(scorer, [user("new", [], ["the red moon", "", "blue garden"])])
    assert np.isfinite(scores).all() and len(set(scores)) == 3


TURN = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<u>\n{{ m.content }}\n{% else %}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {  # template; what stands around the prompt; the answers as the template renders them
    # a space before the answer, which is part of its token
    "mistral": (TURN + "[/INST] {{ m.content }}</s>" + END + "[/INST]{% endif %}", "<u>\n{}\n[/INST]", "ĠYes", "ĠNo"),
    # a line break that the generation prompt leaves out
    "glm": (TURN + "<a>\n{{ m.content }}" + END + "<a>{% endif %}", "<u>\n{}\n<a>\n", "Yes", "No"),
    # an empty thought that the rendered answer lacks
    "gemma4": (TURN + "<a>\n{{ m.content }}<e>\n" + END + "<a>\n<c>thought\n<c>{% endif %}",
               "<u>\n{}\n<a>\n<c>thought\n<c>", "Yes", "No"),
    "think": (TURN + "<a>\n{{ m.content }}\n" + END + "<a>\n<think>\n{% endif %}",
              "<u>\n{}\n<a>\n<think>\n", "Yes", "No"),
}


def build_chat(folder, template):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = template
    return tiny.build("llama", folder, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_itself_says_what_stands_before_an_answer(tmp_path, capsys, name):
    template, around, *words = TEMPLATES[name]
    folder = build_chat(tmp_path, template)
    around = around.replace("{}", common.PROMPT["prompt"])  # here the tokenizer adds the one BOS
    assert_true_scores(folder, "--chat-template", changes={"prompt": around}, words=words)
    assert repr(around[-6:])[1:-1] in capsys.readouterr().err


def test_a_text_that_the_template_changes_names_its_user(tmp_path):
    changed = TEMPLATES["glm"][0].replace("m.content", "m.content.replace('of night', '')")
    scorer = scorer_of(build_chat(tmp_path, changed), "--chat-template")
    score(scorer, USERS[:1])
    with pytest.raises(common.UserError, match="user b"):
        score(scorer)


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path):
    dated = "{% if strftime_now is defined %}{% set day = '%d (%b)' %}{{ strftime_now(day) }}{% endif %}"
    scorer = scorer_of(build_chat(tmp_path, dated + TEMPLATES["glm"][0]), "--chat-template")
    text, _ = common.render_chat(scorer.tokenizer, "x", "a")
    assert text.startswith("26 Jul 2024<s><u>")


@pytest.mark.parametrize("family, changes, word", [
    ("bert", {"answers": [" yes", " Yes"]}, "Yes"), ("bert", {"answers": ["☃", "yes"]}, "☃"),
    ("llama", {"answers": [" Yes", " Perhaps"]}, "Perhaps"),
    ("llama", {"prompt": "{history}{candidate}: ", "answers": ["Yes", "No"]}, "Yes")])  # "Ġ", or "ĠYes" with the word
def test_answers_that_are_no_token_of_their_own_are_refused(model, wording, family, changes, word):
    with pytest.raises(common.UserError, match=word):
        scorer_of(model(family), *wording(changes))


def test_an_answer_that_the_vocabulary_joins_to_the_colon_is_refused(tmp_path):
    tokenizer = tiny.byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["use_regex"] = False  # no cut between ":" and the space
    state["model"]["vocab"][":ĠYes"] = len(tokenizer)
    state["model"]["merges"].append([":", "ĠYes"])
    joining = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=joining)
    with pytest.raises(common.UserError, match="Yes"):
        scorer_of(tiny.build("llama", tmp_path, tokenizer))


@pytest.mark.parametrize("changes, key", [
    ({"promt": "{history} {candidate}"}, "promt"), ({"prompt": "{history} {candidat}"}, "{candidate}"),
    ({"answers": "yes"}, "answers")])
def test_a_prompt_file_with_a_mistake_is_refused(tmp_path, wording, changes, key):
    _, path = wording(changes)
    with pytest.raises(common.UserError, match=f"prompt.json.*{key}"):
        common.load_prompt(path)


# ----------------------------------------------------------------------------------------------------------- truncation


def test_the_oldest_items_are_dropped_and_no_more_than_must_be(model):
    scorer, candidates = scorer_of(model("llama")), ["road", "red storm"]
    history = ["moon " * (n % 4) + "river" for n in range(30)]
    shorter = [common.encode_user(scorer, user("u", history[n:], candidates))[0] for n in range(30)]
    for limit in range(60, 220, 7):
        fitting = [ids for ids in shorter if max(map(len, ids)) <= limit]
        found = common.encode_user(scorer._replace(limit=limit), user("u", history, candidates))
        assert found == (fitting[0], 30 - len(fitting))
    assert len(fitting) > 20


def test_a_long_history_is_tokenised_a_few_times_only(model, monkeypatch):
    scorer, calls = scorer_of(model("llama")), []
    tokenize = type(scorer.tokenizer).__call__

    def count(tokenizer, text, **options):
        calls.append(text)
        return tokenize(tokenizer, text, **options)
    monkeypatch.setattr(type(scorer.tokenizer), "__call__", count)
    _, dropped = common.encode_user(scorer, user("long", ["old river song"] * 300, ["road", "storm"]))
    assert dropped > 200
    assert sum(isinstance(call, list) for call in calls) < 15


def test_what_does_not_fit_with_one_item_is_one_line_that_names_the_user(model):
    with pytest.raises(common.UserError, match="user a.*--max-length"):
        score(scorer_of(model("llama"))._replace(limit=20))


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = {"rope_parameters": ROPE, "original_max_position_embeddings": 70}


@pytest.mark.parametrize("family, limit, changes", [
    ("gpt2", 70, {"n_positions": 70}), ("bert", 70, {"max_position_embeddings": 70}), ("mpt", 70, {"max_seq_len": 70}),
    ("roberta", 69, {"max_position_embeddings": 70}),  # its positions start after the padding id
    ("phi3", 70, LONGROPE)])  # beyond which one long text changes all texts of its batch
def test_prompts_fit_the_positions_of_the_model(model, family, limit, changes):
    scorer = scorer_of(model(family, **changes))
    assert scorer.limit == limit
    assert np.isfinite(score(scorer, [user("u", ["moon light song"] * 40, ["storm", "red road"])])).all()


# ----------------------------------------------------------------------------------------------------------- embeddings


def plain_cosines(folder, users, loader, pooling, change=lambda text: text, dense=torch.nn.Identity()):
    """Cosines of history and candidate, one text and one forward at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, loader).from_pretrained(folder).eval()

    def embedding(text):
        inputs = tokenizer(change(text), return_tensors="pt", return_token_type_ids=False)
        states = network(**inputs).last_hidden_state[0]
        return dense({"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling])
    cosines = []
    with torch.no_grad():
        for one in users:
            lines = "\n".join(f"{n}. {text}" for n, text in enumerate(one["history"], 1))
            history = embedding("A user liked these items, oldest first:\n" + lines)
            for text in one["candidates"]:
                cosines.append(float(torch.cosine_similarity(history, embedding(text), dim=0)))
    return np.array(cosines)


@pytest.mark.parametrize("family, loader, pooling", [
    ("bert", "AutoModel", "mean"), ("bert-encoder", "AutoModel", "mean"), ("bert", "AutoModel", "last"),
    ("bert", "AutoModel", "cls"), ("llama", "AutoModel", "last"), ("llama", "AutoModel", "mean"),
    ("mpt", "AutoModel", "last"), ("lfm2", "AutoModel", "last"), ("t5", "T5EncoderModel", "mean"),
    ("t5-encoder", "T5EncoderModel", "mean")])
def test_embedding_scores_are_cosines_of_one_text_at_a_time(model, family, loader, pooling):
    users = USERS[:2] + USERS[3:]
    is_default = pooling == ("last" if family in ("llama", "mpt", "lfm2") else "mean")
    scorer = scorer_of(model(family), "--type", "embed", "--pooling", "auto" if is_default else pooling)
    want = plain_cosines(model(family), users, loader, pooling)
    for max_tokens in (1, 100, 1000):
        assert_same(score(scorer._replace(max_tokens=max_tokens), users), want, spread=0.01)


MEAN = {"pooling_mode_mean_tokens": True}
OWN = "sentence_transformers.models."


def sentence_encoder(folder, family="bert", pooling=MEAN, transformer="", dense=(), **files):
    """A tiny model with sentence-transformers files: pooling settings, [path of a dense layer], {name: settings}."""
    tiny.build(family, folder / transformer)
    modules = [{"path": transformer, "type": OWN + "Transformer"}, {"path": "1_Pooling", "type": OWN + "Pooling"}]
    for path in dense:
        modules.append({"path": path, "type": OWN + "Dense"})
    write_json(folder / "modules.json", [*modules, {"path": "9_Normalize", "type": OWN + "Normalize"}])
    write_json(folder / "1_Pooling/config.json", pooling)
    for name, settings in files.items():
        write_json(folder / transformer / f"{name}.json", settings)
    return folder


@pytest.mark.parametrize("settings, pooling", [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"), (MEAN, "mean"),
    ({"pooling_mode_lasttoken": True}, "last"),
    ({"pooling_mode": "cls"}, "cls"), ({"pooling_mode": "lasttoken"}, "last")])  # since version 5.4
def test_pooling_follows_the_models_own_files(tmp_path, capsys, settings, pooling):
    folder = sentence_encoder(tmp_path, pooling=settings)
    scorer = scorer_of(folder, "--type", "embed")
    assert pooling in capsys.readouterr().err
    assert_same(score(scorer, USERS[:2]), plain_cosines(folder, USERS[:2], "AutoModel", pooling), spread=0.01)


@pytest.mark.parametrize("settings", [{"pooling_mode": "max"}, {**MEAN, "pooling_mode_cls_token": True}])
def test_other_pooling_is_refused_but_where_pooling_is_chosen(tmp_path, settings):
    folder = sentence_encoder(tmp_path, pooling=settings)
    with pytest.raises(common.UserError, match="--pooling"):
        scorer_of(folder, "--type", "embed")
    assert scorer_of(folder, "--type", "embed", "--pooling", "mean").pooling == "mean"


def test_dense_layers_after_pooling(tmp_path):
    """Two of them, as in EmbeddingGemma; sentence-T5 has one."""
    torch.manual_seed(5)
    layers = {"2_Dense": torch.nn.Linear(32, 8, bias=False), "3_Dense": torch.nn.Linear(8, 8)}
    folder = sentence_encoder(tmp_path, "t5-encoder", dense=layers)
    for path, layer in layers.items():
        settings = {"in_features": layer.in_features, "out_features": 8, "bias": layer.bias is not None,
                    "activation_function": "torch.nn.modules.linear.Identity"}
        write_json(folder / path / "config.json", settings)
        weights = {f"linear.{key}": value for key, value in layer.state_dict().items()}
        safetensors.torch.save_file(weights, folder / path / "model.safetensors")
    dense = torch.nn.Sequential(*layers.values())
    want = plain_cosines(folder, USERS[:2], "T5EncoderModel", "mean", dense=dense)
    assert_same(score(scorer_of(folder, "--type", "embed"), USERS[:2]), want, spread=0.01)


def test_a_transformer_in_a_subfolder(tmp_path):
    folder = sentence_encoder(tmp_path, transformer="0_Transformer")
    want = plain_cosines(folder / "0_Transformer", USERS[:2], "AutoModel", "mean")
    assert_same(score(scorer_of(folder, "--type", "embed"), USERS[:2]), want, spread=0.01)


@pytest.mark.parametrize("own, flag, used", [(40, 100, 40), (None, 60, 60)])
def test_max_seq_length_limits_texts(tmp_path, own, flag, used):
    folder = sentence_encoder(tmp_path, sentence_bert_config={"max_seq_length": own})
    scorer = scorer_of(folder, "--type", "embed", "--max-length", flag)
    [ids], dropped = common.encode_user(scorer, user("u", ["moon"] * 50, ["road"]))
    assert used - 4 < len(ids) <= used and dropped > 0


def test_do_lower_case_is_done(tmp_path):
    folder = sentence_encoder(tmp_path, "llama", sentence_bert_config={"do_lower_case": True})
    users = [user("u", ["The RED moon", "Storm"], ["The Red", "NIGHT", "road"])]
    want = plain_cosines(folder, users, "AutoModel", "mean", change=str.lower)
    assert_same(score(scorer_of(folder, "--type", "embed"), users), want, spread=0.01)


def test_a_default_prompt_is_said(tmp_path, capsys):
    folder = sentence_encoder(tmp_path, config_sentence_transformers={"default_prompt_name": "my-query"})
    scorer_of(folder, "--type", "embed")
    assert "my-query" in capsys.readouterr().err


@pytest.mark.parametrize("types", [
    [OWN + "Transformer", OWN + "Normalize", OWN + "Pooling"], ["own_module.Transformer", OWN + "Pooling"]])
def test_other_modules_or_another_order_are_refused(tmp_path, types):
    folder = sentence_encoder(tmp_path)
    write_json(folder / "modules.json", [{"path": "", "type": kind} for kind in types])
    with pytest.raises(common.UserError, match=types[-1]):
        scorer_of(folder, "--type", "embed", "--pooling", "mean")


def test_each_distinct_text_is_encoded_once(model):
    scorer = scorer_of(model("bert"), "--type", "embed")
    embeddings, rows = {}, []

    def count(_, args, inputs):
        rows.extend(inputs["input_ids"])
    scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    common.score_embeddings(scorer, [*USERS, user("e", ["y"], ["road", "the red moon"])], embeddings)
    common.score_embeddings(scorer, [user("f", ["a song"], SHARED)], embeddings)
    items = set(SHARED + USERS[1]["candidates"] + USERS[2]["candidates"] + ["road"])
    assert set(embeddings) == items
    assert len(rows) == len(items) + 6  # and as many histories


def test_an_item_text_that_is_too_long_is_refused(model):
    scorer = scorer_of(model("bert"), "--type", "embed", "--max-length", 40)
    with pytest.raises(common.UserError, match="moon moon.*--max-length"):
        score(scorer, [user("u", ["red"], ["moon " * 100])])


@pytest.mark.skipif("RECBENCH_ENCODER" not in os.environ, reason="RECBENCH_ENCODER: folder of a sentence encoder")
def test_a_real_sentence_encoder_tells_related_texts_from_others():
    folder = os.environ["RECBENCH_ENCODER"]
    items = ["A trip to the moon in a spaceship", "Easy recipes with tomatoes"]
    users = [user("space", ["A rocket to the moon", "Space travel and planets"], items),
             user("cook", ["Italian cooking for beginners", "How to bake bread"], items)]
    got = score(scorer_of(folder, "--type", "embed"), users)
    assert got[0] > got[1] + 0.1 and got[3] > got[2] + 0.1
    assert_same(got, plain_cosines(folder, users, "AutoModel", "mean"))


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family, saved_class", [("bert-encoder", "BertModel"), ("t5-encoder", "T5EncoderModel")])
def test_a_model_without_lm_head_is_refused_for_prompts(model, family, saved_class):
    with pytest.raises(common.UserError, match=saved_class):
        scorer_of(model(family))


def test_a_classifier_is_refused_for_prompts_though_its_embeddings_are_tied(model, tmp_path):
    """transformers would take the embeddings for its LM head, without a word."""
    network = transformers.LlamaForSequenceClassification.from_pretrained(model("llama", tie_word_embeddings=True))
    network.save_pretrained(tmp_path)
    tiny.byte_level().save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="LlamaForSequenceClassification"):
        scorer_of(tmp_path)


@pytest.mark.parametrize("kind", common.UNUSABLE)
def test_unusable_types_are_refused_before_anything_is_loaded(tmp_path, kind):
    write_json(tmp_path / "config.json", {"model_type": kind, "architectures": [f"{kind}ForCausalLM"]})
    with pytest.raises(common.UserError, match=f"{kind}ForCausalLM"):
        scorer_of(tmp_path)


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(tmp_path):
    tokenizer = tiny.word_piece()
    tokenizer.mask_token = None
    with pytest.raises(common.UserError, match="mask token"):
        scorer_of(tiny.build("bert", tmp_path, tokenizer))


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    folder = tiny.build("bert", tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(common.UserError, match=folder):
        scorer_of(folder)


@pytest.mark.parametrize("factor, said", [(None, "self.query"), (torch.nan, "NaN")])
def test_missing_weights_are_named_and_nan_is_refused(tmp_path, factor, said):
    folder = tiny.build("bert", tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    query = weights.pop("bert.encoder.layer.0.attention.self.query.weight")
    if factor:
        weights["bert.encoder.layer.0.attention.self.query.weight"] = query * factor
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(common.UserError, match=said):
        scorer_of(folder, "--type", "embed")


def test_a_model_that_is_not_there_is_one_line():
    with pytest.raises(common.UserError, match="nobody/nothing.* hub"):
        scorer_of("nobody/nothing")


def test_device_auto_scores_a_model_that_lies_in_two_places(model, tmp_path, monkeypatch):
    """transformers' own map needs a GPU or two; here one layer waits on the disk."""
    load = transformers.AutoModelForCausalLM.from_pretrained

    def split(name, device_map, **options):
        assert device_map == "auto"
        parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
        return load(name, device_map=places, offload_folder=tmp_path, **options)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", split)
    scorer = scorer_of(model("llama"), "--device", "auto")
    monkeypatch.undo()
    assert set(scorer.model.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(score(scorer), plain_scores(model("llama")))
