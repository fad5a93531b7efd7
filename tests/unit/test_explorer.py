"""The explorer of a rank, alone and with another: a rank without prompts, and responses that cannot be encoded."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from oatlite.algorithms.base import Candidate, CandidateSet, Duel
from oatlite.config.schema import Config
from oatlite.epistemic import HeadTrainer
from oatlite.errors import WorkerDied
from oatlite.layouts import TokenPair
from oatlite.maths.ensemble import EpistemicHead
from oatlite.maths.exploration import Duels
from oatlite.workers import explorer as module
from oatlite.workers.active import ActivePreferences
from oatlite.workers.contracts import Share
from oatlite.workers.explorer import Explorer

WIDTH = 6
LETTERS = "abcdefgh"
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


def test_heads_that_drift_apart_end_the_run_with_one_line() -> None:
    ranks = ThreadRanks(2)
    explorers = [explorer("passive", ranks.of(i)) for i in range(2)]
    raised: list[tuple[int, Exception]] = []

    def work(rank: int) -> None:
        for step in range(1, 4):
            choice = explorers[rank].choose([candidates(f"{step} {rank}", "b", "c")], step)
            try:
                explorers[rank].learn(choice.features, 1, 2 * step)  # type: ignore[arg-type]
            except WorkerDied as error:
                raised.append((step, error))
                return
            head = explorers[rank].head
            if step == 2 and rank == 1 and head is not None:
                with torch.no_grad():
                    head.weights[1][0, 0, 0] += 1e-6

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [step for step, _ in raised] == [3, 3]
    assert all("drifted apart" in str(error) and "\n" not in str(error) for _, error in raised)


def test_active_preferences_of_a_rank_without_prompts_still_ask_the_reference_with_the_others() -> None:
    asked = []

    def score(pairs: Sequence[object], at_most: int) -> list[np.ndarray]:
        asked.append((len(pairs), at_most))
        return []

    choice = ActivePreferences(config("apl"), score).choose([], 1)  # type: ignore[arg-type]
    assert choice.duels == [] and asked == [(0, 2 * 128)]


def spread_out(rng: np.random.Generator, num_prompts: int, num_candidates: int) -> list[CandidateSet]:
    """Responses of one to five random tokens, each with a log-probability."""
    sets = []
    for _ in range(num_prompts):
        found = []
        for _ in range(num_candidates):
            size = int(rng.integers(1, 6))
            tokens, logprobs = rng.integers(0, 8, size).astype(np.int32), -rng.random(size).astype(np.float32) * 4
            text = "".join(LETTERS[token] for token in tokens)
            found.append(Candidate(tokens=tokens, logprobs=logprobs, text=text, is_finished=True, sampler="policy"))
        prompt = rng.integers(0, 8, 2).astype(np.int32)
        sets.append(CandidateSet(prompt="p", prompt_tokens=prompt, candidates=found))
    return sets


def reference_logprobs(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of a model that knows a prompt's last token and the places of a response's."""
    return -0.1 * (1 + tokens + prompt[-1] * np.arange(1, len(tokens) + 1)).astype(np.float32)


@pytest.mark.parametrize("num_candidates", [2, 3, 4])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3), (0.7, 0.6)])
def test_active_preferences_are_those_of_the_definition(num_candidates: int, shares: tuple[float, float]) -> None:
    """Brute force: prompts of least mean log-probability, their widest pairs, and of these the widest; rounded up."""
    sets = spread_out(np.random.default_rng(num_candidates), 7, num_candidates)
    options = {"num_candidates": num_candidates, "entropy_share": shares[0], "certainty_share": shares[1]}

    def score(pairs: Sequence[TokenPair], at_most: int) -> list[np.ndarray]:
        assert len(pairs) <= at_most
        return [
            np.concatenate([reference_logprobs(pair.prompt, side) for side in (pair.chosen, pair.rejected)])
            for pair in pairs
        ]

    choice = ActivePreferences(config("apl", **options), score).choose(sets, 1)

    def mean(m: int) -> float:
        return sum(float(c.logprobs.sum()) for c in sets[m].candidates) / num_candidates

    def implicit(m: int, n: int) -> float:
        one = sets[m].candidates[n]
        return float(one.logprobs.sum()) - float(reference_logprobs(sets[m].prompt_tokens, one.tokens).sum())

    asked = sorted(range(7), key=mean)[: math.ceil(7 * shares[0] - 1e-9)]
    widest = {
        m: max(
            itertools.combinations(range(num_candidates), 2), key=lambda p: abs(implicit(m, p[0]) - implicit(m, p[1]))
        )
        for m in asked
    }
    margins = {m: abs(implicit(m, first) - implicit(m, second)) for m, (first, second) in widest.items()}
    kept = sorted(sorted(asked, key=margins.__getitem__, reverse=True)[: math.ceil(len(asked) * shares[1] - 1e-9)])
    assert choice.duels == [Duel(m, *widest[m]) for m in kept]
    assert len(kept) == {(1.0, 1.0): 7, (0.5, 1.0): 4, (1.0, 0.3): 3, (0.7, 0.6): 3}[shares]


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


