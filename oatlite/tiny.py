"""Small networks from scratch, and a tokenizer trained on the spot: what runs where nothing can be downloaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from oatlite.errors import ConfigError

TinyName = Literal["tiny-llama", "tiny-neox"]
TINY_NAMES: tuple[TinyName, ...] = get_args(TinyName)

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_HEAD_DIM = 64  # one that vLLM's CPU attention has a kernel for
_MATCH_LOGIT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """The size of a tiny network. ``hidden_size`` is a multiple of 64, the size of an attention head."""

    hidden_size: int = 256
    num_layers: int = 4
    max_positions: int = 1024


DEFAULT_SHAPE = TinyShape()


def check_positions(max_tokens: int, shape: TinyShape) -> None:
    """Raise ConfigError if a row may have more tokens than a network of ``shape`` has positions."""
    if max_tokens > shape.max_positions:
        limit = shape.max_positions
        raise ConfigError(f"--max-tokens {max_tokens} is more than the model's {limit} positions", "lower --max-tokens")


def tiny_config(name: TinyName, tokenizer: PreTrainedTokenizerFast, shape: TinyShape | None = None) -> PretrainedConfig:
    """The configuration of a float32 network for ``tokenizer``; its ``vocab_size`` is padded to a multiple of 64.

    The default shape has 4.2 million parameters (Llama) or 5.3 (GPT-NeoX) with 4,096 tokens.
    """
    shape = shape or TinyShape()
    if shape.hidden_size % _HEAD_DIM:
        raise ValueError(f"hidden_size is {shape.hidden_size}, which is not a multiple of {_HEAD_DIM}")
    common = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.hidden_size // _HEAD_DIM,
        "max_position_embeddings": shape.max_positions,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    if name == "tiny-llama":
        gated = -(-shape.hidden_size * 8 // (3 * 64)) * 64
        return LlamaConfig(**common, intermediate_size=gated, tie_word_embeddings=True)
    return GPTNeoXConfig(**common, intermediate_size=4 * shape.hidden_size, tie_word_embeddings=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with at most ``vocab_size`` tokens, EOS, a pad token of its own and no BOS.

    All 256 bytes are in it, so any text survives encoding and decoding. Raises ValueError when ``vocab_size`` has
    no room for them.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and two special tokens need {len(alphabet) + 2}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False, padding_side="left"
    )


def new_tiny_model(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A network with fresh weights from torch's global generator, such as ``AutoModelForCausalLM`` makes.

    Attention begins by looking for tokens equal to the current one and by copying what it finds: queries equal
    keys, and the output projection is the transpose of the values (mimetic initialization, Trockman and Kolter,
    arXiv 2305.09828). Nets this small otherwise take several times as many steps until they copy from a prompt.
    """
    model = auto_class.from_config(config)
    with torch.no_grad():
        for layer in model.base_model.layers:
            _match_and_copy(layer, config)
    return model


def _match_and_copy(layer: Any, config: PretrainedConfig) -> None:
    # Normalized hidden states have a mean square of 1, so equal tokens get a logit of _MATCH_LOGIT.
    std = math.sqrt(_MATCH_LOGIT / (math.sqrt(_HEAD_DIM) * config.hidden_size))
    same = torch.empty(config.hidden_size, config.hidden_size).normal_(std=std)
    values = torch.empty_like(same).normal_(std=std)
    if isinstance(config, LlamaConfig):
        projections = layer.self_attn
        projections.q_proj.weight.copy_(same)
        projections.k_proj.weight.copy_(same)
        projections.v_proj.weight.copy_(values)
        projections.o_proj.weight.copy_(values.T)
    else:
        heads = (config.num_attention_heads, _HEAD_DIM, config.hidden_size)
        fused = torch.stack([same.view(heads), same.view(heads), values.view(heads)], dim=1)
        layer.attention.query_key_value.weight.copy_(fused.view(3 * config.hidden_size, config.hidden_size))
        layer.attention.dense.weight.copy_(values.T)
