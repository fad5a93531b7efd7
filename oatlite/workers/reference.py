"""The reference policy at a learner rank, in device memory always or only while it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from oatlite.layouts import ForwardBatch
from oatlite.models import PairModel


class ReferenceModel:
    """A frozen model on ``device``. With ``is_offloaded`` its weights stay in host memory, and are copied to the device
    for as long as :meth:`at_hand` is open; nothing is copied back, since they never change."""

    def __init__(self, model: PairModel, device: torch.device, *, is_offloaded: bool) -> None:
        self._device = device
        self._model = model.eval().requires_grad_(False)
        self._hosted: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if not is_offloaded:
            model.to(device)
            return
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for parameter in model.parameters():
            host = parameter.data.to("cpu")
            self._hosted.append((parameter, host.pin_memory() if device.type == "cuda" else host))
        self._put_away()

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """Log-probabilities (N,) of ``batch.targets``."""
        result: torch.Tensor = self._model(batch)
        return result

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, the weights are on the device."""
        for parameter, host in self._hosted:
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter, host in self._hosted:
            parameter.data = host
