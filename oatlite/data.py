"""The prompts that a run trains on and is evaluated with, as text and as token ids.

Columns are read and filtered in memory: ``Dataset.map`` and ``filter`` leave cache files in a folder that belongs to
the user.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from oatlite.config.flags import to_type
from oatlite.config.schema import PROMPT, DataConfig
from oatlite.errors import ConfigError
from oatlite.sources import find_local, first_line, load_rows

__all__ = [
    "PromptSet",
    "epoch_order",
    "fixed_order",
    "is_conversation",
    "load_all_prompts",
    "load_prompts",
    "load_rows",
    "load_tokenizer",
    "raw_text",
    "render",
]

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TokenIds = npt.NDArray[np.int32]

ORDER_SEED = 2404  # the order in which a split is read: the same for every run, whatever its seed
READ_ROWS = 1024  # rows tokenized at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """M prompts, ready to be sampled from.

    ``texts`` are the prompts as the policy sees them, after its chat template; ``raw_texts`` before it, for an oracle
    with a template of its own (a conversation of several messages is a JSON list there). ``tokens`` are int32 ids of
    ``texts``, with the special tokens that the tokenizer puts around a text. ``references`` are the dataset's answers
    to the letter, leading space included, or None. ``rows`` (M,) int64 says where in the split each prompt came from.
    ``num_dropped`` counts the rows that were read and left out because they were empty or too long.
    """

    texts: list[str]
    raw_texts: list[str]
    tokens: list[TokenIds]
    references: list[str] | None
    rows: npt.NDArray[np.int64]
    num_dropped: int

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> PromptSet:
        """These of the prompts, in this order."""
        return dataclasses.replace(
            self,
            texts=[self.texts[i] for i in indices],
            raw_texts=[self.raw_texts[i] for i in indices],
            tokens=[self.tokens[i] for i in indices],
            references=None if self.references is None else [self.references[i] for i in indices],
            rows=self.rows[indices],
        )


def epoch_order(num_prompts: int, epoch: int, seed: int) -> npt.NDArray[np.int64]:
    """The order of prompts in an epoch: a permutation that depends on ``seed`` and ``epoch`` alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; where it has no pad token, EOS is one.

    Raises ConfigError when there is none, or when it has neither a pad nor an EOS token.
    """
    from transformers import AutoTokenizer

    find_local(path, "the tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of somebody else's makes a tokenizer raise
        raise ConfigError(
            f"no tokenizer can be loaded from {path}: {first_line(error)}", "give a folder with tokenizer.json"
        ) from error
    if not len(tokenizer):
        raise ConfigError(f"the tokenizer of {path} is empty", "copy tokenizer.json into the folder")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {path} has neither a pad nor an EOS token", "set eos_token in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_prompts(
    data: DataConfig, eval_prompts: int, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int
) -> tuple[PromptSet, PromptSet]:
    """The prompts to train on and ``eval_prompts`` held-out ones.

    A split is read in one fixed order, whatever the seed of the run, and only as far as needed. Without
    ``data.eval_split`` the first usable rows are held out, and no prompt with the text of a held-out one is trained
    on; the next ``data.max_prompts`` (default: all) are the training prompts. Prompts of more than
    ``max_prompt_tokens`` tokens, and empty ones, are dropped and counted.

    References are needed where they are compared against: a missing column is an error for held-out prompts, and
    None for training prompts. Raises ConfigError for whatever cannot be used, and when no prompt is left.
    """
    if data.prompts is None:
        raise ConfigError("data.prompts names no prompts", "type --prompts with a file, a folder or a dataset id")
    read = functools.partial(_Reader, data=data, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens)
    source = read(rows=load_rows(data.prompts, data.split), split=data.split)
    order = fixed_order(len(source.rows))
    if data.eval_split is not None and data.eval_split != data.split and eval_prompts:
        eval_source = read(rows=load_rows(data.prompts, data.eval_split), split=data.eval_split)
        held_out, _ = eval_source.take(fixed_order(len(eval_source.rows)), eval_prompts, is_held_out=True)
        training, _ = source.take(order, data.max_prompts)
    else:
        held_out, num_read = source.take(order, eval_prompts, is_held_out=True)
        training, _ = source.take(order[num_read:], data.max_prompts, leave_out=frozenset(held_out.texts))
    if eval_prompts and not len(held_out):
        raise ConfigError(f"{data.prompts} has no usable prompt to evaluate with", _room(max_prompt_tokens))
    if not len(training):
        held = f" besides the {len(held_out)} held out" if len(held_out) else ""
        split = to_type("data.eval_split", "SPLIT")
        fix = f"lower --eval-prompts, or type {split}" if held else _room(max_prompt_tokens)
        raise ConfigError(f"{data.prompts} has no usable prompt to train on{held}", fix)
    return training, held_out


def load_all_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, needs_references: bool = False
) -> PromptSet:
    """The usable prompts of a split in its own order, or ``data.max_prompts`` of them, the same for every seed.

    What is dropped and what is refused is as in :func:`load_prompts`; references, unless needed, may be missing.
    """
    if data.prompts is None:
        raise ConfigError("data.prompts names no prompts", "type --prompts with a file, a folder or a dataset id")
    rows = load_rows(data.prompts, data.split)
    reader = _Reader(
        rows=rows, split=data.split, data=data, tokenizer=tokenizer, max_prompt_tokens=data.max_prompt_tokens
    )
    order = fixed_order(len(rows))
    if data.max_prompts is None:
        order.sort()
    prompts, _ = reader.take(order, data.max_prompts, is_held_out=needs_references)
    if not len(prompts):
        raise ConfigError(f"{data.prompts} has no usable prompt", _room(data.max_prompt_tokens))
    return prompts.select(np.argsort(prompts.rows).tolist())


def _room(max_prompt_tokens: int) -> str:
    return f"prompts must have 1 to {max_prompt_tokens} tokens: raise --max-prompt-tokens"


def fixed_order(num_rows: int) -> npt.NDArray[np.int64]:
    """The order in which the rows of a split are read: the same for every run, whatever its seed."""
    return np.random.default_rng(ORDER_SEED).permutation(num_rows)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, *, awaits_answer: bool
) -> str:
    """A conversation as text by the tokenizer's chat template, up to where the assistant answers if it ``awaits`` one.

    Raises ConfigError, which names ``where`` the conversation is from, if the template refuses it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "data.chat_template is set, and the policy's tokenizer has none",
            f"type {to_type('data.chat_template', False)}",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=awaits_answer))
    except Exception as error:  # a template is a program, and raises what its author liked
        raise ConfigError(f"{where}: the chat template refuses it: {first_line(error)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Turns rows of one split into prompts."""

    rows: Dataset
    split: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int

    def take(
        self,
        order: npt.NDArray[np.int64],
        wanted: int | None,
        *,
        is_held_out: bool = False,
        leave_out: frozenset[str] = frozenset(),
    ) -> tuple[PromptSet, int]:
        """The first ``wanted`` usable prompts in ``order`` (None: all), and how many rows were read for them."""
        texts: list[str] = []
        raw_texts: list[str] = []
        tokens: list[TokenIds] = []
        kept: list[int] = []
        num_dropped = num_read = 0
        columns = self.rows.select_columns([self._column()])
        while num_read < len(order) and (wanted is None or len(kept) < wanted):
            block = order[num_read : num_read + READ_ROWS]
            prompts = list(columns[block.tolist()][self.data.prompt_key])
            texts_of_block = [self._text(prompt, row) for prompt, row in zip(prompts, block, strict=True)]
            ids_of_block = self._encode(texts_of_block)
            for row, prompt, text, ids in zip(block, prompts, texts_of_block, ids_of_block, strict=True):
                if wanted is not None and len(kept) == wanted:
                    break
                num_read += 1
                if not 0 < len(ids) <= self.max_prompt_tokens:
                    num_dropped += 1
                elif text not in leave_out:
                    texts.append(text)
                    raw_texts.append(self._raw(prompt))
                    tokens.append(np.asarray(ids, np.int32))
                    kept.append(int(row))
        prompt_set = PromptSet(
            texts=texts,
            raw_texts=raw_texts,
            tokens=tokens,
            references=self._references(kept, is_held_out=is_held_out),
            rows=np.asarray(kept, np.int64),
            num_dropped=num_dropped,
        )
        return prompt_set, num_read

    def _column(self) -> str:
        if self.data.prompt_key not in self.rows.column_names:
            raise self._no_column(self.data.prompt_key, "data.prompt_key")
        return self.data.prompt_key

    def _text(self, prompt: Any, row: np.int64) -> str:
        where = f"row {row} of split {self.split} of {self.data.prompts}"
        template = self.data.prompt_template
        if template is not None and (isinstance(prompt, str) or is_conversation(prompt)):
            return in_template(template, prompt if isinstance(prompt, str) else prompt[0]["content"])
        if not self.data.chat_template:
            if isinstance(prompt, str):
                return prompt
            templated = f"type {to_type('data.chat_template', True)}"
            fix = templated if is_conversation(prompt) else "name a column of text"
            raise ConfigError(f"{where}: {self.data.prompt_key} is {type(prompt).__name__}, not text", fix)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not is_conversation(messages):
            raise ConfigError(
                f"{where}: {self.data.prompt_key} is neither text nor a list of messages with role, content"
            )
        if messages[-1]["role"] == "assistant":
            raise ConfigError(f"{where}: the conversation ends with the assistant", "name a column without answers")
        return render(self.tokenizer, messages, where, awaits_answer=True)

    def _raw(self, prompt: str | list[dict[str, str]]) -> str:
        if isinstance(prompt, str):
            return prompt
        return raw_text(prompt[:1] if self.data.prompt_template is not None else prompt)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A templated text brings its special tokens along; adding them again would give two BOS.
        encoded = self.tokenizer(texts, add_special_tokens=not self.data.chat_template, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _references(self, rows: list[int], *, is_held_out: bool) -> list[str] | None:
        key = self.data.reference_key
        if key is None or not rows:
            return None
        if key not in self.rows.column_names:
            if is_held_out:
                raise self._no_column(key, "data.reference_key")
            return None
        references = [_answer(value) for value in self.rows.select_columns([key])[rows][key]]
        if None in references:
            if is_held_out:
                row = rows[references.index(None)]
                raise ConfigError(
                    f"row {row} of split {self.split} of {self.data.prompts} has no text in {key} to compare against",
                    "leave such rows out, or name another --reference-key",
                )
            return None
        return [reference for reference in references if reference is not None]

    def _no_column(self, key: str, option: str) -> ConfigError:
        columns = ", ".join(self.rows.column_names)
        return ConfigError(
            f"{self.data.prompts} has no column {key}", f"type {to_type(option, 'COLUMN')}, one of: {columns}"
        )


def in_template(template: str, prompt: str) -> str:
    """``prompt`` where ``template`` says {prompt}; its other braces stay as they are."""
    before, _, after = template.partition(PROMPT)
    return before + prompt + after


def is_conversation(value: Any) -> bool:
    """Whether ``value`` is a list of messages with role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def raw_text(messages: list[dict[str, str]]) -> str:
    """A conversation without a template: the text of its one message, or the messages as JSON."""
    if len(messages) == 1:
        return messages[0]["content"]
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def _answer(value: Any) -> str | None:
    if is_conversation(value) and value[-1]["role"] == "assistant":
        value = value[-1]["content"]
    return value if isinstance(value, str) else None
