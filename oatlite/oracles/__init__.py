"""Oracles: what says which of two responses is better."""

from __future__ import annotations

from collections.abc import Callable

from oatlite.config.schema import OracleConfig
from oatlite.errors import ConfigError
from oatlite.oracles.base import PreferenceOracle, RewardOracle, Verdicts, checked, draw_verdicts, trainable_pairs

__all__ = [
    "PreferenceOracle",
    "RewardOracle",
    "Verdicts",
    "build_oracle",
    "checked",
    "draw_verdicts",
    "trainable_pairs",
]


def build_oracle(config: OracleConfig, *, device: str) -> PreferenceOracle:
    """The oracle that ``config`` describes, loaded on ``device`` ("cpu", "cuda:0", ...).

    Raises ConfigError when it cannot be loaded.
    """
    return BUILDERS[type(config)](config, device)


def _reward_model(config: OracleConfig, device: str) -> PreferenceOracle:
    from oatlite.oracles.reward_model import RewardModelOracle

    if config.path is None:
        raise ConfigError("oracle.path names no reward model", "give a folder or a hub id")
    return RewardModelOracle(
        config.path,
        chat_template=config.chat_template,
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
        dtype=config.dtype,
        device=device,
    )


# One entry per section of the schema that describes an oracle.
BUILDERS: dict[type[OracleConfig], Callable[[OracleConfig, str], PreferenceOracle]] = {OracleConfig: _reward_model}
