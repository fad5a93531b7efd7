"""Preferences as tokens to train a reward model on, laid out as ``oatlite.oracles.reward_model`` scores them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oatlite.continuations import encode, text_columns
from oatlite.data import is_conversation
from oatlite.errors import ConfigError
from oatlite.finetuning.chats import Messages, plain_messages, render_chat
from oatlite.finetuning.held_apart import Groups, HeldApart, Row, hold_apart, keep_fitting
from oatlite.preferences import whole_conversations
from oatlite.reward_modeling import reference_pairs
from oatlite.sources import load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PairKeys:
    """Columns of prompts and of better and worse answers; ``reference``: of answers to set against other rows'."""

    prompt: str
    chosen: str
    rejected: str
    reference: str
    needs_pairs: bool = False

    def are_in(self, there: Sequence[str]) -> bool:
        """Whether pairs are to be read. Only columns that nobody asked for may be missing."""
        return self.needs_pairs or {self.chosen, self.rejected} <= set(there)


def pair_rows(
    source: str,
    split: str,
    eval_split: str | None,
    keys: PairKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    seed: int,
) -> HeldApart:
    """Rows with ``chosen_ids`` and ``rejected_ids``, those of one prompt all to train on or all held out.

    Texts are tokenized as prompt, response and EOS; conversations by the chat template. Pairs of two equal answers
    count as empty. Raises ConfigError for rows that cannot be used, and when none is left.
    """

    def read(name: str) -> Groups:
        table = load_rows(source, name)
        groups: dict[str, list[Row]] = {}
        for prompt, chosen, rejected in _encode(table, source, name, keys, tokenizer, seed):
            if chosen != rejected:
                groups.setdefault(prompt, []).append({"chosen_ids": chosen, "rejected_ids": rejected})
        if not groups:
            raise ConfigError("both texts of every pair are equal, so there is nothing to prefer", "bring other data")
        num_empty = len(table) - sum(map(len, groups.values()))
        return keep_fitting(list(groups.values()), num_empty, max_tokens)

    apart = hold_apart(read, split, eval_split, max_tokens, seed)
    table = load_rows(source, split)
    is_chat = keys.are_in(table.column_names) and _holds_conversations(table, keys)
    return dataclasses.replace(apart, is_chat=is_chat)


def _encode(
    table: Dataset, source: str, split: str, keys: PairKeys, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[tuple[str, list[int], list[int]]]:
    """What names a row's prompt, and the tokens of the better and the worse text."""
    there = table.column_names
    if not keys.are_in(there):
        pairs = reference_pairs(text_columns(table, source, [keys.prompt, keys.reference]), seed)
    elif {keys.chosen, keys.rejected} <= set(there) and _holds_conversations(table, keys):
        yield from _encode_conversations(table, f"split {split} of {source}", keys, tokenizer)
        return
    else:
        texts = text_columns(table, source, [keys.prompt, keys.chosen, keys.rejected])
        pairs = [(prompt, chosen, rejected) for prompt, chosen, rejected in texts]
    for prompt, chosen, rejected in pairs:
        better, worse = (_joined(*encode(tokenizer, prompt, text)) for text in (chosen, rejected))
        yield prompt, better, worse


def _joined(before: list[int], after: list[int]) -> list[int]:
    return [*before, *after]


def _holds_conversations(table: Dataset, keys: PairKeys) -> bool:
    columns = [keys.chosen, keys.rejected, *([keys.prompt] if keys.prompt in table.column_names else [])]
    return any(isinstance(next((value for value in table[key] if value), None), list) for key in columns)


def _encode_conversations(
    table: Dataset, where: str, keys: PairKeys, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int], list[int]]]:
    prompts = table[keys.prompt] if keys.prompt in table.column_names else [None] * len(table)
    for i, (prompt, *answers) in enumerate(zip(prompts, table[keys.chosen], table[keys.rejected], strict=True)):
        if not all(answers):
            continue
        row = f"row {i} of {where}"
        chosen, rejected = (_messages(answer, row, keys) for answer in answers)
        start = plain_messages(prompt) if is_conversation(prompt) else prompt
        better, worse = whole_conversations(start, chosen, rejected)
        if len(better) == 1 or better[0]["role"] == "assistant":
            raise ConfigError(f"{row} has an answer without a prompt", "name the column of prompts by --prompt-key")
        ids = [
            tokenizer(render_chat(tokenizer, each, row, awaits_answer=False), add_special_tokens=False)["input_ids"]
            for each in (better, worse)
        ]
        common = [a for a, b in zip(better, worse, strict=False) if a == b]
        yield json.dumps(common), ids[0], ids[1]


def _messages(answer: Any, row: str, keys: PairKeys) -> Messages:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if not is_conversation(answer):
        raise ConfigError(
            f"{row}: {keys.chosen} and {keys.rejected} are no texts or lists of messages with role and content",
            "name other columns by --chosen-key and --rejected-key",
        )
    return plain_messages(answer)
