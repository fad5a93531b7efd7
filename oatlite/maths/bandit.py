"""Online DPO on a softmax policy over a table of actions, as exact arithmetic: no language model, no sampling noise.

The setting of "The Crucial Role of Samplers in Online Direct Preference Optimization" (arXiv 2409.19605, section 4):
P prompts with A actions each, rewards r, a policy pi = softmax(theta) that starts uniform and is its own reference,
and preferences P(i beats j) = sigmoid(r_i - r_j). What differs is the distribution that pairs are drawn from. Its
theorems: with exact gradients the error shrinks by a factor each update under uniform sampling, and is squared under
either mixture. All in float64; shape suffixes: P prompts, A actions, S samples.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Sampler = Literal["uniform", "reward-mixture", "policy-mixture"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)


def tabular_dpo(
    rewards: Tensor,
    sampler: Sampler,
    *,
    beta: float,
    learning_rate: float | Tensor,
    num_updates: int,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The gap between the policy's value and the optimum before each update, (P, num_updates) float64.

    Plain gradient descent from zero logits on the sum over prompts of the expected DPO loss, pairs being distributed
    by :func:`pair_distribution`; ``learning_rate`` is a number or one for each prompt (P,). The value of a policy is
    ``sum pi (r - beta log pi)``, which ``softmax(r / beta)`` maximizes; the gap is beta times the divergence from that.
    With ``num_samples`` the gradient is estimated from so many pairs and labels for each prompt, drawn with
    ``generator``, instead of the expectation. Raises ValueError for rewards or rates that are not finite, another
    shape than (P, A), or numbers that make no sense.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards must be finite and of shape (P, A) with A of 2 at least, not {tuple(rewards.shape)}")
    if not beta > 0 or num_updates < 0:
        raise ValueError(f"beta must be positive and num_updates not negative, not {beta} and {num_updates}")
    rewards = rewards.double()
    rates = torch.as_tensor(learning_rate, dtype=torch.float64, device=rewards.device).reshape(-1, 1)
    if not bool(rates.isfinite().all()):
        raise ValueError("the learning rate must be finite; newton_rate is not where rewards are over 700 apart")
    margins = differences(rewards)
    log_optimum = (rewards / beta).log_softmax(-1)
    logits = torch.zeros_like(rewards)
    gaps = torch.empty(len(rewards), num_updates, dtype=torch.float64, device=rewards.device)
    for update in range(num_updates):
        log_policy = logits.log_softmax(-1)
        gaps[:, update] = beta * _divergence(log_policy, log_optimum)
        weights = pair_distribution(rewards, log_policy, sampler, beta=beta)
        if num_samples is None:
            pull = weights * _sigmoid_difference(margins, beta * differences(logits))
        else:
            pull = _sampled_pull(weights, torch.sigmoid(margins), beta * differences(logits), num_samples, generator)
        # The loss of pair (i, j) pulls theta_i up and theta_j down by beta times what the label is above the model's.
        logits = logits + rates * beta * (pull.sum(-1) - pull.sum(-2))
    return gaps


def pair_distribution(rewards: Tensor, log_policy: Tensor, sampler: Sampler, *, beta: float) -> Tensor:
    """The probability of each ordered pair (P, A, A), pairs of an action with itself included.

    ``uniform``: all alike. The mixtures draw both uniformly, or one from ``softmax(v)`` and the other from
    ``softmax(-v)``, as often as the two terms of ``2 + e^D + e^-D`` weigh, to which the probability of a pair (i, j) is
    proportional. D is ``v_i - v_j``, and v the rewards (``reward-mixture``, algorithm DPO-Mix-R) or ``beta log pi``
    (``policy-mixture``, DPO-Mix-P). Nothing is differentiated through it.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r} ({', '.join(SAMPLERS)})")
    num_actions = rewards.shape[-1]
    if sampler == "uniform":
        return rewards.new_full((len(rewards), num_actions, num_actions), num_actions**-2.0, dtype=torch.float64)
    margins = differences(rewards if sampler == "reward-mixture" else beta * log_policy.detach())
    return _log_weights(margins).flatten(1).softmax(-1).view_as(margins)


