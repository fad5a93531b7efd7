"""Stands in for a slow learner: SimPO whose loss sleeps, once per micro-batch."""

import time
from typing import Any

from oatlite.algorithms.base import Options
from oatlite.algorithms.simpo import SimPO
from oatlite.config.algorithms import SimPOConfig
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class Sleep(Options):
    seconds: float


class SleepingSimPO(SimPO):
    Options = Sleep

    def __init__(self, options: Any) -> None:
        super().__init__(SimPOConfig())
        self._seconds = options.seconds

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        time.sleep(self._seconds)
        return super().loss(policy, reference, batch)
