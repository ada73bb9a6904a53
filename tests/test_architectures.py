"""Every language model class of transformers that a tiny configuration can build, scored here and by it alone.

    python -m pytest --slow tests/test_architectures.py         every architecture, in float32 and in bfloat16
    python tests/test_architectures.py --dtype bfloat16         as a table: what ran how, what is refused and why
    python tests/test_architectures.py gpt_neo fnet             two of them

The truth is one prompt, one forward pass and the model's own full logits (or, of embeddings, its own states).
"""
import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import common

# --------------------------------------------------------------------------------------------- tiny configurations

SIZES = {  # by the names that configurations have for them
    32: "hidden_size d_model n_embd embed_dim emb_dim dim embedding_size embedding_dim word_embed_proj_dim lru_width "
        "attention_hidden_size input_embedding_size output_embedding_size hidden_size_per_layer_input d_latents "
        "backbone_hidden_size pooler_hidden_size prediction_head_size adapter_out_dim entity_emb_size",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size hidden_dim "
        "dim_ff dff d_inner ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size moe_shared_expert_intermediate_size "
        "feed_forward_size shared_experts_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
       "num_encoder_layers num_blocks num_self_attends_per_block num_key_value_heads num_kv_heads num_experts_per_tok "
       "swa_num_key_value_heads moe_topk num_experts_per_token moe_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
       "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_self_attention_heads "
       "num_cross_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_key_heads "
       "linear_num_value_heads linear_num_heads mamba_num_heads mamba_n_heads n_mamba_heads index_n_heads",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts",
    8: "head_dim swa_head_dim d_head d_kv dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_size "
       "attention_head_dim kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state "
       "ssm_state_size state_size mamba_head_dim rotary_dim pronunciation_embed_dim shape_embed_dim",
    16: "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim num_latents sliding_window attention_chunk_size window_size",
    2048: "max_position_embeddings n_positions max_seq_len max_target_positions max_source_positions "
          "max_encoder_position_embeddings max_decoder_position_embeddings",
    10: "entity_vocab_size pronunciation_vocab_size shape_vocab_size",
}
VOCABULARIES = ["vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 2,
          "mask_token_id": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS = {  # what the names do not tell
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"],
                                rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE}),
    "dots3_note_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16,
                            swa_kv_lora_rank=16, swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8),
    "esmc": dict(num_key_value_heads=4),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8),
    "nemotron_h": dict(n_groups=2),
    "neomme": dict(head_dim=16),
    "qwen4_exp_text": dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=2048,
                           indexer_compress_ratio=16),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_shape=[32, 64], axial_pos_embds_dim=[16, 16]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=64, attention_head_dim=16, num_hidden_layers=3,
                  layers_block_type=["hybrid", "linear_attention", "hybrid"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}


VARIANTS = [  # what a configuration's defaults leave out
    ("causal", "bert", dict(is_decoder=False)),  # a language model that looks ahead
    ("causal", "falcon", dict(alibi=True)),
    ("causal", "gemma3_text", dict(sliding_window=64)),
    ("causal", "gpt_neo", dict(window_size=64)),
    ("causal", "llama4_text", dict(attention_chunk_size=64)),
    ("causal", "mistral", dict(sliding_window=64)),
    ("causal", "xlm", dict(causal=True)),
    ("masked", "deberta-v2", dict(legacy=False)),
    ("seq2seq", "t5", dict(decoder_start_token_id=None)),
]


