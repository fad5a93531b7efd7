"""Several reward oracles as one: the weighted sum of their rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oatlite.errors import ConfigError
from oatlite.oracles.base import Floats, PreferenceOracle, RewardOracle, checked_scores


class WeightedOracle(RewardOracle):
    """A response that one of them cannot score cannot be scored.

    Raises ConfigError for an oracle that only compares.
    """

    def __init__(self, names: Sequence[str], oracles: Sequence[PreferenceOracle], weights: Sequence[float]) -> None:
        self.needs_references = any(oracle.needs_references for oracle in oracles)
        self._parts: list[tuple[RewardOracle, float]] = []
        for name, oracle, weight in zip(names, oracles, weights, strict=True):
            if not isinstance(oracle, RewardOracle):
                raise ConfigError(
                    f"the oracle {name} only compares, and rewards are what can be added", "give it alone"
                )
            self._parts.append((oracle, weight))

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> Floats:
        """See :meth:`RewardOracle.score`."""
        total = np.zeros(len(prompts), np.float64)
        for oracle, weight in self._parts:
            total += weight * checked_scores(oracle.score(prompts, responses, references), len(prompts))
        return total.astype(np.float32)

    @property
    def num_failures(self) -> int:
        """See :attr:`PreferenceOracle.num_failures`."""
        return sum(oracle.num_failures for oracle, _ in self._parts)

    def close(self) -> None:
        """See :meth:`PreferenceOracle.close`."""
        for oracle, _ in self._parts:
            oracle.close()
