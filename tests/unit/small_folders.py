"""Folders with very small models and tokenizers, for tests that read them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<eos>", "<bos>", "<pad>"]
VOCAB_SIZE = 256 + len(SPECIAL)


def byte_tokenizer(*, bos=False, pad=True, eos=True, chat=False) -> PreTrainedTokenizerFast:
    """One token per byte; with ``bos`` it begins every text with BOS."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>" if eos else None,
        pad_token="<pad>" if pad else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def config_of(family: str, **changes):
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    if family == "moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        both = sizes | changes
        shapes = {"moe_intermediate_size": both["hidden_size"], "head_dim": both["hidden_size"] // 2}
        return Qwen3MoeConfig(**(shapes | both))
    return {"llama": LlamaConfig, "neox": GPTNeoXConfig}[family](**(sizes | changes))


def save_model(folder: Path, family="llama", *, reward=False, seed=0, tokenizer=None, **changes) -> str:
    """A random model with its tokenizer: a language model, or a classifier with one label (``reward``)."""
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    changes = ({"num_labels": 1} if reward else {}) | changes
    auto.from_config(config_of(family, **changes)).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)
