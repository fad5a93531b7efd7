"""Pairs of a better and a worse answer to a prompt, which an offline run reads instead of asking an oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from oatlite.config.flags import to_type
from oatlite.config.schema import DataConfig
from oatlite.data import READ_ROWS, TokenIds, fixed_order, in_template, is_conversation, load_rows, raw_text, render
from oatlite.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSet:
    """M pairs, ready to be trained on.

    ``prompts``, ``chosen`` and ``rejected`` are texts without a chat template; the tokens, int32, are those that the
    policy sees: of the prompt with the special tokens around it, of an answer up to its EOS. ``margins`` (M,) are
    rewards of the better answer minus those of the worse one, where the data has them. ``num_dropped`` counts the rows
    that were read and left out because something was empty or too long, or both answers were the same.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    prompt_tokens: list[TokenIds]
    chosen_tokens: list[TokenIds]
    rejected_tokens: list[TokenIds]
    margins: npt.NDArray[np.float64] | None
    num_dropped: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompt_tokens), default=0)

    @property
    def longest_response(self) -> int:
        return max(map(len, [*self.chosen_tokens, *self.rejected_tokens]), default=0)


def load_preferences(
    data: DataConfig, num_held_out: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreferenceSet, PreferenceSet]:
    """The pairs to train on and ``num_held_out`` held-out ones.

    A row is a prompt with two answers, each text or, with ``data.chat_template``, a conversation; two whole
    conversations that differ in the last message alone need no prompt. Rows are read in one fixed order. Without
    ``data.eval_split`` the first usable ones are held out, and no pair with the prompt of a held-out one is trained
    on; of the others, ``data.max_prompts`` are (default: all). Raises ConfigError for whatever cannot be used, and
    when no pair is left.
    """
    assert data.preferences is not None, "checked with the configuration"
    train_rows = load_rows(data.preferences, data.split)
    order = fixed_order(len(train_rows))
    if data.eval_split is not None and data.eval_split != data.split and num_held_out:
        eval_rows = load_rows(data.preferences, data.eval_split)
        eval_reader = _Reader(eval_rows, data.eval_split, data, tokenizer)
        held_out, _ = eval_reader.take(fixed_order(len(eval_rows)), num_held_out)
        training, _ = _Reader(train_rows, data.split, data, tokenizer).take(order, data.max_prompts)
    else:
        reader = _Reader(train_rows, data.split, data, tokenizer)
        held_out, num_read = reader.take(order, num_held_out)
        training, _ = reader.take(order[num_read:], data.max_prompts, leave_out=frozenset(held_out.prompts))
    for pairs, wanted, purpose in ((held_out, num_held_out, "evaluate with"), (training, 1, "train on")):
        if wanted and not len(pairs):
            besides = f" besides the {len(held_out)} held out" if pairs is training and len(held_out) else ""
            raise ConfigError(
                f"{data.preferences} has no usable pair to {purpose}{besides}: {pairs.num_dropped} are empty, equal or "
                "too long",
                f"raise --max-prompt-tokens or type {to_type('data.max_response_tokens', 'NUMBER')}"
                f"{', or lower --eval-prompts' * bool(besides)}",
            )
    return training, held_out


