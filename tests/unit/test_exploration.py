"""Selection rules against brute force over their definitions, and what the measures of uncertainty mean."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oatlite.maths.exploration import (
    MEASURES,
    best_arm_duels,
    disagreement,
    draw_members,
    explore_exploit_duels,
    least_certain_prompts,
    logits_variance,
    most_separated_pairs,
    passive_duels,
    preference_variance,
    self_labelled_pairs,
    uncertainty_duels,
)

# Few values, so that ties are common; single members, prompts and pairs of candidates too.
shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 5))
few_values = shapes.flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0]))
)
many_values = shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-5, 5, width=16)))
rewards_of_all_kinds = st.one_of(few_values, many_values)
seeds = st.integers(0, 1000)


def first_best(values: list[float]) -> int:
    return values.index(max(values))


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def order_of(rewards: np.ndarray, seed: int) -> np.ndarray:
    return draw_members(np.random.default_rng(seed), len(rewards), rewards.shape[1])


@given(rewards_of_all_kinds)
def test_variances_are_those_of_their_definitions(rewards: np.ndarray) -> None:
    members, prompts, candidates = rewards.shape
    for m, i, j in itertools.product(range(prompts), range(candidates), range(candidates)):
        margins = [rewards[e, m, i] - rewards[e, m, j] for e in range(members)]
        wins = [sigmoid(margin) for margin in margins]
        mean = sum(wins) / members
        assert logits_variance(rewards)[m, i, j] == pytest.approx(variance(margins), abs=1e-12)
        assert preference_variance(rewards)[m, i, j] == pytest.approx(variance(wins), abs=1e-12)
        divergences = [win * math.log(win / mean) + (1 - win) * math.log((1 - win) / (1 - mean)) for win in wins]
        assert disagreement(rewards)[m, i, j] == pytest.approx(sum(divergences) / members, abs=1e-12)


def test_certain_verdicts_disagree_by_a_bit_and_not_by_nan() -> None:
    rewards = np.array([[[1000.0, 0.0]], [[0.0, 1000.0]]])
    assert disagreement(rewards)[0, 0, 1] == pytest.approx(math.log(2))
    assert disagreement(rewards[:1])[0, 0, 1] == 0


def unsurety(measure: str, margins: list[float]) -> float:
    """By its definition, of the members' differences of rewards."""
    wins = [sigmoid(margin) for margin in margins]
    mean = sum(wins) / len(wins)
    divergences = [win * math.log(win / mean) + (1 - win) * math.log((1 - win) / (1 - mean)) for win in wins]
    return {"logits": variance(margins), "preference": variance(wins), "disagreement": sum(divergences) / len(wins)}[
        measure
    ]


@given(rewards_of_all_kinds, seeds, st.sampled_from([None, *MEASURES]))
def test_best_arm_duels(rewards: np.ndarray, seed: int, measure: str | None) -> None:
    members = order_of(rewards, seed)
    duels = best_arm_duels(rewards, members, *([] if measure is None else [MEASURES[measure]]))
    for m in range(rewards.shape[1]):
        first = first_best(rewards[members[m, 0], m].tolist())
        margins = [(rewards[:, m, first] - rewards[:, m, j]).tolist() for j in range(rewards.shape[2])]
        unknown = [unsurety(measure or "preference", each) for each in margins]
        assert duels.first[m] == first
        if max(unknown) < 1e-12:
            assert duels.second[m] == first or unknown[duels.second[m]] == pytest.approx(0, abs=1e-12)
        else:
            assert duels.second[m] != first
            assert unknown[duels.second[m]] == pytest.approx(max(unknown), rel=1e-9)
    again = best_arm_duels(
        np.concatenate([rewards, rewards], axis=2), members, *([] if measure is None else [MEASURES[measure]])
    )
    assert (again.first == duels.first).all() and (again.second == duels.second).all(), "of equals the first"


@given(rewards_of_all_kinds, seeds, st.integers(1, 6) | st.none(), st.booleans())
def test_explore_exploit_duels(rewards: np.ndarray, seed: int, max_tries: int | None, allow_second_best: bool) -> None:
    members = order_of(rewards, seed)
    duels = explore_exploit_duels(rewards, members, max_tries=max_tries, allow_second_best=allow_second_best)
    for m in range(rewards.shape[1]):
        asked = members[m, : max_tries or len(rewards)]
        ranks = [sorted(range(rewards.shape[2]), key=lambda n, e=e: -rewards[e, m, n]) for e in asked]
        first = ranks[0][0]
        second = next((ranked[0] for ranked in ranks if ranked[0] != first), None)
        if second is None and allow_second_best:
            second = next((ranked[1] for ranked in ranks if ranked[1] != first), None)
        assert (duels.first[m], duels.second[m]) == (first, first if second is None else second)
        assert duels.is_clash[m] == (second is None)


