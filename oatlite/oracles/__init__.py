"""Oracles: what says which of two responses is better."""

from __future__ import annotations

from collections.abc import Sequence

from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config
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


def build_oracle(names: Sequence[str], config: Config, *, device: str) -> PreferenceOracle:
    """The oracle that ``names`` give, as ``config.oracle.path`` or ``config.eval.oracle`` does; models are loaded on
    ``device`` ("cpu", "cuda:0", ...).

    Several names are one oracle by the weighted sum of their rewards. Raises ConfigError when one cannot be had.
    """
    if not names:
        raise ConfigError("oracle.path names no oracle", "give a reward model, a folder or a hub id")
    oracles = [_build(name, config, device) for name in names]
    if len(oracles) == 1:
        return oracles[0]
    from oatlite.oracles.weighted import WeightedOracle

    return WeightedOracle(names, oracles, config.oracle.weights or [1.0] * len(names))


def _build(name: str, config: Config, device: str) -> PreferenceOracle:
    kind = kind_of(name)
    if kind == "function":
        from oatlite.oracles.function import load_function_oracle

        return load_function_oracle(name)
    if kind == "remote":
        from oatlite.oracles.remote import RemoteOracle

        return RemoteOracle(config.remote, deadline_s=config.timeouts.oracle_s)
    if kind == "judge":
        from oatlite.oracles.judge import JudgeOracle

        return JudgeOracle(config.judge, seed=config.run.seed, deadline_s=config.timeouts.oracle_s)
    return _load_model(name, config, device)


def _load_model(path: str, config: Config, device: str) -> PreferenceOracle:
    from oatlite.oracles.loading import is_pairrm, read_config

    options = config.oracle
    trusted = config.model.trust_remote_code
    if is_pairrm(read_config(path, trust_remote_code=trusted)):
        from oatlite.oracles.pairrm import PairRMOracle

        return PairRMOracle(
            path,
            max_tokens=options.max_tokens,
            batch_tokens=options.batch_tokens,
            dtype=options.dtype,
            device=device,
        )
    from oatlite.oracles.reward_model import RewardModelOracle

    return RewardModelOracle(
        path,
        chat_template=options.chat_template,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        dtype=options.dtype,
        device=device,
        trust_remote_code=trusted,
    )
