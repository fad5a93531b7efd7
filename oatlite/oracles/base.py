"""What an oracle answers, and what is done with an answer before it counts. Shape suffix: B pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from oatlite.errors import OracleError

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """An oracle's answer on B pairs.

    ``first_win`` (B,) float32 in [0, 1] is the probability that the first response is better. ``is_valid`` (B,) says
    where the oracle could answer at all; elsewhere ``first_win`` means nothing, and the pair carries no weight.
    ``first_scores`` and ``second_scores`` (B,) float32 are rewards, NaN where there is none; None for an oracle
    that only compares. ``num_failures`` counts the requests that failed on the way and were made again.
    """

    first_win: Floats
    is_valid: Flags
    first_scores: Floats | None = None
    second_scores: Floats | None = None
    num_failures: int = 0

    def __len__(self) -> int:
        return len(self.first_win)

    @staticmethod
    def joined(parts: Sequence[Verdicts]) -> Verdicts:
        """The verdicts on the pairs of all ``parts``, in order; without rewards unless all have them."""

        def scores(found: Sequence[Floats | None]) -> Floats | None:
            known = [part for part in found if part is not None]
            return np.concatenate(known) if known and len(known) == len(found) else None

        return Verdicts(
            first_win=np.concatenate([np.zeros(0, np.float32), *(part.first_win for part in parts)]),
            is_valid=np.concatenate([np.zeros(0, np.bool_), *(part.is_valid for part in parts)]),
            first_scores=scores([part.first_scores for part in parts]),
            second_scores=scores([part.second_scores for part in parts]),
            num_failures=sum(part.num_failures for part in parts),
        )

    def part(self, pairs: slice) -> Verdicts:
        """The verdicts on some of the pairs."""
        return Verdicts(
            first_win=self.first_win[pairs],
            is_valid=self.is_valid[pairs],
            first_scores=None if self.first_scores is None else self.first_scores[pairs],
            second_scores=None if self.second_scores is None else self.second_scores[pairs],
        )


class PreferenceOracle(ABC):
    """Says which of two responses to a prompt is better.

    A user's own, with ``--oracle file.py:Class``, is made without arguments. ``needs_references`` says that it cannot
    answer without them.
    """

    needs_references: bool = False

    @property
    def num_failures(self) -> int:
        """Requests that failed and were made again, since the start; none where nothing is asked over a network."""
        return 0

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of connections, if there are any."""

    @abstractmethod
    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """The verdicts on B pairs, in order; ``references`` are the dataset's answers, for an oracle that reads them.

        Raises OracleError when the oracle fails as a whole. A pair that it cannot judge is not valid.
        """