@pytest.mark.parametrize("rule", ["sea-bai", "sea-ee", "uncertainty"])
def test_candidates_of_one_text_are_one(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are encoded once, and meet nobody twice; the random fallback takes none of them either."""
    one = explorer(rule, ThreadRanks(1).of(0), members=1, num_candidates=4, allow_second_best=rule == "sea-ee")
    asked: list[str] = []
    encode = TextEncoder.encode

    def noted(self: TextEncoder, prompts: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, float]:
        asked.extend(responses)
        return encode(self, prompts, responses)

    monkeypatch.setattr(TextEncoder, "encode", noted)
    met = set()
    for step in range(1, 40):
        (duel,) = one.choose([candidates("a", "a", "b", "b")], step).duels
        met.add(tuple(sorted((duel.first, duel.second))))
    assert met == {(0, 2)}
    assert asked == ["a", "b"] * 39
    assert one.choose([candidates("a", "a", "a", "a")], 1).duels == []


REWARDS = np.array([[[3.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]], [[1.0, 2.0, 3.0]]])
"""Two members prefer the first candidate, and the third the last."""


def chosen(options: dict[str, object], seed: int = 0) -> Duels:
    explore = config("sea-ee", members=3, **options).explore
    return module.select(REWARDS, np.arange(3)[None], explore, np.random.default_rng(seed))


def test_as_many_members_are_asked_for_a_second_choice_as_may_be() -> None:
    clashes = dict.fromkeys((1, 2, 3), 0)
    for seed in range(60):
        for tries in clashes:
            clashes[tries] += int(chosen({"max_tries": tries, "random_fallback": False}, seed).is_clash[0])
    assert clashes[1] == 60, "a member alone agrees with itself"
    assert 10 < clashes[2] < 30, "the second agrees with the first in one order of three"
    assert clashes[3] == 0


def test_a_second_best_is_taken_only_where_it_may_be() -> None:
    for seed in range(20):
        duels = chosen({"max_tries": 1, "random_fallback": False, "allow_second_best": True}, seed)
        assert (int(duels.first[0]), int(duels.second[0])) in {(0, 1), (0, 2), (2, 1)}
        assert not duels.is_clash[0]


def test_without_a_fallback_a_prompt_whose_choices_are_one_is_left_out() -> None:
    sets = [candidates("a", "b", "c")]
    with_fallback, without = (
        explorer("sea-ee", ThreadRanks(1).of(0), members=1, random_fallback=fallback) for fallback in (True, False)
    )
    for step in range(1, 10):
        assert len(with_fallback.choose(sets, step).duels) == 1
        assert without.choose(sets, step).duels == []


def test_the_head_is_trained_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}

    class NotedTrainer(HeadTrainer):
        def __init__(self, head: EpistemicHead, **more: object) -> None:
            made.update(more)
            super().__init__(head, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "HeadTrainer", NotedTrainer)
    given = {"lr": 0.02, "weight_decay": 0.3, "gradient_steps": 7, "batch_size": 9, "pull": 0.25}
    given |= {"fixed_pull": True, "buffer_size": 11}
    one = explorer("passive", ThreadRanks(1).of(0), **given)
    choice = one.choose([candidates("a", "b", "c")], 1)
    figures = one.learn(choice.features, 1, 100)  # type: ignore[arg-type]
    renamed = {"gradient_steps": "num_steps", "fixed_pull": "is_pull_fixed"}
    assert made == {renamed.get(name, name): value for name, value in given.items()} | {"seed": 0}
    assert figures["pull"] == 0.25, "a fixed pull does not fall with the queries"


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
