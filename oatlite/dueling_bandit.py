"""A contextual dueling bandit without a language model: what SEA's selection rules are worth, in seconds.

A candidate is a vector of D features; a fixed random network of one hidden layer, which the learner does not know, is
its true reward. In each round M prompts bring N candidates each, a rule picks two of them by the epistemic head, a
Bradley-Terry comparison says which is better, and the head learns from it. All seeds run at once, as one tensor
program; what a seed gives is a function of it, whatever others run beside it. Shape suffixes: S seeds, T rounds, E
members, M prompts, N candidates, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oatlite.maths.ensemble import EpistemicHead
from oatlite.maths.exploration import (
    Duels,
    Indices,
    best_arm_duels,
    draw_members,
    explore_exploit_duels,
    passive_duels,
    uncertainty_duels,
)

Rule = Callable[[np.ndarray, Indices], Duels]  # of rewards (E, M, N), and an order of the members for each prompt

RULES: dict[str, Rule] = {
    "sea-bai": best_arm_duels,
    "sea-ee": explore_exploit_duels,
    "uncertainty": lambda rewards, _: uncertainty_duels(rewards),
    "passive": lambda rewards, _: passive_duels(rewards.shape[1]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """``sharpness`` scales true rewards, which have a deviation of 1 otherwise: comparisons get more certain. The head
    learns by ``num_steps`` steps a round, each on ``batch_size`` of the comparisons so far."""

    num_rounds: int = 60
    num_prompts: int = 8
    num_candidates: int = 10
    num_features: int = 6
    num_members: int = 10
    hidden_size: int = 16
    sharpness: float = 2.0
    num_steps: int = 5
    batch_size: int = 32
    num_eval_prompts: int = 50


@dataclass(frozen=True, slots=True)
class Regret:
    """After each round: ``queries`` (T,) asked so far; of each seed (S, T) ``cumulative``, the sum over all duels so
    far of what the best candidate's true reward was above the mean of the two that met, and ``simple``, how much the
    head's favourite loses against the best candidate on prompts that were never asked about."""

    queries: np.ndarray
    cumulative: np.ndarray
    simple: np.ndarray


def run(rule: str, problem: Problem, seeds: Sequence[int]) -> Regret:
    """One of :data:`RULES` on each seed. Prompts, candidates and the true reward of a seed are the same for all rules,
    and so are the luck of its comparisons and where its head begins."""
    features, rewards, unseen, unseen_rewards = (
        torch.stack(each) for each in zip(*(_world(problem, seed) for seed in seeds), strict=True)
    )
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]
    heads = Heads(problem, seeds)
    shape = (len(seeds), problem.num_rounds)
    cumulative, simple = np.empty(shape), np.empty(shape)
    regret = torch.zeros(len(seeds), dtype=torch.float64)
    asked = problem.num_prompts * np.arange(1, problem.num_rounds + 1)
    for t in range(problem.num_rounds):
        first, second = _duels(rule, heads.rewards(features[:, t]), rngs)  # (S, M) each
        true_first, true_second = (rewards[:, t].gather(2, side[..., None])[..., 0] for side in (first, second))
        luck = torch.from_numpy(np.stack([rng.random(problem.num_prompts) for rng in rngs]))
        first_wins = luck < torch.sigmoid(true_first - true_second)
        regret += (rewards[:, t].amax(2) - (true_first + true_second) / 2).sum(1)
        heads.add(
            *(
                features[:, t].take_along_dim(side[..., None, None], 2)[:, :, 0]
                for side in (torch.where(first_wins, first, second), torch.where(first_wins, second, first))
            )
        )
        heads.learn(int(asked[t]))
        favourites = heads.rewards(unseen).mean(1).argmax(2, keepdim=True)
        cumulative[:, t] = regret
        simple[:, t] = (unseen_rewards.amax(2) - unseen_rewards.gather(2, favourites)[..., 0]).mean(1)
    return Regret(asked.astype(np.float64), cumulative, simple)