def tiny_arguments(config, vocabulary):
    """Arguments for a tiny configuration of the class of `config`, an instance with the default sizes."""
    sizes = {}
    for size, names in SIZES.items():
        sizes.update(dict.fromkeys(names.split(), size))
    sizes.update(dict.fromkeys(VOCABULARIES, vocabulary))
    arguments = {}
    for name in type(config).__dataclass_fields__:
        value = vars(config).get(name)
        if isinstance(value, transformers.PreTrainedConfig):
            arguments[name] = tiny_arguments(value, vocabulary)
            if value.model_type:
                arguments[name]["model_type"] = value.model_type
        elif name in TOKENS:
            arguments[name] = TOKENS[name]
        elif name in ("is_decoder", "add_cross_attention") and value:
            arguments[name] = True
        elif name in sizes and (value is None or type(value) is int and value != 0):  # 0 switches a part off
            arguments[name] = sizes[name]
    if "kv_lora_rank" in arguments:  # attention without groups
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if vars(config).get("is_encoder_decoder"):
        arguments["decoder_start_token_id"] = 0
    layer_types = vars(config).get("layer_types")
    if layer_types:  # one layer of each kind, two at least
        kinds = list(dict.fromkeys(layer_types))
        arguments["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        arguments["num_hidden_layers"] = len(arguments["layer_types"])
    arguments.update(EXCEPTIONS.get(config.model_type, {}))
    return arguments


def spread_weights(model):
    """Make random weights large enough that scores spread, and give biases and buffers values that matter."""
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point() or name.endswith("A_log"):
            continue
        if weight.dim() < 2 or name == "final_logits_bias":
            weight.add_(0.1 * torch.randn_like(weight))
            continue
        size = weight.square().mean().sqrt()
        wanted = 1.0 if "embed" in name else 2.0 / math.sqrt(weight.shape[-1])
        if size > 0:
            weight.mul_(wanted / size)
        else:
            weight.add_(wanted * torch.randn_like(weight))


# --------------------------------------------------------------------------------------------- models and the truth


class Kind(NamedTuple):
    names: dict  # {model type: class name} in transformers
    loader: type
    tokenizer: object
    answers: tuple


def sentence_piece_with_eos():
    return tiny.sentence_piece(eos=True)


KINDS = {
    "causal": Kind(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM,
                   tiny.byte_level, ("ĠYes", "ĠNo")),
    "masked": Kind(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM,
                   tiny.word_piece, ("yes", "no")),
    "seq2seq": Kind(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM,
                    sentence_piece_with_eos, ("▁Yes", "▁No")),
}


def list_architectures():
    """(kind, model type, no changes) of every type, then the variants.

    Masked models come last, since some classes of that mapping are encoder-decoders of the second.
    """
    found, seen = [], {}
    for kind in ("causal", "seq2seq", "masked"):
        for name, class_name in KINDS[kind].names.items():
            if "WithLMHead" in class_name and kind == "causal":  # XLM, which is masked but for a variant; Reformer
                continue
            if seen.setdefault(class_name, kind) == kind:
                found.append((kind, name, {}))
    return found + VARIANTS


ARCHITECTURES = list_architectures()

WORDS = "red blue green old new river stone moon garden night king queen storm light shadow song road".split()


def title(length, seed):
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def make_users():
    """Users whose packed rows are longer than 256 tokens, whose prompts differ in length, and one with prefixes."""
    titles = [title(2 + seed % 7, seed) for seed in range(40)]
    long = {"user": "long", "history": titles[:18], "candidates": titles[18:26]}
    short = {"user": "short", "history": titles[26:27], "candidates": ["the red", "the red moon", "the red moon river"]}
    middle = {"user": "middle", "history": titles[27:36], "candidates": titles[36:]}
    return [long, short, middle]


USERS = make_users()


def label(kind, name, changes):
    text = f"{kind}-{name}"
    for key, value in changes.items():
        text += f"-{key}-{value}"
    return text


def build(kind, name, changes, folder):
    """Save a tiny model of an architecture with its tokenizer as an ordinary model folder."""
    torch.manual_seed(0)
    tokenizer = KINDS[kind].tokenizer()
    config_class = CONFIG_MAPPING[name]
    arguments = tiny_arguments(config_class(), len(tokenizer) + 8)  # real models too have spare embeddings
    if kind == "causal" and "is_decoder" in config_class.__dataclass_fields__:
        arguments["is_decoder"] = True  # else BERT as a language model would look ahead
    arguments.update(changes)
    model = KINDS[kind].loader.from_config(config_class(**arguments))
    with torch.no_grad():
        spread_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_plain(loader, folder, dtype):
    """(model, tokenizer) of a folder by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = loader.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.config.use_cache = False
    return model, tokenizer


def true_prompt_scores(kind, folder, dtype):
    """logit(yes) - logit(no), one prompt and one forward pass at a time, from the whole vocabulary's logits."""
    model, tokenizer = load_plain(KINDS[kind].loader, folder, dtype)
    yes, no = tokenizer.convert_tokens_to_ids(KINDS[kind].answers)
    texts = []
    for user in USERS:
        texts += common.candidate_prompts(common.PROMPT, user["history"], user["candidates"])
    scores = []
    for text in texts:
        if kind == "masked":
            text += tokenizer.mask_token
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        inputs, place = {"input_ids": ids}, -1
        if kind == "masked":
            place = ids[0].tolist().index(tokenizer.mask_token_id)
        if kind == "seq2seq":
            inputs["decoder_input_ids"], place = torch.tensor([[model.config.decoder_start_token_id]]), 0
        with torch.inference_mode():
            logits = model(**inputs).logits[0, place]
        scores.append(float(logits[yes]) - float(logits[no]))
    return np.array(scores)


def true_embedding_scores(kind, folder, dtype):
    """Cosines of history and candidate, one text and one forward pass at a time: last token, or mean over tokens."""
    if kind == "seq2seq" and not transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder:
        kind = "causal"  # speech models, whose text part is a decoder
    loader = transformers.AutoModelForTextEncoding if kind == "seq2seq" else transformers.AutoModel
    model, tokenizer = load_plain(loader, folder, dtype)

    def embedding(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=ids).last_hidden_state[0].double()
        return states[-1] if kind == "causal" else states.mean(0)

    scores = []
    for user in USERS:
        history = common.history_text(common.PROMPT, user["history"])
        of_user = embedding(common.PROMPT["user"].replace("{history}", history))
        for text in user["candidates"]:
            scores.append(float(torch.cosine_similarity(of_user, embedding(text), dim=0)))
    return np.array(scores)


TRUTH = {"prompt": true_prompt_scores, "embed": true_embedding_scores}

# ------------------------------------------------------------------------------------------------ the project's side


class Outcome(NamedTuple):
    how: str  # "packed", "cached", "padded", "equal", "alone", "refused", "not built", "wrong" or "traceback"
    detail: str
    errors: dict  # {way of scoring: largest error, as a share of the spread of the true scores}


def load(folder, score_type, dtype):
    """(scorer, what it printed). Raises UserError."""
    parser = common.argument_parser("")
    parser.add_argument("--model")
    common.shared_arguments(parser)
    flags = ["--model", str(folder), "--type", score_type, "--device", "cpu", "--dtype", dtype]
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        scorer = common.load_scorer(parser.parse_args(flags))
    return scorer, printed.getvalue()


def scores_of(scorer):
    if scorer.type == "embed":
        return np.concatenate(common.score_embeddings(scorer, USERS, {})[0])
    return np.concatenate(common.score_prompts(scorer, USERS)[0])


def leak_of(scorer):
    """By how much the same words in another order in a user's first candidate move the scores of the others."""
    first, *others = USERS[0]["candidates"]
    reversed_words = " ".join(reversed(first.split()))
    changed = {**USERS[0], "candidates": [reversed_words, *others]}
    ends_with_candidate = {**scorer.prompt, "prompt": "{history}\n{candidate}"}  # a short convolution sees no further
    scorer = scorer._replace(prompt=ends_with_candidate)
    before = common.score_prompts(scorer, [USERS[0]])[0][0]
    after = common.score_prompts(scorer, [changed])[0][0]
    assert before[0] != after[0]
    return float(np.abs(after - before)[1:].max())


def one_line(text, folder):
    return " ".join(str(text).split()).replace(str(folder), Path(folder).name)


def examine(folder, kind, name, changes, score_type, dtype):
    """Score an architecture in every way that the project has and compare with the truth: an Outcome."""
    if not Path(folder, "config.json").exists():
        try:
            build(kind, name, changes, folder)
        except Exception as error:  # no tiny configuration of it, or a package that is not installed
            return Outcome("not built", f"{type(error).__name__}: {one_line(error, folder)[:90]}", {})
    try:
        scorer, printed = load(folder, score_type, dtype)
        ways = {scorer.layout: scores_of(scorer)}
        leak = leak_of(scorer) if scorer.layout == "packed" else 0.0
        if scorer.layout == "cached":  # so it is trained
            ways["equal"] = scores_of(scorer._replace(layout="equal"))
        ways["alone"] = scores_of(scorer._replace(layout="equal", max_tokens=1))
    except common.UserError as error:
        return Outcome("refused", one_line(error, folder), {})
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {one_line(error, folder)[:200]}", {})
    truth = TRUTH[score_type](kind, folder, "float32")
    allowed = 3e-4  # tiny random weights amplify rounding: 1e-4 at most (UMT5; in float64 1e-13)
    if dtype != "float32":  # as far from the float32 scores as transformers itself is, or nearly so
        allowed = 2 * distance(TRUTH[score_type](kind, folder, dtype), truth) + 0.02
    errors = {}
    for way, scores in ways.items():
        errors[way] = distance(scores, truth)
    if not np.std(truth) > (0.03 if score_type == "prompt" else 0.001):
        return Outcome("wrong", f"the true scores spread by {np.std(truth):.2g} only: the test could not fail", errors)
    if leak > 0:  # a test of its own, since the rounding of bfloat16 can hide it
        return Outcome("wrong", f"a candidate moves the scores beside it by {leak:.2g}", errors)
    how = scorer.layout if max(errors.values()) <= allowed else "wrong"
    listed = common.layout_of(scorer.model.config, scorer.family, score_type == "embed")
    if how != listed and how != "wrong":
        how = "wrong" if dtype == "float32" else "alone"  # rounding of bfloat16 may look like a wrong layout
    return Outcome(how, one_line(printed, folder), errors)


def distance(scores, truth):
    """The largest error of the scores as a share of the true scores' spread; of NaN, infinite."""
    error = np.abs(scores - truth).max() / np.std(truth)
    return float(error) if np.isfinite(error) else math.inf


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("score_type", ["prompt", "embed"])
@pytest.mark.parametrize("kind, name, changes", ARCHITECTURES, ids=[label(*row) for row in ARCHITECTURES])
def test_scores_are_those_of_transformers_or_refused_in_one_line(models, kind, name, changes, score_type, dtype):
    folder = models / label(kind, name, changes)
    outcome = examine(folder, kind, name, changes, score_type, dtype)
    if outcome.how == "not built":
        pytest.skip(outcome.detail)
    assert outcome.how in ("packed", "cached", "padded", "equal", "alone", "refused"), outcome


def test_every_listed_type_is_one_that_is_examined_here():
    examined = set(CONFIG_MAPPING) & {name for kind in KINDS.values() for name in kind.names}
    for listed in (common.PACKED, common.CACHED, common.PADDED):
        assert len(listed) == len(set(listed)) and set(listed) <= examined


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all if not given")
    parser.add_argument("--type", choices=TRUTH, default="prompt")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    rows, counts = [("architecture", "how", "largest error, as a share of the spread", "")], {}
    for row in ARCHITECTURES:
        if args.names and row[1] not in args.names:
            continue
        with tempfile.TemporaryDirectory() as models:  # of one model: all take 3 GB
            outcome = examine(Path(models, label(*row)), *row, args.type, args.dtype)
        print(label(*row), outcome, file=sys.stderr, flush=True)
        errors = [f"{way} {error:.0e}" for way, error in outcome.errors.items()]
        rows.append((label(*row), outcome.how, ", ".join(errors), outcome.detail))
        counts[outcome.how] = counts.get(outcome.how, 0) + 1
    print(common.markdown_table(rows))
    print(", ".join(f"{how}: {count}" for how, count in counts.items()))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    main()
