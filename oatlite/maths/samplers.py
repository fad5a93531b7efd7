"""Distributions to sample responses from, made of a policy's and a reference's."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed_logprobs(policy: Tensor, reference: Tensor, coefficients: Tensor) -> Tensor:
    """Log-probabilities (..., V) of the mixture whose logits are ``a log pi + b log pi_ref``.

    ``policy`` and ``reference`` (..., V) are logits, normalized or not, and ``coefficients`` (..., 2) hold a and b
    (arXiv 2409.19605). Computed in float32 at least. A temperature comes after this.
    """
    kind = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    a, b = coefficients.to(kind).unbind(-1)
    mixed = a[..., None] * policy.to(kind).log_softmax(-1) + b[..., None] * reference.to(kind).log_softmax(-1)
    return mixed.log_softmax(-1)