def _duels(rule: str, rewards: Tensor, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
    """The first and the second of each duel, (S, M), by rewards (S, E, M, N): the prompts of all seeds at once."""
    num_seeds, num_members, num_prompts, num_candidates = rewards.shape
    flat = rewards.transpose(0, 1).reshape(num_members, num_seeds * num_prompts, num_candidates)
    members = np.concatenate([draw_members(rng, num_members, num_prompts) for rng in rngs])
    duels = RULES[rule](flat.numpy(), members)
    sides = duels.first.reshape(num_seeds, -1), duels.second.reshape(num_seeds, -1)
    all_there = np.ones((num_prompts, num_candidates), np.bool_)
    each = [Duels(*pair).with_random_others(all_there, rng) for *pair, rng in zip(*sides, rngs, strict=True)]
    return torch.from_numpy(np.stack([one.first for one in each])), torch.from_numpy(
        np.stack([one.second for one in each])
    )


class Heads:
    """An :class:`EpistemicHead` for each seed, trained as :class:`oatlite.epistemic.HeadTrainer` would each of them.

    A batch is drawn from the same places of all seeds' comparisons.
    """

    def __init__(
        self, problem: Problem, seeds: Sequence[int], *, lr: float = 1e-3, weight_decay: float = 5e-5, pull: float = 0.5
    ) -> None:
        self._sizes = len(seeds), problem.num_members
        each = [
            EpistemicHead(
                problem.num_features, num_members=problem.num_members, hidden_size=problem.hidden_size, seed=seed
            )
            for seed in seeds
        ]
        weights, biases = zip(*((head.weights, head.biases) for head in each), strict=True)
        self.weights = [torch.cat(layer).detach().requires_grad_() for layer in zip(*weights, strict=True)]
        self.biases = [torch.cat(layer).detach().requires_grad_() for layer in zip(*biases, strict=True)]
        self._parameters = [*self.weights, *self.biases]
        self._initial = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizer = torch.optim.Adam(self._parameters, lr=lr, weight_decay=weight_decay)
        self._pull = pull
        self._num_steps = problem.num_steps
        self._batch_size = problem.batch_size
        self._generator = torch.Generator().manual_seed(0)
        self._comparisons = torch.empty(len(seeds), 0, 2, problem.num_features)

    @torch.no_grad()
    def rewards(self, features: Tensor) -> Tensor:
        """(S, E, M, N) of ``features`` (S, M, N, D)."""
        return self._forward(features.flatten(1, 2)).view(*self._sizes, *features.shape[1:3])

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take in the features (S, M, D) of M comparisons for each seed."""
        self._comparisons = torch.cat([self._comparisons, torch.stack([chosen, rejected], 2)], 1)

    def learn(self, num_queries: int) -> None:
        count = min(self._batch_size, self._comparisons.shape[1])
        for _ in range(self._num_steps):
            drawn = torch.randperm(self._comparisons.shape[1], generator=self._generator)[:count]
            batch = self._comparisons[:, drawn]  # (S, count, 2, D)
            margins = self._forward(batch.transpose(1, 2).flatten(1, 2)).unflatten(2, (2, count))
            # Sums over seeds of what is a mean within each, so that none feels the others.
            loss = F.softplus(margins[:, :, 1] - margins[:, :, 0]).mean((1, 2)).sum()
            loss = loss + self._pull * count / num_queries * self._distance()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _forward(self, features: Tensor) -> Tensor:
        """Rewards (S, E, X) of ``features`` (S, X, D)."""
        hidden = features.repeat_interleave(self._sizes[1], 0)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if i < len(self.weights) - 1:
                hidden = F.relu(hidden)
        return hidden.view(*self._sizes, -1)

    def _distance(self) -> Tensor:
        """The sum over seeds of the mean squared distance from where each began."""
        pairs = zip(self._parameters, self._initial, strict=True)
        total = torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
        return total * self._sizes[0] / sum(parameter.numel() for parameter in self._parameters)


def _world(problem: Problem, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (T, M, N, D) and true rewards (T, M, N) of all rounds; and the same of the held-out prompts (M, N)."""
    generator = torch.Generator().manual_seed(seed)
    truth = _true_reward(problem, seed)
    unseen = _candidates(problem, problem.num_eval_prompts, generator)
    features = torch.stack([_candidates(problem, problem.num_prompts, generator) for _ in range(problem.num_rounds)])
    return features, truth(features), unseen, truth(unseen)


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
