"""How large a model is, told from its ``config.json`` and the headers of its weights, without loading either."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNGATED = ("gpt_neox", "gpt2", "gptj", "opt", "phi", "bloom", "falcon", "gpt_bigcode", "deberta-v2", "bert", "roberta")
"""Families whose feed-forward layers have two matrices and not three."""
LONGEST_HEADER_BYTES = 100 << 20  # of safetensors themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """``ffn_size`` is the width of a feed-forward layer, of a mixture of experts that of those a token goes through.
    ``head_size`` is the width of one attention head."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int

    @property
    def attention_size(self) -> int:
        """Numbers of queries, keys and values of a token in one layer."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    @property
    def cached_size(self) -> int:
        """Numbers of keys and values of a token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


def folder_of(name: str) -> Path | None:
    """The folder of a model: ``name`` itself, or where the hub's cache has it; None where it is not on this machine."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    snapshots = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}/snapshots"
    found = [path.parent for path in snapshots.glob("*/config.json")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def size_of(name: str) -> ModelSize | None:
    """Of a folder or a hub id. None where it is not here, or its configuration does not tell its shape."""
    folder = folder_of(name)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return size_from(config, count_parameters(folder))
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it the preflight says
        return None


def size_from(config: Mapping[str, Any], num_parameters: int | None = None) -> ModelSize:
    """Of a ``config.json``; ``num_parameters`` are counted from the shape where they are not known.

    Raises KeyError for a configuration without the usual names.
    """
    text = config.get("text_config") or config
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    size = ModelSize(
        num_parameters=num_parameters or 0,
        num_layers=_first(text, "num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden,
        ffn_size=_ffn_size(text, hidden),
        num_heads=heads,
        num_kv_heads=_maybe(text, "num_key_value_heads") or heads,
        head_size=_maybe(text, "head_dim") or hidden // heads,
        vocab_size=_first(text, "vocab_size"),
    )
    if num_parameters is not None:
        return size
    return ModelSize(**{name: getattr(size, name) for name in size.__slots__} | {"num_parameters": _count(size, text)})


def count_parameters(folder: Path) -> int | None:
    """From the headers of the safetensors files; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(_parameters_in, files)) if files else None


def _parameters_in(file: Path) -> int:
    """Layout: the header's length as 8 bytes, then JSON with a shape for each tensor. Raises ValueError."""
    with file.open("rb") as opened:
        start = opened.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (LONGEST_HEADER_BYTES + 1,)
        if length > LONGEST_HEADER_BYTES:
            raise ValueError(f"{file} is no complete safetensors file")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file} has no header")
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _ffn_size(text: Mapping[str, Any], hidden: int) -> int:
    one = _maybe(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    routed = _maybe(text, "num_experts_per_tok")
    return routed * (_maybe(text, "moe_intermediate_size") or one) if routed else one


def _count(size: ModelSize, text: Mapping[str, Any]) -> int:
    """Embedding and head, and in each layer attention and feed-forward matrices; norms and biases are nothing beside
    them."""
    matrices = 2 if text.get("model_type") in UNGATED else 3
    experts = _maybe(text, "num_experts", "num_local_experts")
    ffn = size.ffn_size * experts // int(text["num_experts_per_tok"]) if experts else size.ffn_size
    attention = size.hidden_size * (size.attention_size + size.num_heads * size.head_size)
    embeddings = (1 if text.get("tie_word_embeddings", False) else 2) * size.vocab_size * size.hidden_size
    return embeddings + size.num_layers * (attention + matrices * size.hidden_size * ffn)


def _first(text: Mapping[str, Any], *names: str) -> int:
    found = _maybe(text, *names)
    if found is None:
        raise KeyError(names[0])
    return found


def _maybe(text: Mapping[str, Any], *names: str) -> int | None:
    return next((int(text[name]) for name in names if text.get(name)), None)
