"""The algorithms by name, and how a configuration becomes one."""

from __future__ import annotations

from pydantic import ValidationError

from oatlite.algorithms.base import Algorithm
from oatlite.algorithms.dpo import DPO
from oatlite.algorithms.simpo import SimPO
from oatlite.config.schema import AlgorithmConfig, CustomAlgorithmConfig
from oatlite.errors import ConfigError
from oatlite.loading import load_callable

ALGORITHMS: dict[str, type[Algorithm]] = {"simpo": SimPO, "dpo": DPO}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Raises ConfigError where a user's own class cannot be loaded or refuses its options."""
    if not isinstance(config, CustomAlgorithmConfig):
        return ALGORITHMS[config.name](config)
    cls = load_callable(config.name)
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise ConfigError(
            f"--algo {config.name} is not an Algorithm", "derive it from oatlite.algorithms.base.Algorithm"
        )
    try:
        return cls(cls.Options(**config.options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"algorithm.options.{key} of {config.name}: {first['msg']}") from None
