"""An algorithm that samples from everything there is."""

from __future__ import annotations

from collections.abc import Sequence

from oatlite.algorithms.simpo import SimPO
from oatlite.config.algorithms import SimPOConfig
from oatlite.samplers import SAMPLERS


class Everything(SimPO):
    Options = SimPOConfig

    def sampling_plan(self) -> Sequence[str]:
        return SAMPLERS
