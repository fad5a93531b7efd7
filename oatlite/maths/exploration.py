"""Which two of N candidates meet: the selection rules of SEA (arXiv 2411.01493, algorithms 1 and 2), and the measures
of what an ensemble does not know.

``rewards`` (E, M, N) are those that each of E members of an ensemble gives N candidates to each of M prompts. A rule
gives a :class:`Duels`; ties go to the lowest index. Shape suffixes: E members, M prompts, N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Rewards = npt.NDArray[np.floating]
Measure = Callable[["Rewards"], npt.NDArray[np.float64]]
"""How little is known of the comparison of i with j, (M, N, N), from rewards (E, M, N); nothing is left at 0."""
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Duels:
    """Candidates ``first`` (M,) and ``second`` (M,) of each prompt. Where both are the same there is no duel: the rule
    found nothing to learn from."""

    first: Indices
    second: Indices

    @property
    def is_clash(self) -> Flags:
        return self.first == self.second

    def with_random_others(self, is_there: Flags, rng: np.random.Generator) -> Duels:
        """With a random other of the candidates that ``is_there`` (M, N) as the second of each clash; one whose first
        is the only one stays a clash."""
        are_others = is_there & (np.arange(is_there.shape[1]) != self.first[:, None])
        counts = are_others.sum(1)
        drawn = rng.integers(0, np.maximum(counts, 1))
        other = (are_others.cumsum(1) > drawn[:, None]).argmax(1)
        return replace(self, second=np.where(self.is_clash & (counts > 0), other, self.second))


def draw_members(rng: np.random.Generator, num_members: int, num_prompts: int) -> Indices:
    """An order of the members for each prompt, (M, E): posterior samples without replacement."""
    return rng.permuted(np.tile(np.arange(num_members), (num_prompts, 1)), axis=1)


def preference_variance(rewards: Rewards) -> npt.NDArray[np.float64]:
    """The variance over members of P(i beats j) by Bradley-Terry, (M, N, N): that of SEA's algorithm 1. With a single
    member nothing varies, and all is 0."""
    return _variance(_probabilities(rewards))


def logits_variance(rewards: Rewards) -> npt.NDArray[np.float64]:
    """The variance over members of ``r_i - r_j``, (M, N, N): what SEA's published code takes in its place."""
    return _variance(_margins(rewards))


def disagreement(rewards: Rewards) -> npt.NDArray[np.float64]:
    """What the verdict on (i, j) would tell about which member is right, in nats, (M, N, N): the mean divergence
    KL(p_e || p) of the members' Bernoulli verdicts from that of their mean."""
    probabilities = _probabilities(rewards)
    mean = probabilities.mean(0)
    return np.maximum(0.0, _entropy(mean) - _entropy(probabilities).mean(0))


MEASURES: dict[str, Measure] = {
    "preference": preference_variance,
    "logits": logits_variance,
    "disagreement": disagreement,
}
"""By the name that ``explore.uncertainty`` takes."""


def best_arm_duels(rewards: Rewards, members: Indices, measure: Measure = preference_variance) -> Duels:
    """Best-arm identification by Thompson sampling: the best candidate of a posterior sample, against the one whose
    comparison with it is the least certain by ``measure``.

    ``members`` (M, E) are as of :func:`draw_members`; the first of each is the sample. A clash where the members agree
    about all comparisons with it.
    """
    prompts = np.arange(rewards.shape[1])
    first = rewards.argmax(2)[members[:, 0], prompts]
    unknown = measure(rewards)[prompts, first]
    second = unknown.argmax(1)
    return Duels(first, np.where(unknown[prompts, second] > 0, second, first))


