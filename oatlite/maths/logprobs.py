"""Log-probabilities of given tokens, without ever holding the logits of a whole batch.

The logits of a batch are its largest tensor by far (16k tokens of a 150k vocabulary: 9 GiB in float32, three times
that in a backward pass). Here they exist for ``chunk`` tokens at a time, and the backward pass computes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

RATIO_BOUNDS = (0.9, 1.1)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int = 1024,
) -> Tensor:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``.

    ``hidden`` (T, D), ``weight`` (V, D), ``bias`` (V,) or None, ``targets`` (T,) integers in [0, V). Returns (T,) in
    float32, or float64 for float64 inputs: logits are multiplied in the inputs' dtype, as a language-model head does,
    and normalized in at least float32. Gradients reach hidden, weight and bias, each only where it is asked for;
    the weight's is accumulated over the chunks in the dtype of the result. There is no second derivative.

    Memory beyond inputs, result and gradients: about 3 * ``chunk`` * V numbers of the result's dtype.

    Raises ValueError on shapes that do not agree and on a chunk below 1.
    """
    logprobs, _ = _checked(hidden, weight, bias, targets, chunk, with_entropies=False)
    return logprobs


def token_logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """As :func:`token_logprobs`, and the entropy (T,) in nats of each of these distributions, without gradient."""
    return _checked(hidden, weight, bias, targets, chunk, with_entropies=True)


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, *, with_entropies: bool
) -> tuple[Tensor, Tensor]:
    num_tokens = hidden.shape[0]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not (T, D) and (V, D)")
    if targets.shape != (num_tokens,):
        raise ValueError(f"targets {tuple(targets.shape)} is not ({num_tokens},)")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)} is not ({weight.shape[0]},)")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    return _TokenLogprobs.apply(hidden, weight, bias, targets, chunk, with_entropies)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the (T,) log-normalizers for the backward pass, and nothing of size V."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        targets = targets.long()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        normalizers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if with_entropies else logprobs.new_empty(0)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = F.linear(hidden[rows], weight, bias).to(dtype)
            normalizers[rows] = logits.logsumexp(dim=-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - normalizers[rows]
            if with_entropies:
                entropies[rows] = normalizers[rows] - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = normalizers.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: many small bfloat16 additions would lose the late chunks.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            logits = F.linear(hidden[rows], weight, bias).to(dtype)
            # d logprob / d logits = one_hot(target) - softmax
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad[rows, None])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )


def _chunks(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def truncated_importance(log_ratios: Tensor, cap: float) -> Tensor:
    """Weights ``min(exp(log_ratios), cap)`` (B,) of samples, from the log-probability (B,) of each under the policy
    that it is to stand for minus that under the one that drew it.

    Ionides, "Truncated Importance Sampling" (2008): the cap bounds the variance, at the price of a bias.
    """
    return log_ratios.exp().clamp(max=cap)


def mismatch(learner: Tensor, sampler: Tensor) -> dict[str, float]:
    """How far the learner's log-probabilities of sampled tokens are from the sampler's, both (T,).

    Returns sums and counts, so that ranks and micro-batches can be put together: ``num_tokens``,
    ``abs_difference_sum`` and ``num_outside`` (tokens whose ratio ``exp(learner - sampler)`` is outside
    [0.9, 1.1]; a difference that is not a number counts as outside) are added, ``abs_difference_max`` is maximized.
    Mean and share are the sums over ``num_tokens``.
    """
    low, high = RATIO_BOUNDS
    difference = learner.detach().double() - sampler.detach().double()
    ratio = difference.exp()
    num_inside = ((ratio >= low) & (ratio <= high)).sum()
    return {
        "num_tokens": difference.numel(),
        "abs_difference_sum": difference.abs().sum().item(),
        "abs_difference_max": difference.abs().max().item() if difference.numel() else 0.0,
        "num_outside": difference.numel() - int(num_inside),
    }
