"""The gold score: what the task itself says of a response, logged beside the oracle and never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable

from oatlite.errors import ConfigError

GoldScore = Callable[[str, str], float]


def checked_gold(name: str, score: Callable[[str, str], object]) -> GoldScore:
    """``score(prompt, response)``, refusing what is no finite number. Raises ConfigError at the first bad answer."""

    def gold(prompt: str, response: str) -> float:
        value = score(prompt, response)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"eval.gold_score {name} returned {value!r}, not a finite number")
        return float(value)

    return gold