class RewardOracle(PreferenceOracle):
    """Scores one response at a time, and prefers by Bradley-Terry: P(first wins) = sigmoid(score - other score)."""

    @abstractmethod
    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> Floats:
        """Rewards (B,) float32, in order; NaN for a response that cannot be scored (one that is too long)."""

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`; each distinct prompt, response and reference is scored once."""
        answers: Sequence[str | None] = references if references is not None else [None] * len(prompts)
        asked = [*zip(prompts, first, answers, strict=True), *zip(prompts, second, answers, strict=True)]
        index = {item: i for i, item in enumerate(dict.fromkeys(asked))}
        distinct = list(index)
        scores = self.score(
            [prompt for prompt, _, _ in distinct],
            [response for _, response, _ in distinct],
            None if references is None else [str(reference) for _, _, reference in distinct],
        )
        scores = checked_scores(scores, len(distinct))
        both = scores[[index[item] for item in asked]].reshape(2, len(prompts))
        is_valid = np.isfinite(both[0]) & np.isfinite(both[1])
        return Verdicts(
            first_win=np.where(is_valid, bradley_terry(both[0], both[1]), np.float32(0.5)),
            is_valid=is_valid,
            first_scores=both[0],
            second_scores=both[1],
        )


def bradley_terry(first_scores: Floats, second_scores: Floats) -> Floats:
    """P(first wins) = sigmoid(first - second), (B,) float32; equal scores give exactly 0.5."""
    difference = first_scores.astype(np.float64) - second_scores.astype(np.float64)
    return (0.5 * (1 + np.tanh(difference / 2))).astype(np.float32)  # tanh: exp overflows


def checked(verdicts: Verdicts, count: int) -> Verdicts:
    """``verdicts`` with arrays of the declared types, or OracleError naming what is wrong with the answer on ``count``
    pairs."""
    if not isinstance(verdicts, Verdicts):
        raise OracleError(f"the oracle gave a {type(verdicts).__name__}, not Verdicts")
    try:
        verdicts = Verdicts(
            first_win=np.asarray(verdicts.first_win, np.float32),
            is_valid=np.asarray(verdicts.is_valid),
            first_scores=None if verdicts.first_scores is None else np.asarray(verdicts.first_scores, np.float32),
            second_scores=None if verdicts.second_scores is None else np.asarray(verdicts.second_scores, np.float32),
            num_failures=verdicts.num_failures,
        )
    except (TypeError, ValueError):
        raise OracleError("the oracle gave verdicts that are no numbers") from None
    for name in ("first_win", "is_valid", "first_scores", "second_scores"):
        value = getattr(verdicts, name)
        if value is not None and np.shape(value) != (count,):
            raise OracleError(f"the oracle was asked about {count} pairs and gave {name} of shape {np.shape(value)}")
    if verdicts.is_valid.dtype != np.bool_:
        raise OracleError(f"the oracle gave is_valid as {verdicts.is_valid.dtype}, not bool")
    answers = verdicts.first_win[verdicts.is_valid]
    if not np.isfinite(answers).all():
        raise OracleError(f"the oracle gave {int((~np.isfinite(answers)).sum())} win probabilities that are not finite")
    if ((answers < 0) | (answers > 1)).any():
        wrong = answers[(answers < 0) | (answers > 1)][0]
        raise OracleError(f"the oracle gave a win probability of {wrong:g}, outside [0, 1]")
    for name in ("first_scores", "second_scores"):
        scores = getattr(verdicts, name)
        if scores is not None and not np.isfinite(scores[verdicts.is_valid]).all():
            raise OracleError(f"the oracle gave {name} that are not finite for pairs that it calls valid")
    return verdicts


def checked_scores(scores: Floats, count: int) -> Floats:
    """``scores`` (count,) float32, NaN where there is none; OracleError for another shape or an infinite one."""
    try:
        scores = np.asarray(scores, np.float32)
    except (TypeError, ValueError):
        raise OracleError("the oracle gave scores that are no numbers") from None
    if scores.shape != (count,):
        raise OracleError(f"the oracle was asked for {count} scores and gave an array of shape {scores.shape}")
    if np.isinf(scores).any():
        raise OracleError(f"the oracle gave {int(np.isinf(scores).sum())} infinite scores")
    return scores


def draw_verdicts(
    first_win: Floats, is_valid: Flags, feedback: Literal["threshold", "bernoulli"], rng: np.random.Generator
) -> Flags:
    """Whether the first response is the chosen one, (B,) bool.

    ``threshold`` takes the likelier side, ``bernoulli`` draws with the win probability; one number is drawn per pair
    either way, so that later draws do not depend on the verdicts. Where a verdict is not valid or, under
    ``threshold``, exactly 0.5, there is no preference: the answer is False and means nothing, and
    :func:`trainable_pairs` leaves the pair out.
    """
    draws = rng.random(len(first_win))
    bar = draws if feedback == "bernoulli" else 0.5
    return is_valid & (first_win > bar)


def with_draws(verdicts: Verdicts, first: Sequence[str], second: Sequence[str]) -> Verdicts:
    """``verdicts`` with exactly 0.5 where both texts are the same, whatever the oracle said."""
    is_same = np.fromiter((one == other for one, other in zip(first, second, strict=True)), np.bool_, len(verdicts))
    return replace(verdicts, first_win=np.where(is_same, np.float32(0.5), verdicts.first_win))


def wins(verdicts: Verdicts) -> list[float]:
    """Of each valid verdict whether the first response wins: 1 or 0, and 0.5 for a probability of exactly that."""
    return [0.5 if win == 0.5 else float(win > 0.5) for win in verdicts.first_win[verdicts.is_valid].tolist()]


def flipped(count: int, flip_prob: float, rng: np.random.Generator) -> Flags:
    """Which of ``count`` labels noise turns around, (count,) bool: each with ``flip_prob``, by one draw for each."""
    return rng.random(count) < flip_prob


def reward_margins(verdicts: Verdicts) -> Floats:
    """The first response's reward minus the second's, (B,) float32; 0 where a verdict is not valid or has no rewards.

    Of an oracle that only compares, the log-odds of its win probability, which is taken to lie within 1e-6 of 0 and 1.
    """
    if verdicts.first_scores is not None and verdicts.second_scores is not None:
        margins = verdicts.first_scores - verdicts.second_scores
    else:
        win = np.clip(verdicts.first_win.astype(np.float64), 1e-6, 1 - 1e-6)
        margins = np.log(win) - np.log1p(-win)
    return np.where(verdicts.is_valid & np.isfinite(margins), margins, 0.0).astype(np.float32)


def trainable_pairs(
    verdicts: Verdicts, first: Sequence[str], second: Sequence[str], feedback: Literal["threshold", "bernoulli"]
) -> Flags:
    """Which pairs may carry weight in training, (B,) bool.

    Left out are verdicts that are not valid, pairs of identical texts and, under ``threshold``, exact ties: the
    label of such a pair would be a coin flip.
    """
    differs = np.fromiter((a != b for a, b in zip(first, second, strict=True)), np.bool_, len(verdicts))
    decided = verdicts.first_win != 0.5 if feedback == "threshold" else np.ones(len(verdicts), np.bool_)
    return verdicts.is_valid & differs & decided