def explore_exploit_duels(
    rewards: Rewards, members: Indices, *, max_tries: int | None = None, allow_second_best: bool = False
) -> Duels:
    """Explore and exploit by Thompson sampling: the best candidates of two posterior samples.

    Samples are taken in the order of ``members`` (M, E) until one has another best candidate, ``max_tries`` at most
    (default: all), the first one counted in. With ``allow_second_best`` then a sample's second best may be it, in the
    same order. A clash where neither is found.
    """
    num_members, num_prompts, num_candidates = rewards.shape
    tries = num_members if max_tries is None else min(max_tries, num_members)
    # From the best to the worst; sorting the opposite keeps the lowest index first among equals.
    ranked = np.argsort(-rewards, axis=2, kind="stable")
    prompts = np.arange(num_prompts)[:, None]
    asked = ranked[members[:, :tries], prompts]  # (M, tries, N)
    first = asked[:, 0, 0]
    choices = asked[:, :, 0]
    if allow_second_best and num_candidates > 1:
        choices = np.concatenate([choices, asked[:, :, 1]], axis=1)
    differs = choices != first[:, None]
    second = choices[np.arange(num_prompts), differs.argmax(1)]  # where none differs, the first one's own best
    return Duels(first, second)


def uncertainty_duels(rewards: Rewards, measure: Measure = preference_variance) -> Duels:
    """Pure exploration: the pair whose comparison is the least certain, whatever its rewards. A clash where the
    members agree about all comparisons."""
    unknown = measure(rewards)
    num_prompts, num_candidates, _ = unknown.shape
    pairs = unknown.reshape(num_prompts, num_candidates**2).argmax(1)
    return Duels(pairs // num_candidates, pairs % num_candidates)


def passive_duels(num_prompts: int) -> Duels:
    """The first two candidates of each prompt."""
    return Duels(np.zeros(num_prompts, np.int64), np.ones(num_prompts, np.int64))


def self_labelled_pairs(rewards: Rewards, members: Indices) -> Duels:
    """Mixed preference learning: the pair that a posterior sample finds the most separated, the better one ``first``.

    The first of each prompt's ``members`` (M, E) is the sample. A clash where it finds all alike.
    """
    prompts = np.arange(rewards.shape[1])
    sampled = rewards[members[:, 0], prompts]  # (M, N)
    return Duels(sampled.argmax(1), sampled.argmin(1))


def least_certain_prompts(logprobs: Rewards, share: float) -> Indices:
    """The ``share`` of M prompts (rounded up) whose predictive entropy is the highest, in their order.

    ``logprobs`` (M, N) are those of whole sampled responses, minus whose mean estimates the entropy (APL, arXiv
    2402.08114, equation 4).
    """
    return _highest(-logprobs.mean(1), share)


def most_separated_pairs(implicit_rewards: Rewards, share: float) -> tuple[Indices, Indices, Indices]:
    """The pair of each prompt that differs the most, and of these the ``share`` (rounded up) that differs the most.

    ``implicit_rewards`` (M, N) are ``log pi - log pi_ref`` (APL, equation 5, but for beta). Gives the prompts that are
    kept, in their order, and the two candidates of each, which are never the same.
    """
    num_prompts, num_candidates = implicit_rewards.shape
    first, second = np.triu_indices(num_candidates, 1)
    margins = np.abs(implicit_rewards[:, first] - implicit_rewards[:, second])
    widest = margins.argmax(1)
    kept = _highest(margins[np.arange(num_prompts), widest], share)
    return kept, first[widest[kept]], second[widest[kept]]


def _highest(values: npt.NDArray[np.floating], share: float) -> Indices:
    count = math.ceil(share * len(values) - 1e-9)
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _margins(rewards: Rewards) -> npt.NDArray[np.float64]:
    """``r_i - r_j`` at (E, M, i, j)."""
    exact = rewards.astype(np.float64)
    return exact[..., :, None] - exact[..., None, :]


def _probabilities(rewards: Rewards) -> npt.NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(_margins(rewards) / 2))  # tanh: exp overflows


def _variance(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Unbiased, over the first axis."""
    return values.var(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _entropy(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of a Bernoulli variable, in nats; 0 log 0 is 0."""
    q = 1 - p
    logs = np.zeros_like(p), np.zeros_like(q)
    for values, log in zip((p, q), logs, strict=True):
        np.log(values, out=log, where=values > 0)
    return -(p * logs[0] + q * logs[1])
