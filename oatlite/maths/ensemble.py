"""The epistemic reward head: an ensemble of small networks over frozen features of a prompt with a response.

Each member is pulled toward its own random initialization, the less the more comparisons have been seen; members agree
where data has spoken and differ elsewhere, which makes one of them a posterior sample (Lu and Van Roy, arXiv
1705.07347; as in SEA, arXiv 2411.01493, section 4.2). Shape suffixes: E members, B pairs, D features.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EpistemicHead(nn.Module):
    """E networks with two hidden layers of ReLU as one tensor program.

    Equal ``seed`` gives equal weights: of a normal distribution cut at two deviations of 1 / (2 sqrt(inputs)), and
    biases of zero. The initialization is kept, and saved with the weights.
    """

    def __init__(self, num_features: int, *, num_members: int = 20, hidden_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (num_features, hidden_size, hidden_size, 1)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            weight = torch.empty(num_members, before, after)
            deviation = 1 / (2 * math.sqrt(before))
            nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(num_members, 1, after)))
        for i, parameter in enumerate([*self.weights, *self.biases]):
            self.register_buffer(f"initial_{i}", parameter.detach().clone())

    @property
    def num_members(self) -> int:
        return len(self.weights[0])

    def forward(self, features: Tensor) -> Tensor:
        """Rewards (E, ...) of ``features`` (..., D)."""
        hidden = features.reshape(1, -1, features.shape[-1]).expand(self.num_members, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if i < len(self.weights) - 1:
                hidden = F.relu(hidden)
        return hidden.reshape(self.num_members, *features.shape[:-1])

    def regularization(self) -> Tensor:
        """The mean squared distance of all parameters from where they began, a scalar."""
        parameters = [*self.weights, *self.biases]
        initial = [self.get_buffer(f"initial_{i}") for i in range(len(parameters))]
        total = sum(F.mse_loss(now, then, reduction="sum") for now, then in zip(parameters, initial, strict=True))
        return total / sum(parameter.numel() for parameter in parameters)


def head_loss(head: EpistemicHead, chosen: Tensor, rejected: Tensor, *, pull: float) -> Tensor:
    """Bradley-Terry over members and pairs, and ``pull`` times the distance from the initialization; a scalar.

    ``chosen`` and ``rejected`` are features (B, D). The pull of SEA is ``lambda B / n`` with n comparisons seen so far.
    """
    margins = head(chosen) - head(rejected)  # (E, B)
    return -F.logsigmoid(margins).mean() + pull * head.regularization()