@dataclass(frozen=True, slots=True)
class _Texts:
    """A row as text: what is shown, and what is tokenized."""

    prompt: str
    chosen: str
    rejected: str
    rendered: tuple[str, str, str]
    margin: float


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns rows of one split into pairs."""

    rows: Dataset
    split: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase

    def take(
        self, order: npt.NDArray[np.int64], wanted: int | None, *, leave_out: frozenset[str] = frozenset()
    ) -> tuple[PreferenceSet, int]:
        """The first ``wanted`` usable pairs in ``order`` (None: all), and how many rows were read for them."""
        keys = self._columns()
        columns = self.rows.select_columns(keys)
        kept: list[_Texts] = []
        tokens: list[tuple[TokenIds, TokenIds, TokenIds]] = []
        num_dropped = num_read = 0
        while num_read < len(order) and (wanted is None or len(kept) < wanted):
            block = order[num_read : num_read + READ_ROWS]
            read = columns[block.tolist()]
            texts = [self._texts({key: read[key][i] for key in keys}, int(row)) for i, row in enumerate(block)]
            for row, ids in zip(texts, self._tokenize(texts), strict=True):
                if wanted is not None and len(kept) == wanted:
                    break
                num_read += 1
                if not self._fits(row, ids):
                    num_dropped += 1
                elif row.prompt not in leave_out:
                    kept.append(row)
                    tokens.append(ids)
        pairs = PreferenceSet(
            prompts=[row.prompt for row in kept],
            chosen=[row.chosen for row in kept],
            rejected=[row.rejected for row in kept],
            prompt_tokens=[ids[0] for ids in tokens],
            chosen_tokens=[ids[1] for ids in tokens],
            rejected_tokens=[ids[2] for ids in tokens],
            margins=np.array([row.margin for row in kept]) if self.data.margin_key is not None else None,
            num_dropped=num_dropped,
        )
        return pairs, num_read

    def _fits(self, row: _Texts, ids: tuple[TokenIds, TokenIds, TokenIds]) -> bool:
        prompt, chosen, rejected = map(len, ids)
        return (
            0 < prompt <= self.data.max_prompt_tokens
            and max(chosen, rejected) <= self.data.max_response_tokens
            and bool(row.chosen and row.rejected)
            and row.chosen != row.rejected
        )

    def _columns(self) -> list[str]:
        data, there = self.data, self.rows.column_names
        wanted = {"data.chosen_key": data.chosen_key, "data.rejected_key": data.rejected_key}
        if data.margin_key is not None:
            wanted["data.margin_key"] = data.margin_key
        for option, key in wanted.items():
            if key not in there:
                raise ConfigError(
                    f"{data.preferences} has no column {key}",
                    f"type {to_type(option, 'COLUMN')}, one of: {', '.join(there)}",
                )
        return [*([data.prompt_key] if data.prompt_key in there else []), *wanted.values()]

    def _texts(self, row: dict[str, Any], number: int) -> _Texts:
        data = self.data
        where = f"row {number} of split {self.split} of {data.preferences}"
        prompt, chosen, rejected = (row.get(key) for key in (data.prompt_key, data.chosen_key, data.rejected_key))
        margin = self._margin(row, where)
        has_empty_prompt = prompt is None and data.prompt_key in row and isinstance(chosen, str)
        if chosen is None or rejected is None or has_empty_prompt:
            return _Texts(str(prompt or ""), "", "", ("", "", ""), margin)  # counted among those left out
        if isinstance(chosen, str) and isinstance(rejected, str):
            if isinstance(prompt, str) and not data.chat_template:
                whole = prompt if data.prompt_template is None else in_template(data.prompt_template, prompt)
                return _Texts(prompt, chosen, rejected, (whole, _join(whole, chosen), _join(whole, rejected)), margin)
            if prompt is None:
                raise ConfigError(
                    f"{data.preferences} has answers without a prompt, as text",
                    f"type {to_type('data.prompt_key', 'COLUMN')}, one of: {', '.join(self.rows.column_names)}",
                )
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        else:
            messages, answers = self._conversations(prompt, chosen, rejected, where)
        if not data.chat_template:
            raise ConfigError(f"{where} is a conversation", f"type {to_type('data.chat_template', True)}")
        return self._rendered(messages, answers, margin, where)

    def _conversations(
        self, prompt: Any, chosen: Any, rejected: Any, where: str
    ) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]]:
        """The messages before the answers, and the answers' own: those after what both have in common."""
        if not (is_conversation(chosen) and is_conversation(rejected)):
            kinds = " and ".join(sorted({type(chosen).__name__, type(rejected).__name__}))
            raise ConfigError(
                f"{where}: {self.data.chosen_key} and {self.data.rejected_key} are {kinds}",
                "they must both be text or both lists of messages with role, content",
            )
        whole = whole_conversations(prompt, chosen, rejected)
        num_common = next((i for i, (a, b) in enumerate(zip(*whole, strict=False)) if a != b), len(whole[0]) - 1)
        if any([message["role"] for message in each[num_common:]] != ["assistant"] for each in whole) or not num_common:
            raise ConfigError(
                f"{where}: the two conversations differ in more than the assistant's last message",
                "bring conversations with the same messages before the answer",
            )
        return whole[0][:num_common], [each[num_common:] for each in whole]

    def _rendered(
        self, messages: list[dict[str, str]], answers: Sequence[list[dict[str, str]]], margin: float, where: str
    ) -> _Texts:
        if not is_conversation(messages):
            raise ConfigError(
                f"{where}: {self.data.prompt_key} is neither text nor a list of messages with role, content"
            )
        prompt = render(self.tokenizer, messages, where, awaits_answer=True)
        whole = [render(self.tokenizer, [*messages, *answer], where, awaits_answer=False) for answer in answers]
        if not all(text.startswith(prompt) for text in whole):
            raise ConfigError(
                f"{where}: the chat template writes an answered conversation otherwise than one that awaits an answer",
                "bring prompts and answers as text, already in the template's form",
            )
        contents = [answer[-1]["content"] for answer in answers]
        after = [text.removeprefix(prompt) for text in whole]
        return _Texts(raw_text(messages), contents[0], contents[1], (prompt, after[0], after[1]), margin)

    def _margin(self, row: dict[str, Any], where: str) -> float:
        key = self.data.margin_key
        if key is None:
            return 0.0
        try:
            margin = float(row[key])
        except (TypeError, ValueError):
            margin = math.nan
        if not math.isfinite(margin):
            raise ConfigError(f"{where}: {key} is {row[key]!r}, no number", "name another data.margin_key")
        return margin

    def _tokenize(self, rows: Sequence[_Texts]) -> list[tuple[TokenIds, TokenIds, TokenIds]]:
        """Prompts with the special tokens around them, answers apart from them and up to their EOS, as sampled."""
        is_templated = self.data.chat_template  # a templated text brings its special tokens along
        prompts, chosen, rejected = (
            self.tokenizer([row.rendered[i] for row in rows], add_special_tokens=adds, verbose=False)["input_ids"]
            for i, adds in ((0, not is_templated), (1, False), (2, False))
        )
        return [
            (np.asarray(p, np.int32), self._ended(c), self._ended(r))
            for p, c, r in zip(prompts, chosen, rejected, strict=True)
        ]

    def _ended(self, ids: Sequence[int]) -> TokenIds:
        """Up to the last EOS, behind which a template may write what no policy ever says; with one if there is none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError("the policy's tokenizer has no EOS token", "set eos_token in its tokenizer_config.json")
        array = np.asarray([*ids, eos], np.int32)
        ends = np.flatnonzero(array[:-1] == eos)
        return array[: ends[-1] + 1] if len(ends) else array


def whole_conversations(
    prompt: Any, chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> list[list[dict[str, str]]]:
    """Both conversations from their beginning, also where the ``prompt``, a text or messages, is apart from them."""
    before: list[dict[str, str]] = []
    if is_conversation(prompt) and chosen[: len(prompt)] != prompt:
        before = prompt
    elif isinstance(prompt, str) and chosen[0]["role"] == "assistant":
        before = [{"role": "user", "content": prompt}]
    return [[*before, *answer] for answer in (chosen, rejected)]


def _join(prompt: str, answer: str) -> str:
    from oatlite.continuations import join

    return join(prompt, answer) if answer else ""
