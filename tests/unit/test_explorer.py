"""The explorer of a rank, alone and with another: a rank without prompts, and responses that cannot be encoded."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from oatlite.algorithms.base import Candidate, CandidateSet
from oatlite.config.schema import Config
from oatlite.maths.exploration import Duels
from oatlite.workers import explorer as module
from oatlite.workers.active import ActivePreferences
from oatlite.workers.contracts import Share
from oatlite.workers.explorer import Explorer

WIDTH = 6
HEAD_RULES = ("sea-bai", "sea-ee", "uncertainty", "passive")


class TextEncoder:
    """Actors that encode alone: random features by text, and none of what is too long."""

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, float]:
        del prompts
        rows = [
            np.full(WIDTH, np.nan) if "long" in text else np.random.default_rng([*text.encode()]).normal(size=WIDTH)
            for text in responses
        ]
        return np.array(rows, np.float32).reshape(len(rows), WIDTH if rows else 1), 0.0


class ThreadRanks:
    """Ranks that are threads."""

    def __init__(self, count: int) -> None:
        self._parts: list[bytes] = [b""] * count
        self._barrier = threading.Barrier(count, timeout=30)

    def of(self, rank: int) -> ThreadRank:
        return ThreadRank(self, rank)

    def gather(self, rank: int, data: bytes) -> list[bytes]:
        self._parts[rank] = data
        self._barrier.wait()
        found = list(self._parts)
        self._barrier.wait()
        return found


class ThreadRank:
    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self._ranks = ranks
        self._rank = rank

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return self._ranks.gather(self._rank, data)


def config(rule: str, **more: object) -> Config:
    sizes = {} if rule == "apl" else {"members": 4, "hidden_size": 8}
    return Config.model_validate({"explore": {"rule": rule, "num_candidates": 3, **sizes, **more}})


def candidates(*texts: str) -> CandidateSet:
    one = np.zeros(1, np.int32)
    logprobs = -np.ones(1, np.float32)
    return CandidateSet(
        prompt="p",
        prompt_tokens=one,
        candidates=[
            Candidate(tokens=one, logprobs=logprobs, text=t, is_finished=True, sampler="policy") for t in texts
        ],
    )


def explorer(rule: str, rank: ThreadRank, **more: object) -> Explorer:
    actors = TextEncoder()
    return Explorer(config(rule, **more), Share(rank=0, count=1), actors, rank, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", HEAD_RULES)
def test_a_rank_without_prompts_learns_the_same_head(rule: str) -> None:
    """In the first step it does not know how wide features are, in the last it has no prompts left."""
    ranks = ThreadRanks(2)
    explorers = [explorer(rule, ranks.of(i)) for i in range(2)]
    shares = {1: (2, 0), 2: (2, 2), 3: (0, 2), 4: (0, 0)}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for step, sizes in shares.items():
                sets = [candidates(*(f"{step} {rank} {i} {n}" for n in range(3))) for i in range(sizes[rank])]
                choice = explorers[rank].choose(sets, step)
                assert len(choice.duels) == len(choice.is_self_labelled) == sizes[rank]
                assert choice.features is not None and len(choice.features) == sizes[rank]
                assert len(explorers[rank].best(sets)) == sizes[rank]
                explorers[rank].learn(choice.features, sizes[rank], 4 * step)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    first, second = (one.state() for one in explorers)
    assert len(first["comparisons"]) == 8
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_active_preferences_of_a_rank_without_prompts_still_ask_the_reference_with_the_others() -> None:
    asked = []

    def score(pairs: Sequence[object], at_most: int) -> list[np.ndarray]:
        asked.append((len(pairs), at_most))
        return []

    choice = ActivePreferences(config("apl"), score).choose([], 1)  # type: ignore[arg-type]
    assert choice.duels == [] and asked == [(0, 2 * 128)]


@pytest.mark.parametrize("rule", HEAD_RULES)
def test_a_response_that_cannot_be_encoded_meets_nobody(rule: str) -> None:
    one = explorer(rule, ThreadRanks(1).of(0))
    sets = [candidates("long", "a", "b"), candidates("a", "long", "long too"), candidates("long", "long", "long")]
    for step in range(1, 20):
        choice = one.choose(sets, step)
        for duel in choice.duels:
            if duel.prompt < 2:
                assert "long" not in sets[duel.prompt].candidates[duel.first].text
                assert "long" not in sets[duel.prompt].candidates[duel.second].text
        assert all(duel.prompt == 0 for duel in choice.duels), "the others have no two that can be compared"
    best = one.best(sets)
    assert best[0] in (1, 2) and best[1] == 0


def test_the_measure_of_uncertainty_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def note(rewards: np.ndarray, *more: object) -> Duels:
        asked.append(more[-1])
        return Duels(np.zeros(rewards.shape[1], np.int64), np.ones(rewards.shape[1], np.int64))

    monkeypatch.setattr(module, "best_arm_duels", note)
    monkeypatch.setattr(module, "uncertainty_duels", note)
    for measure in module.MEASURES:
        for rule in ("sea-bai", "uncertainty"):
            explorer(rule, ThreadRanks(1).of(0), uncertainty=measure).choose([candidates("a", "b", "c")], 1)
            assert asked.pop() is module.MEASURES[measure]
