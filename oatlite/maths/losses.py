"""Preference losses: log-probabilities of B chosen and B rejected responses in, B losses out.

A loss is a function of tensors alone: it knows no batch, no weights of pairs and no reduction. Those are the
learner's, which divides by the number of trainable pairs over all ranks.

In the formulas, c and r stand for the policy's log-probabilities of the chosen and the rejected response, c0 and r0
for the reference's, and h = (c - c0) - (r - r0) for the difference of log-ratios. A log-probability is **summed** over
a response's tokens unless a function says **averaged**. Implicit rewards are beta (c - c0) and beta (r - r0) where a
function says nothing else.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BNF_EPS = 1e-6


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
    """Direct preference optimization, arXiv 2305.18290, eq. 7: ``-log sigmoid(beta h)``.

    All four inputs are (B,). The implicit reward is eq. 5 without its partition function, which cancels.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _with_rewards(-F.logsigmoid(beta * (chosen - rejected)), beta, chosen, rejected)


def cdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> PairLosses:
    """Conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3), for labels that may be wrong.

    With e = ``label_smoothing``, the probability that a label is flipped:
    ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``. All four inputs are (B,).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return _with_rewards(losses, beta, chosen, rejected)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> PairLosses:
    """Identity preference optimization, arXiv 2310.12036, eq. 17: ``(h - 1 / (2 beta))^2``.

    All four inputs are (B,), **averaged** over a response's tokens as in oat and TRL; the paper, which has no
    sequences, leaves that open. The paper's tau is ``beta``.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _with_rewards(torch.square(chosen - rejected - 1 / (2 * beta)), beta, chosen, rejected)


