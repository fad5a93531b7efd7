"""Prompts and the texts that continue them: from a data source to token ids, the way generation sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from oatlite.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


def text_columns(rows: Dataset, source: str, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The text columns ``keys`` of ``rows``, which came from ``source``; without the rows that lack one of them.

    Raises ConfigError when a column is not there, holds no text, or no row is left.
    """
    if missing := [key for key in keys if key not in rows.column_names]:
        raise ConfigError(
            f"{source} has no column {', '.join(missing)}",
            f"its columns are {', '.join(rows.column_names)}: name them with --prompt-key and its like",
        )
    table = list(zip(*(rows[key] for key in keys), strict=True))
    if strange := {type(value).__name__ for row in table for value in row} - {"str", "NoneType"}:
        raise ConfigError(f"{source} holds {', '.join(sorted(strange))} in {', '.join(keys)}", "name columns of text")
    complete = [row for row in table if all(row)]
    if not complete:
        raise ConfigError(f"{source} has no row with text in {', '.join(keys)}", "name other columns, or other data")
    return complete


def join(prompt: str, text: str) -> str:
    """``text`` as it follows ``prompt``: one space goes between when neither side brings white space."""
    return text if prompt[-1:].isspace() or text[:1].isspace() else f" {text}"


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of ``prompt`` and, tokenized apart from it as a policy produces them, of ``text`` and EOS.

    Raises ConfigError for a tokenizer without EOS.
    """
    eos = require_eos(tokenizer)
    response = tokenizer(join(prompt, text), add_special_tokens=False)["input_ids"]
    return tokenizer(prompt)["input_ids"], [*response, eos]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The EOS token's id. Raises ConfigError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token", "set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def pad_right(sequences: Sequence[Sequence[float]], value: float, device: torch.device) -> torch.Tensor:
    """Stack sequences into (len(sequences), longest), ``value`` after the end of the shorter ones."""
    longest = max(map(len, sequences))
    rows = [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


def drop_long(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """The indices of rows within ``max_tokens``. Raises ConfigError when fewer than two are left."""
    kept = [row for row, length in enumerate(lengths) if length <= max_tokens]
    if len(kept) < 2:
        raise ConfigError(
            f"{len(kept)} of {len(lengths)} rows fit into --max-tokens {max_tokens}, which leaves none to hold out",
            f"the shortest has {min(lengths)} tokens: raise --max-tokens, or bring more rows",
        )
    return kept


def hold_out(num: int, seed: int) -> tuple[list[int], list[int]]:
    """Split ``num`` row indices at random into training and held-out ones: a twentieth, from 1 to 512."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(512, max(1, num // 20))
    return order[size:], order[:size]
