"""A contextual dueling bandit without a language model: what SEA's selection rules are worth, in seconds.

A candidate is a vector of D features; a fixed random network of one hidden layer, which the learner does not know, is
its true reward. In each round M prompts bring N candidates each, a rule picks two of them by the epistemic head, a
Bradley-Terry comparison says which is better, and the head learns from it. Everything is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oatlite.epistemic import HeadTrainer
from oatlite.maths.ensemble import EpistemicHead
from oatlite.maths.exploration import (
    Duels,
    best_arm_duels,
    draw_members,
    explore_exploit_duels,
    passive_duels,
    uncertainty_duels,
)

Rule = Callable[[np.ndarray, np.random.Generator], Duels]

RULES: dict[str, Rule] = {
    "sea-bai": lambda rewards, rng: best_arm_duels(rewards, draw_members(rng, len(rewards), rewards.shape[1])),
    "sea-ee": lambda rewards, rng: explore_exploit_duels(rewards, draw_members(rng, len(rewards), rewards.shape[1])),
    "uncertainty": lambda rewards, rng: uncertainty_duels(rewards),
    "passive": lambda rewards, rng: passive_duels(rewards.shape[1]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """``sharpness`` scales true rewards, which have a deviation of 1 otherwise: comparisons get more certain."""

    num_rounds: int = 100
    num_prompts: int = 8
    num_candidates: int = 10
    num_features: int = 16
    num_members: int = 10
    hidden_size: int = 64
    sharpness: float = 2.0
    num_eval_prompts: int = 500


@dataclass(frozen=True, slots=True)
class Regret:
    """After each round (T,): ``queries`` asked so far; ``cumulative``, the sum over all duels so far of what the best
    candidate's true reward was above the mean of the two that met; ``simple``, how much the head's favourite loses
    against the best candidate on prompts that were never asked about."""

    queries: np.ndarray
    cumulative: np.ndarray
    simple: np.ndarray


def run(rule: str, problem: Problem, seed: int) -> Regret:
    """One run of one of :data:`RULES`. Prompts, candidates and the true reward are the same for all rules of a seed."""
    rng, truth = np.random.default_rng([seed, 1]), _true_reward(problem, seed)
    world = torch.Generator().manual_seed(seed)
    held_out = _candidates(problem, problem.num_eval_prompts, world)
    trainer = HeadTrainer(
        EpistemicHead(
            problem.num_features, num_members=problem.num_members, hidden_size=problem.hidden_size, seed=seed
        ),
        seed=seed,
    )
    queries, cumulative, simple, regret, asked = [], [], [], 0.0, 0
    for _ in range(problem.num_rounds):
        features = _candidates(problem, problem.num_prompts, world)
        rewards = truth(features)  # (M, N)
        with torch.no_grad():
            duels = RULES[rule](trainer.head(features).numpy(), rng)
        duels = duels.with_random_others(problem.num_candidates, rng)
        rows = np.arange(problem.num_prompts)
        first, second = rewards[rows, duels.first], rewards[rows, duels.second]
        first_wins = torch.from_numpy(rng.random(problem.num_prompts)) < torch.sigmoid(first - second)
        sides = features[rows, duels.first], features[rows, duels.second]
        wins = first_wins[:, None]
        trainer.add(torch.where(wins, *sides), torch.where(wins, *reversed(sides)))
        asked += problem.num_prompts
        regret += float((rewards.max(1).values - (first + second) / 2).sum())
        trainer.learn(asked)
        queries.append(asked)
        cumulative.append(regret)
        simple.append(_simple_regret(trainer.head, held_out, truth))
    return Regret(np.array(queries), np.array(cumulative), np.array(simple))


def _true_reward(problem: Problem, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    inner = torch.randn(problem.num_features, problem.num_features, generator=generator)
    outer = torch.randn(problem.num_features, generator=generator)

    def raw(features: Tensor) -> Tensor:
        return torch.tanh(features @ inner / problem.num_features**0.5) @ outer

    sample = raw(torch.randn(4096, problem.num_features, generator=generator))
    return lambda features: problem.sharpness * (raw(features) - sample.mean()) / sample.std()


def _candidates(problem: Problem, num_prompts: int, generator: torch.Generator) -> Tensor:
    """(M, N, D): a part that a prompt's candidates have in common, and one of each's own."""
    shared = torch.randn(num_prompts, 1, problem.num_features, generator=generator)
    own = torch.randn(num_prompts, problem.num_candidates, problem.num_features, generator=generator)
    return (shared + 2 * own) / 5**0.5


def _simple_regret(head: EpistemicHead, features: Tensor, truth: Callable[[Tensor], Tensor]) -> float:
    rewards = truth(features)
    with torch.no_grad():
        favourites = head(features).mean(0).argmax(1, keepdim=True)
    return float((rewards.max(1).values - rewards.gather(1, favourites)[:, 0]).mean())
