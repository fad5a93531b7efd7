"""The tabular experiments: exact against autograd, and converging as the theorems say."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

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


def softmax(values: list[Decimal]) -> list[Decimal]:
    terms = [value.exp() for value in values]
    return [term / sum(terms) for term in terms]


def by_decimals(
    rewards: list[int], sampler: str, beta: Decimal, num_updates: int, rate: Decimal | None = None
) -> tuple[list[list[Decimal]], Decimal, list[Decimal]]:
    """The first joint, Newton's rate and the gaps of one prompt at that rate or another, in 150 digits."""
    with localcontext() as context:
        context.prec = 150
        r = [Decimal(reward) for reward in rewards]
        actions = range(len(r))

        def joint(v: list[Decimal]) -> tuple[list[list[Decimal]], Decimal]:
            weights = [[2 + (v[i] - v[j]).exp() + (v[j] - v[i]).exp() for j in actions] for i in actions]
            total = sum(map(sum, weights))
            return [[weight / total for weight in row] for row in weights], total

        def sigmoid(x: Decimal) -> Decimal:
            return 1 / (1 + (-x).exp())

        theta, gaps, joints = [Decimal(0) for _ in r], [], []
        newton = joint(r)[1] / (2 * beta**2 * len(r))
        rate = newton if rate is None else rate
        optimal = softmax([reward / beta for reward in r])
        for _ in range(num_updates):
            policy = softmax(theta)
            gaps.append(
                sum(p * (reward - beta * p.ln()) for p, reward in zip(optimal, r, strict=True))
                - sum(p * (reward - beta * p.ln()) for p, reward in zip(policy, r, strict=True))
            )
            weights, _ = joint(r if sampler == "reward-mixture" else [beta * logit for logit in theta])
            joints.append(weights)
            pull = [
                [weights[i][j] * (sigmoid(r[i] - r[j]) - sigmoid(beta * (theta[i] - theta[j]))) for j in actions]
                for i in actions
            ]
            theta = [theta[i] + rate * beta * sum(pull[i][j] - pull[j][i] for j in actions) for i in actions]
        return joints[0], newton, gaps


@pytest.mark.parametrize("rewards", [[0, 50, 60, 100], [0, 3, 41, 42], [-300, 0, 0, 300]])
def test_large_margins_are_weighed_exactly(rewards: list[int]) -> None:
    joint, rate, _ = by_decimals(rewards, "reward-mixture", Decimal(2), 1)
    values = torch.tensor([rewards], dtype=torch.float64)
    found = pair_distribution(values, torch.zeros_like(values), "reward-mixture", beta=2.0)
    by_policy = pair_distribution(torch.zeros_like(values), values / 2, "policy-mixture", beta=2.0)
    assert torch.allclose(found[0], torch.tensor([[float(w) for w in row] for row in joint]).double(), rtol=1e-5)
    assert torch.allclose(found, by_policy, rtol=1e-12)
    assert float(newton_rate(values, beta=2.0)) == pytest.approx(float(rate), rel=1e-12)
    top = 0.25 if rewards[1] == 41 else 0.5
    assert float(found.max()) == pytest.approx(top, rel=0.5) and float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize("sampler", ["reward-mixture", "policy-mixture"])
@pytest.mark.parametrize(("rewards", "rate"), [([0, 50, 60, 100], 0.5), ([0, 3, 41, 42], 0.25), ([0, 1, 2, 3], None)])
def test_updates_with_large_margins_are_those_of_exact_arithmetic(
    sampler: str, rewards: list[int], rate: float | None
) -> None:
    _, newton, gaps = by_decimals(rewards, sampler, Decimal(8), 8, None if rate is None else Decimal(rate))
    found = tabular_dpo(
        torch.tensor([rewards]), sampler, beta=8.0, learning_rate=float(newton) if rate is None else rate, num_updates=8
    )
    assert found[0].tolist() == pytest.approx([float(gap) for gap in gaps], rel=1e-6, abs=1e-24)
    assert found[0, -1] < found[0, 0]


def orders(num_actions: int, beta: float, num_updates: int = 40, **fit: float) -> list[float]:
    """Of uniform pairs and of both mixtures, over 20 seeds, at the rates of the command."""
    rewards = torch.cat([random_rewards(1, num_actions, seed).view(1, -1) for seed in range(20)])
    found = []
    for sampler in SAMPLERS:
        rate = newton_rate(torch.zeros_like(rewards) if sampler == "uniform" else rewards, beta=beta)
        gaps = tabular_dpo(rewards, sampler, beta=beta, learning_rate=rate, num_updates=num_updates)
        found.append(convergence_order(gaps, **fit))
    return found


@pytest.mark.parametrize(("num_actions", "beta"), [(20, 3.0), (20, 0.1), (100, 1.0), (100, 0.1), (5, 1.0), (20, 30.0)])
def test_uniform_pairs_converge_linearly_and_mixtures_quadratically(num_actions: int, beta: float) -> None:
    assert orders(num_actions, beta) == pytest.approx([1, 2, 2], abs=0.2)


def test_a_wider_fit_sees_the_approach_too() -> None:
    assert orders(20, 3.0) == pytest.approx([1.00, 1.98, 2.02], abs=0.01)
    assert orders(20, 3.0, floor=1e-11, num_last=40) == pytest.approx([0.99, 1.93, 2.09], abs=0.015)


def test_too_few_updates_have_no_order() -> None:
    assert all(math.isnan(order) for order in orders(20, 3.0, num_updates=2))


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
    late = torch.cat([torch.tensor([1.0, 0.05, 0.049, 0.048, 0.047]).double(), 0.04 * quadratic[:6]])
    assert convergence_order(late[None]) == pytest.approx(2, abs=0.05), "a standstill before it does not count"
    assert math.isnan(convergence_order(torch.ones(2, 10))), "nothing to fit is NaN"
    stuck = torch.ones(2, len(linear)).double()
    assert math.isnan(convergence_order(torch.cat([linear[None], stuck]))), "nor is one of three prompts enough"


@pytest.mark.parametrize(
    ("rewards", "more", "words"),
    [
        (torch.zeros(3), {}, r"shape \(P, A\)"),
        (torch.zeros(3, 1), {}, r"shape \(P, A\)"),
        (torch.full((2, 2), float("inf")), {}, "finite"),
        (torch.zeros(2, 2), {"learning_rate": float("inf")}, "must be finite; newton_rate"),
        (torch.zeros(2, 2), {"beta": 0.0}, "beta must be positive"),
        (torch.zeros(2, 2), {"sampler": "best"}, "no sampler 'best'"),
    ],
)
def test_what_cannot_be_is_said(rewards: torch.Tensor, more: dict, words: str) -> None:
    arguments = {"sampler": "uniform", "beta": 1.0, "learning_rate": 1.0, "num_updates": 1} | more
    with pytest.raises(ValueError, match=words):
        tabular_dpo(rewards, **arguments)
