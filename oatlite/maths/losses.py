"""Preference losses: log-probabilities of B chosen and B rejected responses in, B losses out.

A loss is a function of tensors alone: it knows no batch, no weights of pairs and no reduction. Those are the
learner's, which divides by the number of trainable pairs over all ranks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class PairLosses(NamedTuple):
    """What a preference loss returns: three (B,) tensors.

    ``losses`` carries the gradient. ``chosen_rewards`` and ``rejected_rewards`` are the implicit rewards, for
    metrics only, and are detached; a pair is ranked correctly where the first is greater than the second.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> PairLosses:
    """Direct preference optimization, arXiv 2305.18290, eq. 7.

    All four inputs are (B,): log-probabilities of a response **summed** over its tokens.
    ``losses = -log sigmoid(chosen_rewards - rejected_rewards)`` with the implicit reward
    ``beta * (log policy - log reference)`` (eq. 5 without its partition function, which cancels).
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
) -> PairLosses:
    """Simple preference optimization, arXiv 2405.14734, eq. 6; it needs no reference model.

    Both inputs are (B,): log-probabilities of a response **averaged** over its tokens. The implicit reward is
    ``beta`` times that average, and the target margin is ``gamma = beta * gamma_beta_ratio``. With the reward
    difference d, ``sigmoid`` is ``-log sigmoid(d - gamma)`` and ``hinge`` is ``max(0, 1 - (d - gamma))``.

    Raises ValueError on another ``loss_type``.
    """
    chosen_rewards = beta * policy_chosen
    rejected_rewards = beta * policy_rejected
    margins = chosen_rewards - rejected_rewards - beta * gamma_beta_ratio
    match loss_type:
        case "sigmoid":
            losses = -F.logsigmoid(margins)
        case "hinge":
            losses = torch.relu(1 - margins)
        case _:
            raise ValueError(f"loss_type is {loss_type!r}; it must be 'sigmoid' or 'hinge'")
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())
