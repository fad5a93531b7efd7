"""How evenly the routers of a mixture of experts spread their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def load_balancing_loss(router_logits: Sequence[torch.Tensor], top_k: int, is_token: torch.Tensor) -> torch.Tensor:
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) for the ``top_k`` experts of each
    token: E times the sum over experts of (assignments per token) x (mean router probability), a scalar.

    ``router_logits`` holds (T, E) for each layer with experts, whose tokens count together; ``is_token`` (T,) says
    which of them are no padding. It is ``top_k`` for routers that are indifferent, and larger where they prefer some.
    """
    kept = torch.cat([logits[is_token.flatten()] for logits in router_logits]).float()
    num_experts = kept.shape[-1]
    probabilities = kept.softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    assignments = torch.nn.functional.one_hot(chosen, num_experts).sum(-2).float().mean(0)
    return num_experts * (assignments * probabilities.mean(0)).sum()
