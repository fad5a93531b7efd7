"""The tabular experiments: exact against autograd, and converging as the theorems say."""

from __future__ import annotations

import pytest
import torch

from oatlite.maths.bandit import SAMPLERS, convergence_order, newton_rate, pair_distribution, tabular_dpo


def random_rewards(prompts: int, actions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(
    rewards: torch.Tensor, sampler: str, beta: float, learning_rate: float, num_updates: int
) -> torch.Tensor:
    """The same from the words of the definition alone: a loss, its gradient, a step."""
    theta = torch.zeros_like(rewards, requires_grad=True)
    actions = range(rewards.shape[1])
    optimal = torch.softmax(rewards / beta, -1)
    best = (optimal * (rewards - beta * optimal.log())).sum(-1)
    gaps = []
    for _ in range(num_updates):
        policy = torch.softmax(theta, -1)
        gaps.append(best - (policy * (rewards - beta * policy.log())).sum(-1).detach())
        loss = torch.zeros((), dtype=torch.float64)
        for p in range(len(rewards)):
            weights, losses = [], []
            for i in actions:
                for j in actions:
                    reward, implicit = rewards[p, i] - rewards[p, j], beta * (policy[p, i].log() - policy[p, j].log())
                    margin = {"uniform": None, "reward-mixture": reward, "policy-mixture": implicit.detach()}[sampler]
                    weights.append(
                        torch.ones((), dtype=torch.float64) if margin is None else 2 + margin.exp() + (-margin).exp()
                    )
                    win = torch.sigmoid(reward)
                    losses.append(-win * torch.sigmoid(implicit).log() - (1 - win) * torch.sigmoid(-implicit).log())
            loss = loss + sum(weight * one for weight, one in zip(weights, losses, strict=True)) / sum(weights)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - learning_rate * gradient).detach().requires_grad_()
    return torch.stack(gaps, 1).detach()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_updates_are_those_of_the_definition(sampler: str) -> None:
    rewards = random_rewards(2, 4)
    expected = by_autograd(rewards, sampler, 0.7, 1.3, 12)
    found = tabular_dpo(rewards, sampler, beta=0.7, learning_rate=1.3, num_updates=12)
    assert found.shape == (2, 12) and found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)
    assert float(found.min()) > 0 and bool((found[:, 0] > found[:, -1]).all())
    each = torch.tensor([1.3, 0.4])
    by_prompt = tabular_dpo(rewards, sampler, beta=0.7, learning_rate=each, num_updates=12)
    assert torch.allclose(by_prompt[0], found[0]) and not torch.allclose(by_prompt[1], found[1])


def test_pairs_are_as_likely_as_the_mixtures_make_them() -> None:
    """Two uniform draws, or softmax(v) against softmax(-v): each in proportion to its normalizer."""
    rewards, policy = random_rewards(3, 5), random_rewards(3, 5, seed=1).log_softmax(-1)
    assert torch.allclose(pair_distribution(rewards, policy, "uniform", beta=2.0), torch.tensor(1 / 25).double())
    for sampler, values in (("reward-mixture", rewards), ("policy-mixture", 2.0 * policy)):
        up, down = torch.softmax(values, -1), torch.softmax(-values, -1)
        skewed = up[:, :, None] * down[:, None, :]
        mass = values.exp().sum(-1) * (-values).exp().sum(-1)  # of e^(v_i - v_j) over all pairs
        ordered = 2 + mass[:, None, None] * (skewed + skewed.transpose(1, 2))
        expected = ordered / ordered.sum((1, 2), keepdim=True)
        assert torch.allclose(pair_distribution(rewards, policy, sampler, beta=2.0), expected.double(), rtol=1e-6)


def test_uniform_pairs_converge_linearly_and_mixtures_quadratically() -> None:
    rewards, beta = random_rewards(20, 20), 3.0
    rates = {"uniform": 2 * 20 / beta**2, "reward-mixture": newton_rate(rewards, beta=beta)}
    rates["policy-mixture"] = rates["reward-mixture"]
    orders = {
        sampler: convergence_order(
            tabular_dpo(rewards, sampler, beta=beta, learning_rate=rates[sampler], num_updates=60)
        )
        for sampler in SAMPLERS
    }
    assert orders["uniform"] == pytest.approx(1, abs=0.05)
    assert orders["reward-mixture"] == pytest.approx(2, abs=0.15)
    assert orders["policy-mixture"] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drawn_pairs_follow_the_expectation_down_to_a_floor_of_noise(sampler: str) -> None:
    rewards = random_rewards(8, 6)
    arguments = {"beta": 1.0, "learning_rate": 0.5, "num_updates": 400}
    exact = tabular_dpo(rewards, sampler, **arguments)
    few, many = (
        tabular_dpo(rewards, sampler, **arguments, num_samples=n, generator=torch.Generator().manual_seed(n))
        for n in (8, 8192)
    )
    assert torch.allclose(many[:, :60], exact[:, :60], rtol=0.15, atol=2e-3)
    floors = [float(gaps[:, 300:].mean()) for gaps in (exact, many, few)]
    assert floors[0] < floors[1] < floors[2]
    assert floors[1] / floors[2] == pytest.approx(8 / 8192, rel=1.0), "the floor falls with the number of samples"


def test_orders_of_series_that_are_known() -> None:
    linear = 0.5 ** torch.arange(1, 30).double()
    quadratic = 0.5 ** (2.0 ** torch.arange(8).double())
    assert convergence_order(linear[None]) == pytest.approx(1)
    assert convergence_order(quadratic[None], floor=1e-80) == pytest.approx(2)
    assert convergence_order(torch.ones(2, 10)) != convergence_order(torch.ones(2, 10)), "nothing to fit is NaN"


@pytest.mark.parametrize(
    ("rewards", "more", "words"),
    [
        (torch.zeros(3), {}, r"shape \(P, A\)"),
        (torch.zeros(3, 1), {}, r"shape \(P, A\)"),
        (torch.full((2, 2), float("inf")), {}, "finite"),
        (torch.zeros(2, 2), {"beta": 0.0}, "beta must be positive"),
        (torch.zeros(2, 2), {"sampler": "best"}, "no sampler 'best'"),
    ],
)
def test_what_cannot_be_is_said(rewards: torch.Tensor, more: dict, words: str) -> None:
    arguments = {"sampler": "uniform", "beta": 1.0, "learning_rate": 1.0, "num_updates": 1} | more
    with pytest.raises(ValueError, match=words):
        tabular_dpo(rewards, **arguments)
