"""Rows to train on and rows to evaluate with: of two splits, or a twentieth of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset

from oatlite.continuations import hold_out
from oatlite.errors import ConfigError

Row = dict[str, list[int]]
"""Token ids by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldApart:
    """Rows of token ids to train on and to evaluate with; the source's rows that are in neither are counted.

    ``is_chat``: they were written by a chat template.
    """

    training: Dataset
    held_out: Dataset
    num_empty: int
    num_long: int
    is_chat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The rows of a split that fit, those of one text or prompt in a group. ``shortest`` counts tokens, of all rows."""

    groups: list[list[Row]]
    num_empty: int
    num_long: int
    shortest: int


def keep_fitting(groups: Sequence[list[Row]], num_empty: int, max_tokens: int) -> Groups:
    """Leave out the rows of which a column has more than ``max_tokens`` tokens."""
    lengths = [[max(map(len, row.values())) for row in group] for group in groups]
    kept = [
        [row for row, length in zip(group, longest, strict=True) if length <= max_tokens]
        for group, longest in zip(groups, lengths, strict=True)
    ]
    return Groups(
        groups=[group for group in kept if group],
        num_empty=num_empty,
        num_long=sum(map(len, groups)) - sum(map(len, kept)),
        shortest=min((length for group in lengths for length in group), default=0),
    )


def hold_apart(
    read: Callable[[str], Groups], split: str, eval_split: str | None, max_tokens: int, seed: int
) -> HeldApart:
    """Evaluate with ``eval_split``, or with a twentieth of the groups of ``split`` that are drawn by ``seed``.

    No group is on both sides. Raises ConfigError when a side is empty.
    """
    found = read(split)
    if eval_split is None:
        if len(found.groups) < 2:
            raise _too_few(found, split, max_tokens, "which leaves none to hold out")
        training, held_out = ([found.groups[i] for i in part] for part in hold_out(len(found.groups), seed))
    else:
        others = read(eval_split)
        for name, side in ((split, found), (eval_split, others)):
            if not side.groups:
                raise _too_few(side, name, max_tokens, "and one is needed")
        training, held_out = found.groups, others.groups
    return HeldApart(
        training=_dataset(training), held_out=_dataset(held_out), num_empty=found.num_empty, num_long=found.num_long
    )


def _dataset(groups: Sequence[list[Row]]) -> Dataset:
    rows = [row for group in groups for row in group]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def _too_few(found: Groups, split: str, max_tokens: int, why: str) -> ConfigError:
    num = sum(map(len, found.groups))
    shortest = f"the shortest row has {found.shortest} tokens: raise --max-tokens, or " if found.num_long else ""
    return ConfigError(
        f"{num} of {num + found.num_long + found.num_empty} rows of split {split} can be used "
        f"(--max-tokens {max_tokens}), {why}",
        f"{shortest}bring more rows",
    )
