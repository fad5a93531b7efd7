"""A data source's rows as tokens to train a policy on, each with the labels that say where the loss is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from oatlite.continuations import encode, require_eos, text_columns
from oatlite.errors import ConfigError
from oatlite.finetuning.chats import IGNORED, conversations, encode_chat
from oatlite.finetuning.held_apart import Groups, HeldApart, Row, hold_apart, keep_fitting
from oatlite.sources import load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
"""The column of conversations where nobody named one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where rows are: in ``keys``, which are a prompt and its reference, or one conversation, or one plain text."""

    kind: Literal["references", "messages", "text"]
    keys: tuple[str, ...]


def choose_columns(
    there: Sequence[str], *, prompt_key: str, reference_key: str, messages_key: str | None, text_key: str | None
) -> Columns:
    """What to train on, of the columns that are ``there``. Raises ConfigError where two kinds are asked for."""
    if messages_key is not None and text_key is not None:
        raise ConfigError("--messages-key and --text-key name two kinds of rows", "leave one of them out")
    if text_key is not None:
        return Columns(kind="text", keys=(text_key,))
    if messages_key is None and MESSAGES in there and prompt_key not in there:
        messages_key = MESSAGES
    if messages_key is not None:
        return Columns(kind="messages", keys=(messages_key,))
    return Columns(kind="references", keys=(prompt_key, reference_key))


def policy_rows(
    source: str,
    split: str,
    eval_split: str | None,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    trains_on_prompts: bool,
    seed: int,
) -> HeldApart:
    """Rows with ``input_ids`` and ``labels``: T token ids each, -100 in the labels where no loss is.

    The loss is on references, on the turns of assistants, or on all of a text; with ``trains_on_prompts`` on the
    prompts of references, too, when training, and never in ``held_out``. Rows longer than ``max_tokens`` are left
    out; texts are cut into pieces instead. Raises ConfigError for rows that cannot be used, and when none is left.
    """

    def read(name: str) -> Groups:
        table = load_rows(source, name)
        groups = _encode(table, name, source, columns, tokenizer, max_tokens)
        return keep_fitting(groups, len(table) - len(groups), max_tokens)

    apart = hold_apart(read, split, eval_split, max_tokens, seed)
    if trains_on_prompts:
        labels = apart.training["input_ids"]
        training = apart.training.remove_columns("labels").add_column("labels", list(labels))
        apart = dataclasses.replace(apart, training=training)
    return apart


def _encode(
    table: Dataset, split: str, source: str, columns: Columns, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[list[Row]]:
    """A group of rows for each row of the source that is not empty."""
    if columns.kind == "messages":
        where = f"split {split} of {source}"
        found = conversations(table, source, columns.keys[0], where)
        rows = (encode_chat(tokenizer, messages, f"row {i} of {where}") for i, messages in found)
        return [[row] for row in rows if row is not None]
    if columns.kind == "text":
        eos = require_eos(tokenizer)
        texts = (tokenizer(text, verbose=False)["input_ids"] for (text,) in text_columns(table, source, columns.keys))
        return [_pieces([*tokens, eos], max_tokens) for tokens in texts]
    parts = (encode(tokenizer, *row) for row in text_columns(table, source, columns.keys))
    return [[{"input_ids": [*before, *after], "labels": [IGNORED] * len(before) + after}] for before, after in parts]


def _pieces(tokens: list[int], max_tokens: int) -> list[Row]:
    starts = range(0, len(tokens), max_tokens)
    pieces = [tokens[start : start + max_tokens] for start in starts]
    return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]
