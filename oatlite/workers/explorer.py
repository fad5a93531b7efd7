"""Exploration by the epistemic reward head: it scores all candidates, chooses which two meet, and learns from verdicts.

Every learner rank holds the same head. Selection takes a rank's own prompts; comparisons are gathered from all ranks,
and each rank takes the same steps on them, so that heads stay equal without being sent around. A digest of the head
travels along, and heads that differ end the run.

The head lives here and not at the actors, to which the policy's weights are streamed: selection sees a rank's whole
batch, which several actors may have sampled; actors stay without state, so that a restarted one repeats its numbers;
and less travels: of M prompts with N candidates, ``4 M N D`` bytes of D features come from an actor in a step, where
the E members of width H would be ``4 E H (D + H + 1)`` to send it. These are more while M < E H / N, which is 256
prompts with the defaults.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oatlite.algorithms.base import CandidateSet, Duel
from oatlite.config.schema import Config, ExploreConfig
from oatlite.config.steps import self_labelled_of
from oatlite.epistemic import HeadTrainer
from oatlite.errors import WorkerDied
from oatlite.maths.ensemble import EpistemicHead
from oatlite.maths.exploration import (
    MEASURES,
    Duels,
    Indices,
    Rewards,
    best_arm_duels,
    draw_members,
    explore_exploit_duels,
    passive_duels,
    self_labelled_pairs,
    uncertainty_duels,
)
from oatlite.messages import Bool, Float32
from oatlite.workers.contracts import Actors, Ranks, Share

SELECT_DRAWS, SELF_DRAWS = 10, 11
NO_HEAD = -1
HEADER_BYTES = 5 * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The duels of a rank's step. Those that the head labels itself (``is_self_labelled``, (B,)) are won by their
    first candidate; ``features`` (B, 2, D) are of both candidates of each duel, where there is a head. ``seconds``
    went into encoding, and ``head_seconds`` into what the head makes of it."""

    duels: list[Duel]
    is_self_labelled: Bool
    features: Float32 | None
    seconds: float
    head_seconds: float = 0.0