def newton_rate(rewards: Tensor, *, beta: float) -> Tensor:
    """The learning rate (P,) at which a mixture's update removes the whole error to first order.

    With weights ``w = (2 + e^D + e^-D) / Z`` and ``2 + e^D + e^-D = 1 / sigmoid'(D)``, the gradient of theta_i is
    ``-2 beta A / Z`` times the centred error ``r_i - beta theta_i``, up to its square; so ``Z / (2 beta^2 A)``, with
    the Z of the optimum. Infinite where float64 has no such number: from margins of about 700 on.
    """
    log_normalizer = _log_weights(differences(rewards.double())).flatten(1).logsumexp(-1)
    return log_normalizer.exp() / (2 * beta**2 * rewards.shape[-1])


def convergence_order(gaps: Tensor, *, start: float = 0.1, floor: float = 1e-24, num_last: int = 3) -> float:
    """The order q in ``gap_next = c gap^q``, with a c for each prompt, by least squares over updates of gaps (P, T).

    1 is linear convergence, 2 quadratic. An order belongs to the end of convergence, and where that begins depends on
    the rewards and on beta: a policy far from the optimum can stand still for many updates at a value that is near it.
    So of each prompt the ``num_last`` updates count that come last before ``floor``, below which rounding rules, if
    they set out below ``start``; both are in units of the prompt's first gap. NaN where less than half of the prompts
    have two such updates.
    """
    above = below = 0.0
    num_fitted = 0
    for series in gaps / gaps[:, :1]:
        before, after = series[:-1], series[1:]
        counts = ((before < start) & (after > floor)).nonzero()[-num_last:, 0]
        if len(counts) >= 2:
            x, y = before[counts].log(), after[counts].log()
            x = x - x.mean()
            above += float((x * y).sum())
            below += float(x.square().sum())
            num_fitted += 1
    return above / below if below and 2 * num_fitted >= len(gaps) else float("nan")


def differences(values: Tensor) -> Tensor:
    """``v_i - v_j`` at (..., i, j) of ``values`` (..., A)."""
    return values[..., :, None] - values[..., None, :]


def _log_weights(margins: Tensor) -> Tensor:
    """``log(2 + e^D + e^-D)``, finite for every D."""
    return 2 * F.softplus(margins.abs()) - margins.abs()


def _sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """``sigmoid(a) - sigmoid(b)`` without cancellation: between large margins it is small, and its weight large."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return -torch.sigmoid(high) * torch.sigmoid(-low) * torch.expm1(low - high) * (a - b).sign()


def _divergence(log_policy: Tensor, log_other: Tensor) -> Tensor:
    """``KL(policy || other)`` of each prompt (P,), as a sum of ``other (e^d (d - 1) + 1)``, d the difference of logs.

    No term is negative, so small divergences keep their digits; near d = 0 by its series.
    """
    policy, other, d = log_policy.exp(), log_other.exp(), log_policy - log_other
    series = other * d.square() * (1 / 2 + d * (1 / 3 + d * (1 / 8 + d * (1 / 30 + d / 144))))
    return torch.where(d.abs() < 0.01, series, policy * d - policy + other).sum(-1)


def _sampled_pull(
    weights: Tensor, labels: Tensor, margins: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    """An unbiased estimate of ``weights * (labels - sigmoid(margins))`` from S drawn pairs and labels, (P, A, A)."""
    num_prompts, num_actions, _ = weights.shape
    drawn = torch.multinomial(weights.flatten(1), num_samples, replacement=True, generator=generator)
    chosen = torch.bernoulli(labels.flatten(1).gather(1, drawn), generator=generator)
    pulls = (chosen - torch.sigmoid(margins.flatten(1).gather(1, drawn))) / num_samples
    total = torch.zeros(num_prompts, num_actions**2, dtype=torch.float64).scatter_add(1, drawn, pulls)
    return total.view(num_prompts, num_actions, num_actions)
