"""The algorithms by name, and how a configuration becomes one."""

from __future__ import annotations

from pydantic import ValidationError

from oatlite.algorithms.base import Algorithm
from oatlite.algorithms.bnf import BNF
from oatlite.algorithms.cdpo import CDPO
from oatlite.algorithms.dpo import DPO
from oatlite.algorithms.dpo_positive import DPOPositive
from oatlite.algorithms.dpo_sft import DPOSFT
from oatlite.algorithms.ipo import IPO
from oatlite.algorithms.kl import KL
from oatlite.algorithms.kto import KTO
from oatlite.algorithms.lr_dpo import LRDPO
from oatlite.algorithms.rev_kl import RevKL
from oatlite.algorithms.simpo import SimPO
from oatlite.algorithms.slic import SLiC
from oatlite.algorithms.xpo import XPO
from oatlite.config.algorithms import AlgorithmConfig, CustomAlgorithmConfig
from oatlite.config.keys import nearest
from oatlite.errors import ConfigError
from oatlite.loading import load_callable

ALGORITHMS: dict[str, type[Algorithm]] = {
    "simpo": SimPO,
    "dpo": DPO,
    "cdpo": CDPO,
    "ipo": IPO,
    "slic": SLiC,
    "lr_dpo": LRDPO,
    "dpo_positive": DPOPositive,
    "dpo_sft": DPOSFT,
    "bnf": BNF,
    "kto": KTO,
    "kl": KL,
    "rev_kl": RevKL,
    "xpo": XPO,
}


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
        if first["type"] == "extra_forbidden":
            guess = nearest(key, cls.Options.model_fields)
            raise ConfigError(
                f"{config.name} has no option algorithm.options.{key}",
                f"did you mean algorithm.options.{guess}" if guess else "leave it out",
            ) from None
        raise ConfigError(f"algorithm.options.{key} of {config.name}: {first['msg']}") from None