def slic(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> PairLosses:
    """SLiC's hinge (arXiv 2305.10425) on normalized likelihoods, arXiv 2309.06657, eq. 11: ``max(0, 1 - beta h)``.

    All four inputs are (B,); ``1 / beta`` is the margin at which a pair no longer counts.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _with_rewards(torch.relu(1 - beta * (chosen - rejected)), beta, chosen, rejected)


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
    margins = beta * (policy_chosen - policy_rejected - gamma_beta_ratio)
    match loss_type:
        case "sigmoid":
            losses = -F.logsigmoid(margins)
        case "hinge":
            losses = torch.relu(1 - margins)
        case _:
            raise ValueError(f"loss_type is {loss_type!r}; it must be 'sigmoid' or 'hinge'")
    return _with_rewards(losses, beta, policy_chosen, policy_rejected)


def lr_dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    length_alpha: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> PairLosses:
    """Length-regularized DPO, arXiv 2403.19159, eq. 9: ``-log sigmoid(beta h + length_alpha (|chosen| - |rejected|))``.

    All tensors are (B,), lengths in tokens. The term stands outside beta: a chosen response that is longer already
    has part of its margin, and so is pushed less.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    lengths = length_alpha * (chosen_lengths - rejected_lengths)
    return _with_rewards(-F.logsigmoid(beta * (chosen - rejected) + lengths), beta, chosen, rejected)


def dpo_positive(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    positive_lambda: float,
) -> PairLosses:
    """DPO-Positive, arXiv 2402.13228, eq. 3: ``-log sigmoid(beta (h - positive_lambda max(0, c0 - c)))``.

    All four inputs are (B,). The penalty keeps the chosen response from becoming less likely than under the reference.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    margins = chosen - rejected - positive_lambda * torch.relu(-chosen)
    return _with_rewards(-F.logsigmoid(beta * margins), beta, chosen, rejected)


def dpo_sft(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    sft_weight: float,
    chosen_lengths: Tensor,
) -> PairLosses:
    """DPO with a supervised term, as in arXiv 2404.19733, eq. 1: ``-log sigmoid(beta h) - sft_weight c / |chosen|``.

    All tensors are (B,), ``chosen_lengths`` in tokens.
    """
    result = dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return result._replace(losses=result.losses - sft_weight * policy_chosen / chosen_lengths)


def xpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    alpha: float,
    chosen_is_reference: Tensor,
    rejected_is_reference: Tensor,
) -> PairLosses:
    """Exploratory preference optimization, arXiv 2405.21046, algorithm 1: ``-log sigmoid(beta h) + alpha s``.

    All tensors are (B,). s is the policy's log-probability of the response that the reference has sampled, marked by
    the two bool tensors: c or r, or nothing where neither was, or their sum. Lowering it is the optimism: the policy
    leaves what the reference finds likely unless preferences hold it there.
    """
    result = dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    sampled = policy_chosen * chosen_is_reference + policy_rejected * rejected_is_reference
    return result._replace(losses=result.losses + alpha * sampled)


def bnf(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    chosen_entropies: Tensor,
    rejected_entropies: Tensor,
    chosen_masks: Tensor,
    rejected_masks: Tensor,
) -> PairLosses:
    """Bidirectional negative feedback, arXiv 2410.04834; it has no hyper-parameter.

    All tensors are (B, T), the T of both sides may differ: log-probabilities of single tokens, entropies of the
    policy's distribution at them (in nats, over the whole vocabulary; no gradient need reach them), and masks that
    are 1 on a token and 0 on padding.

    Each token has a soft target: t = min(p / p0, 1) for the token, and the rest spread over the others in proportion
    to the policy, o = (1 - t) / (1 - p) times their probabilities (as in oat's code, 1e-6 is added
    to p0 and to both sides of the second fraction). A response's value S is the sum over its tokens of
    ``t log p + o * sum over other tokens v of p_v log p_v``, where t, o and the factors p_v are constants; the loss is
    ``-(S_chosen - S_rejected) / min(|chosen|, |rejected|)``. Where t = 1 that is the likelihood of the chosen response
    and, with its sign turned, of the rejected one; as p falls below p0 the gradient fades on both sides.

    Implicit rewards are summed log-ratios.
    """
    chosen = _soft_likelihood(policy_chosen, reference_chosen, chosen_entropies, chosen_masks)
    rejected = _soft_likelihood(policy_rejected, reference_rejected, rejected_entropies, rejected_masks)
    shorter = torch.minimum(chosen_masks.sum(dim=-1), rejected_masks.sum(dim=-1))
    chosen_ratios = ((policy_chosen - reference_chosen) * chosen_masks).sum(dim=-1)
    rejected_ratios = ((policy_rejected - reference_rejected) * rejected_masks).sum(dim=-1)
    return _with_rewards((rejected - chosen) / shorter, 1.0, chosen_ratios, rejected_ratios)


def _soft_likelihood(policy: Tensor, reference: Tensor, entropies: Tensor, masks: Tensor) -> Tensor:
    """The sum (B,) over tokens of the cross-entropy with BNF's target, sign turned."""
    probability = policy.detach().exp()
    target = (probability / (reference.detach().exp() + _BNF_EPS)).clamp(max=1.0)
    others = (1 - target + _BNF_EPS) / (1 - probability + _BNF_EPS)
    # The gradient of sum_v p_v log p_v, the p_v in front being constants, is zero, since probabilities add up to 1.
    # So the sum over the others is minus the entropy without the token's own part, and only that part has a gradient.
    log_others = -entropies.detach() - probability * policy
    return ((target * policy + others * log_others) * masks).sum(dim=-1)


def kto(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    policy_kl: Tensor,
    reference_kl: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PairLosses:
    """Kahneman-Tversky optimization, arXiv 2402.01306, eq. 8, on pairs: one desirable and one undesirable example.

    The first four inputs are (B,). ``policy_kl`` and ``reference_kl`` (K,) are log-probabilities of responses to other
    prompts, from whose difference the paper estimates its reference point
    ``z = max(0, mean(policy_kl - reference_kl))``, without a gradient. The loss of a pair is the mean of its examples':
    ``desirable_weight (1 - sigmoid(beta (c - c0) - beta z))`` and
    ``undesirable_weight (1 - sigmoid(beta z - beta (r - r0)))``.
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    origin = (policy_kl - reference_kl).mean().clamp(min=0).detach()
    desirable = desirable_weight * torch.sigmoid(-beta * (chosen - origin))
    undesirable = undesirable_weight * torch.sigmoid(-beta * (origin - rejected))
    return _with_rewards((desirable + undesirable) / 2, beta, chosen, rejected)


def kl(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    margins: Tensor,
) -> PairLosses:
    """KL(q || p) of the two verdicts that policy and oracle give: ``kl`` of RLHFlow's online pipeline, of no paper.

    q = sigmoid(beta h) is the policy's probability that the chosen response wins, p = sigmoid(margin) that of a
    Bradley-Terry oracle whose rewards differ by ``margins``. All inputs are (B,).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    logits = beta * (chosen - rejected)
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - F.logsigmoid(margins))
    loses = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - F.logsigmoid(-margins))
    return _with_rewards(wins + loses, beta, chosen, rejected)


def rev_kl(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    margins: Tensor,
) -> PairLosses:
    """The other direction of :func:`kl`, KL(p || q), up to the entropy of p, which has no gradient.

    ``-p log q - (1 - p) log(1 - q)``: DPO with the oracle's win probability as its label, the loss of the samplers
    paper's experiments (arXiv 2409.19605). All inputs are (B,).
    """
    chosen, rejected = _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    logits = beta * (chosen - rejected)
    losses = -torch.sigmoid(margins) * F.logsigmoid(logits) - torch.sigmoid(-margins) * F.logsigmoid(-logits)
    return _with_rewards(losses, beta, chosen, rejected)


def _log_ratios(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def _with_rewards(losses: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> PairLosses:
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())
