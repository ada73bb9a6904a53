"""Tiny models of every family and tokenizers of three kinds, built from configurations: no download."""
import string

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("A user liked these items , oldest first : Would the also like this item ? Answer with Yes or No . yes no "
         "the red blue green old new river stone moon garden night king queen storm light shadow song road").split()


def byte_level():
    """Byte-level BPE, as GPT-2 and Llama 3: a word carries the space before it; BOS in front."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(alphabet)])}
    merges = []
    for word in WORDS:
        for left, right in [*((word[:end], word[end]) for end in range(1, len(word))), ("Ġ", word)]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                                eos_token="</s>", mask_token=None)


def word_piece():
    """WordPiece, as BERT: lower case, ## inside a word, [CLS] and [SEP] around."""
    words = sorted({word.lower() for word in WORDS})
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = {token: i for i, token in enumerate(dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *("##" + c for c in letters)]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                                                cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def sentence_piece(eos=False):
    """SentencePiece-like Unigram, as Llama 2 and T5: words start with the mark "▁"; BOS in front, or EOS behind."""
    pieces = {"<pad>": 0.0, "<s>": 0.0, "</s>": 0.0, "<unk>": 0.0, "<mask>": 0.0}
    pieces.update({"▁" + word: -2.0 - i / 100 for i, word in enumerate(WORDS)})
    pieces.update({c: -8.0 for c in "▁" + string.printable[:95] + "\n" if c not in pieces})
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    template, ids = ("$A </s>", [("</s>", 2)]) if eos else ("<s> $A", [("<s>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                                bos_token="<s>", eos_token="</s>", mask_token="<mask>")


SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=512)
GROUPED = dict(SIZE, num_key_value_heads=2, head_dim=8, pad_token_id=0)
FAMILIES = {  # name: (configuration class, language model class, arguments)
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(GROUPED, sliding_window=None)),
    "mistral-window": ("MistralConfig", "MistralForCausalLM", dict(GROUPED, sliding_window=8)),
    "phi": ("PhiConfig", "PhiForCausalLM", SIZE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)),
    "opt": ("OPTConfig", "OPTForCausalLM", dict(SIZE, ffn_dim=48, word_embed_proj_dim=32)),
    "opt-350m": ("OPTConfig", "OPTForCausalLM", dict(SIZE, ffn_dim=48, word_embed_proj_dim=16,
                                                       do_layer_norm_before=False)),
    "glm4": ("GlmConfig", "GlmForCausalLM", GROUPED),
    "glm4-0414": ("Glm4Config", "Glm4ForCausalLM", GROUPED),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZE),
    "falcon": ("FalconConfig", "FalconForCausalLM", dict(SIZE, multi_query=True, alibi=False)),
    "falcon-alibi": ("FalconConfig", "FalconForCausalLM", dict(SIZE, multi_query=True, alibi=True)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(GROUPED, sliding_window=512, query_pre_attn_scalar=8,
                                                        final_logit_softcapping=3.0)),
    "gemma3-window": ("Gemma3TextConfig", "Gemma3ForCausalLM",
                      dict(GROUPED, sliding_window=16, query_pre_attn_scalar=8,
                           layer_types=["sliding_attention", "full_attention"])),
    "llama4-chunk": ("Llama4TextConfig", "Llama4ForCausalLM",
                     dict(GROUPED, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48,
                          layer_types=["chunked_attention", "full_attention"])),
    "cohere": ("CohereConfig", "CohereForCausalLM", dict(GROUPED, logit_scale=3.0)),
    "granite": ("GraniteConfig", "GraniteForCausalLM", dict(GROUPED, logits_scaling=0.5, residual_multiplier=0.7)),
    "mpt": ("MptConfig", "MptForCausalLM", dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=512)),
    "bloom": ("BloomConfig", "BloomForCausalLM", dict(hidden_size=32, n_head=4, n_layer=2)),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", dict(GROUPED, layer_types=["conv", "full_attention"])),
    "qwen3-next": ("Qwen3NextConfig", "Qwen3NextForCausalLM",
                   dict(GROUPED, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
                        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=2,
                        num_experts_per_tok=1, moe_intermediate_size=48, shared_expert_intermediate_size=48)),
    "bert": ("BertConfig", "BertForMaskedLM", SIZE),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", dict(SIZE, pad_token_id=0)),
    "t5": ("T5Config", "T5ForConditionalGeneration", dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                         decoder_start_token_id=0)),
    "bert-encoder": ("BertConfig", "BertModel", SIZE),  # no LM head
    "t5-encoder": ("T5Config", "T5EncoderModel", dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
}
PACKED = ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gpt2", "opt", "opt-350m", "glm4", "glm4-0414",
          "gpt-neox", "falcon", "gemma2", "cohere", "granite", "mistral-window", "gemma3-window", "llama4-chunk"]
CACHED = ["mpt", "bloom", "falcon-alibi", "lfm2", "qwen3-next"]  # a state, or ALiBi
PADDED = ["bert", "roberta", "t5"]

SCALE = {"t5": 2.0, "phi3": 8.0, "falcon": 14.0, "falcon-alibi": 20.0, "bloom": 9.0, "lfm2": 8.0}  # others: 6


def build(family, folder, tokenizer=None, **changes):
    """Save a tiny random model of a family with its tokenizer as an ordinary model folder; returns the folder as str.

    Matrices are scaled up, so that logits spread and a wrong mask or position shows.
    """
    config_class, model_class, arguments = FAMILIES[family]
    own = {"bert": word_piece, "t5": lambda: sentence_piece(eos=True), "roberta": sentence_piece}
    tokenizer = tokenizer or own.get(family.removesuffix("-encoder"), byte_level)()
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer) + 4, **{**arguments, **changes})
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(SCALE.get(family, 6.0)) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
