"""Small networks from scratch, and a tokenizer trained on the spot: what runs where nothing can be downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import os, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedModel, PretrainedConfig, PreTrainedTokenizerFast

TinyName = Literal["tiny-llama", "tiny-neox"]
TINY_NAMES: tuple[TinyName, ...] = get_args(TinyName)

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_HEAD_DIM = 64  # one that vLLM's CPU attention has a kernel for


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """The size of a tiny network. ``hidden_size`` is a multiple of 64, the size of an attention head."""

    hidden_size: int = 256
    num_layers: int = 4
    max_positions: int = 1024


def is_tiny(name: str) -> TypeGuard[TinyName]:
    return name in TINY_NAMES


def tiny_config(
    name: TinyName, tokenizer: PreTrainedTokenizerFast, shape: TinyShape | None = None
) -> PretrainedConfig:
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


@torch.no_grad()
def match_and_copy(model: PreTrainedModel, scale: float) -> None:
    """Start attention of a Llama by looking for equal tokens and copying them (mimetic initialization, 2305.09828)."""
    for layer in model.base_model.layers:
        attention = layer.self_attn
        attention.k_proj.weight.normal_(std=scale)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        attention.v_proj.weight.normal_(std=scale)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
