"""Conversations by a chat template, as token ids with the loss on what the assistant says.

A template that marks its assistant's turns (``{% generation %}``) says itself where they are. Of another, the text of
the conversation up to each turn is compared with that after it: what has been added is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from oatlite.continuations import require_eos
from oatlite.data import is_conversation
from oatlite.errors import ConfigError
from oatlite.sources import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without a loss."""

Messages = list[dict[str, Any]]
_MARKS = re.compile(r"\{%-?\s*generation\b")


def conversations(table: Dataset, source: str, key: str, where: str) -> Iterator[tuple[int, Messages]]:
    """Row numbers with the conversations of column ``key``; rows without one are passed over. Raises ConfigError."""
    if key not in table.column_names:
        raise ConfigError(
            f"{source} has no column {key}", f"its columns are {', '.join(table.column_names)}: name one of them"
        )
    for i, value in enumerate(table[key]):
        if not value:
            continue
        if not is_conversation(value):
            raise ConfigError(
                f"row {i} of {where}: {key} is no list of messages with role and content", "name another column"
            )
        yield i, plain_messages(value)


def plain_messages(messages: Messages) -> Messages:
    """Messages without the fields that only other rows have, which a table fills with None."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template. Raises ConfigError where there is none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            "the data are conversations, and the tokenizer of --model has no chat template",
            "name a chat model, or set chat_template in its tokenizer_config.json",
        ) from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> dict[str, list[int]] | None:
    """``input_ids`` and ``labels`` (T each) of a conversation up to its last assistant's turn; None if it has none.

    An EOS right behind a turn belongs to it, and the last turn gets one if the template writes none, as a policy has
    to learn to stop. Raises ConfigError for a template that refuses the conversation or whose turns cannot be told
    apart, and for a tokenizer without EOS.
    """
    if not any(message["role"] == "assistant" for message in messages):
        return None
    eos = require_eos(tokenizer)
    is_marked = _MARKS.search(template_of(tokenizer)) is not None
    tokens, is_said = (_marked if is_marked else _compared)(tokenizer, messages, where)
    is_said = _with_ends(tokens, is_said, eos)
    length = max((i + 1 for i, said in enumerate(is_said) if said), default=0)
    if not length:
        return None
    tokens, is_said = tokens[:length], is_said[:length]
    if tokens[-1] != eos:
        tokens, is_said = [*tokens, eos], [*is_said, True]
    labels = [token if said else IGNORED for token, said in zip(tokens, is_said, strict=True)]
    return {"input_ids": tokens, "labels": labels}


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, *, awaits_answer: bool) -> str:
    """The conversation as the template writes it. Raises ConfigError where there is none, or it refuses."""
    template_of(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=awaits_answer))
    except Exception as error:  # a template is a program, and raises what its author liked
        raise ConfigError(f"{where}: the chat template refuses it: {first_line(error)}") from error


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
    _require_offsets(tokenizer)
    try:
        found = tokenizer.apply_chat_template(
            messages,
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except Exception as error:  # as above
        raise ConfigError(f"{where}: the chat template refuses it: {first_line(error)}") from error
    is_said = [bool(said) for said in found["assistant_masks"]]
    spans = found["offset_mapping"]
    for i in range(1, len(spans)):
        # Of a last character that is several tokens, the mask has the first alone.
        is_said[i] |= is_said[i - 1] and tuple(spans[i]) == tuple(spans[i - 1])
    return list(found["input_ids"]), is_said


def _compared(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
    whole = render_chat(tokenizer, messages, where, awaits_answer=False)
    turns: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], where, awaits_answer=True)
        after = render_chat(tokenizer, messages[: i + 1], where, awaits_answer=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ConfigError(
                f"{where}: the chat template writes message {i} otherwise in a longer conversation, so the assistant's "
                "turns cannot be told apart",
                "mark them with {% generation %} in the template, or bring conversations of one turn as text",
            )
        turns.append((len(before), len(after)))
    _require_offsets(tokenizer)
    # As a whole, because that is how a conversation is tokenized when an answer is sampled.
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_said = [any(first <= start < end for first, end in turns) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), is_said


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer does not say where its tokens begin", "bring one with a tokenizer.json")


def _with_ends(tokens: Sequence[int], is_said: Sequence[bool], eos: int) -> list[bool]:
    """Turns that end with their EOS: a turn that stops right before it gets it, and loses what follows it."""
    found = list(is_said)
    start = 0
    while start < len(found):
        if not found[start]:
            start += 1
            continue
        end = next((i for i in range(start, len(found)) if not is_said[i]), len(found))
        ends = [i for i in range(start, end) if tokens[i] == eos]
        if ends:
            found[ends[-1] + 1 : end] = [False] * (end - ends[-1] - 1)
        elif end < len(tokens) and tokens[end] == eos:
            found[end] = True
        start = end + 1
    return found