@given(rewards_of_all_kinds, st.sampled_from(list(MEASURES)))
def test_uncertainty_duels(rewards: np.ndarray, measure: str) -> None:
    duels, unknown = uncertainty_duels(rewards, MEASURES[measure]), MEASURES[measure](rewards)
    for m in range(rewards.shape[1]):
        assert unknown[m, duels.first[m], duels.second[m]] == unknown[m].max()
        assert duels.is_clash[m] == (unknown[m].max() == 0)
    again = uncertainty_duels(np.concatenate([rewards, rewards], axis=2), MEASURES[measure])
    assert (again.first == duels.first).all() and (again.second == duels.second).all(), "of equals the first"


@given(rewards_of_all_kinds, seeds)
def test_self_labelled_pairs(rewards: np.ndarray, seed: int) -> None:
    members = order_of(rewards, seed)
    pairs = self_labelled_pairs(rewards, members)
    for m in range(rewards.shape[1]):
        sampled = rewards[members[m, 0], m].tolist()
        gaps = [sampled[i] - sampled[j] for i in range(len(sampled)) for j in range(len(sampled))]
        assert sampled[pairs.first[m]] - sampled[pairs.second[m]] == max(gaps)
        assert pairs.is_clash[m] == (max(gaps) == 0)


@given(rewards_of_all_kinds, st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_active_preference_learning_keeps_what_its_definitions_say(rewards: np.ndarray, share: float) -> None:
    logprobs = rewards[0]  # (M, N)
    count = math.ceil(share * len(logprobs))
    kept = least_certain_prompts(logprobs, share).tolist()
    entropies = [-sum(row) / len(row) for row in logprobs.tolist()]
    assert kept == sorted(sorted(range(len(entropies)), key=lambda m: -entropies[m])[:count])
    prompts, first, second = most_separated_pairs(logprobs, share)
    widest = [
        max(abs(row[i] - row[j]) for i, j in itertools.combinations(range(len(row)), 2)) for row in logprobs.tolist()
    ]
    assert len(prompts) == count and (np.diff(prompts) > 0).all() and (first < second).all()
    for m, i, j in zip(prompts, first, second, strict=True):
        assert abs(logprobs[m, i] - logprobs[m, j]) == widest[m]
    left_out = [widest[m] for m in range(len(widest)) if m not in prompts]
    assert max(left_out, default=0.0) <= min(widest[m] for m in prompts)


@given(rewards_of_all_kinds, seeds)
def test_a_clash_gets_a_random_other_and_nothing_else_changes(rewards: np.ndarray, seed: int) -> None:
    duels = explore_exploit_duels(rewards, order_of(rewards, seed), max_tries=1)
    assert duels.is_clash.all()
    rng = np.random.default_rng(seed)
    is_there = rng.random(rewards.shape[1:]) < 0.5
    mended = duels.with_random_others(is_there, np.random.default_rng(seed))
    assert (mended.first == duels.first).all()
    for m, (first, second) in enumerate(zip(mended.first, mended.second, strict=True)):
        others = [n for n in range(rewards.shape[2]) if is_there[m, n] and n != first]
        assert second in (others or [first])
    apart = passive_duels(rewards.shape[1])
    assert (apart.with_random_others(is_there, np.random.default_rng(seed)).second == apart.second).all()


def test_random_others_and_members_are_uniform() -> None:
    rng = np.random.default_rng(0)
    rewards = np.tile([0.0, 1.0, 0.5, 0.2], (1, 30_000, 1))
    duels = explore_exploit_duels(rewards, order_of(rewards, 0))
    others = duels.with_random_others(np.ones((30_000, 4), np.bool_), rng).second
    assert np.bincount(others, minlength=4) == pytest.approx([10_000, 0, 10_000, 10_000], abs=400)
    others = duels.with_random_others(np.tile([True, True, True, False], (30_000, 1)), rng).second
    assert np.bincount(others, minlength=4) == pytest.approx([15_000, 0, 15_000, 0], abs=400)
    members = draw_members(rng, 5, 30_000)
    assert (np.sort(members, axis=1) == np.arange(5)).all()
    for place in range(5):
        assert np.bincount(members[:, place]) == pytest.approx([6000] * 5, abs=350)
