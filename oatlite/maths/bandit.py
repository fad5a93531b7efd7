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
from torch import Tensor

Sampler = Literal["uniform", "reward-mixture", "policy-mixture"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
MAX_WEIGHT_EXPONENT = 40.0  # e^40 of one pair against another's 1 leaves that other without weight in float64


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
    ``sum pi (r - beta log pi)``, which ``softmax(r / beta)`` maximizes. With ``num_samples`` the gradient is estimated
    from so many pairs and labels for each prompt, drawn with ``generator``, instead of the expectation. Raises
    ValueError for rewards that are no finite (P, A), or numbers that make no sense.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards must be finite and of shape (P, A) with A of 2 at least, not {tuple(rewards.shape)}")
    if not beta > 0 or num_updates < 0:
        raise ValueError(f"beta must be positive and num_updates not negative, not {beta} and {num_updates}")
    rewards = rewards.double()
    rates = torch.as_tensor(learning_rate, dtype=torch.float64).reshape(-1, 1)
    labels = torch.sigmoid(differences(rewards))
    optimum = value(rewards, (rewards / beta).log_softmax(-1), beta)
    logits = torch.zeros_like(rewards)
    gaps = torch.empty(len(rewards), num_updates, dtype=torch.float64)
    for update in range(num_updates):
        log_policy = logits.log_softmax(-1)
        gaps[:, update] = optimum - value(rewards, log_policy, beta)
        weights = pair_distribution(rewards, log_policy, sampler, beta=beta)
        if num_samples is None:
            pull = weights * (labels - torch.sigmoid(beta * differences(logits)))
        else:
            pull = _sampled_pull(weights, labels, beta * differences(logits), num_samples, generator)
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
        return torch.full((len(rewards), num_actions, num_actions), num_actions**-2.0, dtype=torch.float64)
    margins = differences(rewards if sampler == "reward-mixture" else beta * log_policy.detach())
    margins = margins.clamp(-MAX_WEIGHT_EXPONENT, MAX_WEIGHT_EXPONENT)
    weights = 2 + margins.exp() + (-margins).exp()
    return weights / weights.sum((-2, -1), keepdim=True)


def newton_rate(rewards: Tensor, *, beta: float) -> Tensor:
    """The learning rate (P,) at which a mixture's update removes the whole error to first order.

    With weights ``w = (2 + e^D + e^-D) / Z`` and ``2 + e^D + e^-D = 1 / sigmoid'(D)``, the gradient of theta_i is
    ``-2 beta A / Z`` times the centred error ``r_i - beta theta_i``, up to its square; so ``Z / (2 beta^2 A)``, with
    the Z of the optimum.
    """
    margins = differences(rewards.double()).clamp(-MAX_WEIGHT_EXPONENT, MAX_WEIGHT_EXPONENT)
    return (2 + margins.exp() + (-margins).exp()).sum((-2, -1)) / (2 * beta**2 * rewards.shape[-1])


def convergence_order(gaps: Tensor, *, floor: float = 1e-12) -> float:
    """The order q in ``gap_next = c gap^q``, with a c for each prompt, by least squares over updates of gaps (P, T).

    Updates count from a gap below a tenth of the first on, where the asymptotic rate begins to show, down to ``floor``,
    below which rounding rules. 1 is linear convergence, 2 quadratic. NaN where no prompt has two such updates.
    """
    above = below = 0.0
    for before, after in zip(gaps[:, :-1], gaps[:, 1:], strict=True):
        counts = (before < 0.1 * before[0]) & (after > floor)
        if int(counts.sum()) >= 2:
            x, y = before[counts].log(), after[counts].log()
            x = x - x.mean()
            above += float((x * y).sum())
            below += float(x.square().sum())
    return above / below if below else float("nan")


def value(rewards: Tensor, log_policy: Tensor, beta: float) -> Tensor:
    """``sum pi (r - beta log pi)`` of each prompt, (P,)."""
    return (log_policy.exp() * (rewards - beta * log_policy)).sum(-1)


def differences(values: Tensor) -> Tensor:
    """``v_i - v_j`` at (..., i, j) of ``values`` (..., A)."""
    return values[..., :, None] - values[..., None, :]


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