class Explorer:
    """The head of one rank, made when the first features show how wide it is."""

    def __init__(self, config: Config, share: Share, actors: Actors, ranks: Ranks, device: torch.device) -> None:
        self._config = config
        self._share = share
        self._actors = actors
        self._ranks = ranks
        self._device = device
        self._trainer: HeadTrainer | None = None

    def choose(self, sets: Sequence[CandidateSet], step: int) -> Choice:
        """Which two candidates of each prompt meet in ``step``, and which pairs the head labels itself.

        A prompt whose duel would be one candidate against itself is left out. Candidates of one text are one, and the
        first that the encoder can take stands in for those that it cannot.
        """
        if not sets:
            return Choice(
                duels=[], is_self_labelled=np.zeros(0, np.bool_), features=np.zeros((0, 2, 0), np.float32), seconds=0.0
            )
        features, stand_in, seconds = self._features(sets)
        start = time.perf_counter()
        # Equal features may be rounded differently at another place of a product: copies are made equal.
        rewards = np.take_along_axis(self._rewards(features), stand_in[None], axis=2)
        duels = select(rewards, stand_in, self._config.explore, self._draws(SELECT_DRAWS, step))
        own, prompts = self._self_labelled(rewards, step), np.arange(len(sets))
        first = stand_in[prompts, np.where(own.is_there, own.first, duels.first)]
        second = stand_in[prompts, np.where(own.is_there, own.second, duels.second)]
        kept = np.flatnonzero(first != second)
        return Choice(
            duels=[Duel(int(m), int(first[m]), int(second[m])) for m in kept],
            is_self_labelled=own.is_there[kept],
            features=np.stack([features[kept, first[kept]], features[kept, second[kept]]], axis=1),
            seconds=seconds,
            head_seconds=time.perf_counter() - start,
        )

    def best(self, sets: Sequence[CandidateSet]) -> list[int]:
        """The candidate of each prompt that the members like best on average."""
        if not sets:
            return []
        features, stand_in, _ = self._features(sets)
        best = self._rewards(features).mean(0).argmax(1)
        favourites: list[int] = stand_in[np.arange(len(sets)), best].tolist()
        return favourites

    def learn(self, comparisons: Float32, num_asked: int, num_before: int) -> dict[str, float]:
        """Learn from this rank's comparisons, features (B, 2, D) of the chosen and the rejected response, and from
        those of the other ranks; all ranks together. Raises WorkerDied where their heads were not the same before.

        This rank made ``num_asked`` queries in this step, and all ranks ``num_before`` before it. Gives the accuracy
        on these comparisons before they were learned from, and what was measured while learning; nothing where nothing
        was learned.
        """
        header = np.array([*comparisons.shape, num_asked, self._digest()], np.int64)
        parts = self._ranks.gather_bytes(header.tobytes() + comparisons.astype(np.float32).tobytes())
        num_queries, gathered, digests = num_before, [], set()
        for part in parts:
            asked, digest, theirs = _unpacked(part)
            num_queries += asked
            gathered.append(theirs)
            digests.add(digest)
        if len(digests - {NO_HEAD}) > 1:
            raise WorkerDied(
                "the learner ranks' epistemic heads have drifted apart, each having learned from the same comparisons",
                "resume from the last checkpoint; if it happens again, learn with --learners 1",
            )
        until = self._config.explore.learn_until
        gathered = [part for part in gathered if len(part)]  # a rank without prompts knows no width of features
        if until is not None and num_queries > until:
            return {}
        if not gathered:
            return {} if self._trainer is None else self._trainer.learn(num_queries)
        chosen, rejected = torch.from_numpy(np.concatenate(gathered)).unbind(1)
        trainer = self._trainer_for(chosen.shape[-1])
        figures = {"accuracy": trainer.accuracy(chosen, rejected)}
        trainer.add(chosen, rejected)
        return figures | trainer.learn(num_queries)

    @property
    def head(self) -> EpistemicHead | None:
        """None before the first features."""
        return None if self._trainer is None else self._trainer.head

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint, tensors by name; nothing before the first features."""
        return {} if self._trainer is None else self._trainer.state()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._trainer_for(state["comparisons"].shape[-1]).restore(state)

    def _features(self, sets: Sequence[CandidateSet]) -> tuple[Float32, Indices, float]:
        """Features (M, N, D), whose they are (M, N), and seconds.

        Those of a candidate are its own, or of the first with its text; in the place of one that the encoder cannot
        take, those of the first that it can, and zeros where it can take none.
        """
        texts = [[candidate.text for candidate in one.candidates] for one in sets]
        pairs = [(one.prompt, text) for one, of_one in zip(sets, texts, strict=True) for text in of_one]
        places = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        found, seconds = self._actors.encode([prompt for prompt, _ in places], [text for _, text in places])
        features = found[[places[pair] for pair in pairs]].reshape(len(sets), -1, found.shape[-1])
        is_known = ~np.isnan(features).any(2)
        own = np.array([[of_one.index(text) for text in of_one] for of_one in texts])
        stand_in = np.where(is_known, own, is_known.argmax(1)[:, None])
        return np.nan_to_num(features[np.arange(len(sets))[:, None], stand_in]), stand_in, seconds

    def _rewards(self, features: Float32) -> Rewards:
        """(E, M, N)"""
        trainer = self._trainer_for(features.shape[-1])
        with torch.no_grad():
            rewards: Rewards = trainer.head(torch.from_numpy(features).to(self._device)).cpu().numpy()
        return rewards

    def _digest(self) -> int:
        """Of the head's weights."""
        if self._trainer is None:
            return NO_HEAD
        digest = 1
        for parameter in self._trainer.head.parameters():
            digest = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), digest)
        return digest

    def _trainer_for(self, num_features: int) -> HeadTrainer:
        if self._trainer is None:
            options, seed = self._config.explore, self._config.run.seed
            head = EpistemicHead(num_features, num_members=options.members, hidden_size=options.hidden_size, seed=seed)
            self._trainer = HeadTrainer(
                head.to(self._device),
                lr=options.lr,
                weight_decay=options.weight_decay,
                num_steps=options.gradient_steps,
                batch_size=options.batch_size,
                pull=options.pull,
                is_pull_fixed=options.fixed_pull,
                buffer_size=options.buffer_size,
                seed=seed,
            )
        return self._trainer

    def _self_labelled(self, rewards: Rewards, step: int) -> _SelfLabelled:
        """A random share of the prompts, once the burn-in is over; one whose candidates are all alike to the member
        that labels it has no pair."""
        _, num_prompts, _ = rewards.shape
        rng = self._draws(SELF_DRAWS, step)
        pairs = self_labelled_pairs(rewards, draw_members(rng, len(rewards), num_prompts))
        is_there = np.zeros(num_prompts, np.bool_)
        is_there[rng.permutation(num_prompts)[: self_labelled_of(self._config, num_prompts, step)]] = True
        return _SelfLabelled(pairs.first, pairs.second, is_there)

    def _draws(self, purpose: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self._config.run.seed, purpose, step, self._share.rank])


@dataclass(frozen=True, slots=True)
class _SelfLabelled:
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    is_there: Bool


def select(rewards: Rewards, stand_in: Indices, options: ExploreConfig, rng: np.random.Generator) -> Duels:
    """The duels by the rule of ``options``, of rewards (E, M, N); ``stand_in`` (M, N) says which candidate each is,
    those of one text having equal rewards."""
    num_members, num_prompts, num_candidates = rewards.shape
    members = draw_members(rng, num_members, num_prompts)
    is_itself = stand_in == np.arange(num_candidates)
    match options.rule:
        case "sea-bai":
            duels = best_arm_duels(rewards, members, MEASURES[options.uncertainty])
        case "sea-ee":
            duels = explore_exploit_duels(
                np.where(is_itself, rewards, -np.inf),  # a copy is nobody's second best
                members,
                max_tries=options.max_tries,
                allow_second_best=options.allow_second_best,
            )
        case "uncertainty":
            duels = uncertainty_duels(rewards, MEASURES[options.uncertainty])
        case _:
            return passive_duels(num_prompts)
    prompts = np.arange(num_prompts)
    duels = Duels(stand_in[prompts, duels.first], stand_in[prompts, duels.second])
    return duels.with_random_others(is_itself, rng) if options.random_fallback else duels


def _unpacked(part: bytes) -> tuple[int, int, Float32]:
    """A rank's number of queries, the digest of its head before this step, and its comparisons (B, 2, D)."""
    *shape, num_asked, digest = np.frombuffer(part[:HEADER_BYTES], np.int64).tolist()
    return num_asked, digest, np.frombuffer(part[HEADER_BYTES:], np.float32).reshape(shape)
