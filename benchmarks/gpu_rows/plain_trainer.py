"""Stands for :class:`oatlite.trainer.Trainer` where DeepSpeed is missing: torch's AdamW on a float32 copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from oatlite.trainer import OptimizerOptions, StepResult


class PlainTrainer:
    """One rank. As under ZeRO with bfloat16, weights and the sum of gradients are kept in float32 beside the network's
    own."""

    gathers_weights = False

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        self._model = model
        self._options = options
        self._names = dict(model.named_parameters())
        self._masters = [parameter.detach().float().clone() for parameter in self._names.values()]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        on_gpu = self._masters[0].is_cuda
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=on_gpu,
        )

    def forward(self, batch: Any) -> Any:
        return self._model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        for master, parameter in zip(self._masters, self._names.values(), strict=True):
            if parameter.grad is not None:
                assert master.grad is not None
                master.grad += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> StepResult:
        norm = nn.utils.clip_grad_norm_(self._masters, self._options.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        for master, parameter in zip(self._masters, self._names.values(), strict=True):
            parameter.copy_(master)
        return StepResult(lr=self._options.lr, grad_norm=float(norm))

    def add_up(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def maximum(self, value: float) -> float:
        return value

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]

    @contextmanager
    def whole_parameters(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: self._names[name].data

    def close(self) -> None:
        """Nothing is held."""
