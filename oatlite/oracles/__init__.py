"""Oracles: what says which of two responses is better."""

from __future__ import annotations

from oatlite.config.schema import OracleConfig
from oatlite.errors import ConfigError
from oatlite.oracles.base import PreferenceOracle, RewardOracle, Verdicts, checked, draw_verdicts, trainable_pairs
from oatlite.oracles.loading import is_pairrm, read_config

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
    if config.path is None:
        raise ConfigError("oracle.path names no reward model", "give a folder or a hub id")
    if is_pairrm(read_config(config.path)):
        from oatlite.oracles.pairrm import PairRMOracle

        return PairRMOracle(
            config.path,
            max_tokens=config.max_tokens,
            batch_tokens=config.batch_tokens,
            dtype=config.dtype,
            device=device,
        )
    from oatlite.oracles.reward_model import RewardModelOracle

    return RewardModelOracle(
        config.path,
        chat_template=config.chat_template,
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
        dtype=config.dtype,
        device=device,
    )
