"""Whether an algorithm, an exploration and a sampler go together, asked before a process is spawned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from oatlite.config.flags import to_type
from oatlite.config.schema import Config
from oatlite.errors import ConfigError

if TYPE_CHECKING:
    from oatlite.algorithms.base import Algorithm


def check_algorithm(config: Config) -> None:
    """Refuse an algorithm, exploration and sampler that do not go together."""
    from oatlite.algorithms import build_algorithm
    from oatlite.samplers import sampling_plan

    algorithm = build_algorithm(config.algorithm)
    if config.explore.rule != "none":
        _check_exploring(config, algorithm)
    _check_sharded(config, sampling_plan(algorithm, config.rollout.sampler))
    if config.rollout.asynchronous and algorithm.needs.reference_scores:
        raise ConfigError(
            f"--algo {config.algorithm.name} asks the learner's reference before the oracle, and with --async the "
            "learner is at work then",
            f"type {to_type('rollout.asynchronous', False)}, or another --algo",
        )
    if config.rollout.offline and algorithm.needs.margins and config.data.margin_key is None:
        raise ConfigError(
            f"--algo {config.algorithm.name} learns from reward margins, which without an oracle the data must bring",
            f"type {to_type('data.margin_key', 'COLUMN')}, or another --algo",
        )


def _check_sharded(config: Config, samplers: Sequence[str]) -> None:
    """An engine whose model is in other processes samples from the policy alone."""
    others = set(samplers) - {"policy"}
    if config.placement.gpus_per_actor == 1 or config.rollout.offline or not others:
        return
    raise ConfigError(
        f"placement.gpus_per_actor = {config.placement.gpus_per_actor} cuts the policy up among processes, where the "
        f"actor cannot sample from {'the reference' if others == {'reference'} else 'mixtures'} too",
        f"type {to_type('placement.gpus_per_actor', 1)}",
    )


def _check_exploring(config: Config, algorithm: Algorithm) -> None:
    from oatlite.algorithms.base import Algorithm

    name, rule = config.algorithm.name, config.explore.rule
    if type(algorithm).select is not Algorithm.select:
        raise ConfigError(f"--explore {rule} chooses pairs, and --algo {name} chooses its own", "leave one of them out")
    if type(algorithm).sampling_plan is not Algorithm.sampling_plan and rule != "passive":
        raise ConfigError(
            f"--explore {rule} chooses among all candidates, and --algo {name} says itself where its two come from",
            "type --explore passive, or leave one of them out",
        )
    if rule == "apl" and config.rollout.sampler != "policy":
        raise ConfigError(
            f"--explore apl goes by the policy's own log-probabilities, and --sampler {config.rollout.sampler} samples "
            "others",
            "leave one of them out",
        )
    if rule == "apl" and (config.explore.head_only or config.explore.self_label_ratio):
        option, off = ("head_only", False) if config.explore.head_only else ("self_label_ratio", 0)
        raise ConfigError(
            f"explore.{option} is for the epistemic head, and --explore apl has none",
            f"type {to_type(f'explore.{option}', off)}, or --explore sea-ee",
        )
    if rule not in ("apl", "passive") and config.rollout.sampler in ("hybrid", "mixture"):
        raise ConfigError(
            f"--explore {rule} chooses among all candidates, and --sampler {config.rollout.sampler} wants one of each "
            "of two samplers",
            "type --explore passive, or --sampler policy",
        )
    if config.explore.head_only and config.explore.self_label_ratio:
        raise ConfigError(
            "explore.head_only trains no policy, which alone learns from pairs that the head labels itself",
            f"type {to_type('explore.self_label_ratio', 0)}, or {to_type('explore.head_only', False)}",
        )
    if config.explore.head_only and config.eval.prompts and config.eval.best_of_n == 1:
        raise ConfigError(
            "explore.head_only leaves the policy as it is, and its greedy answers do not change",
            f"add {to_type('eval.best_of_n', 10)}, which the head picks by",
        )
    if config.explore.self_label_ratio and algorithm.needs.margins:
        raise ConfigError(
            f"explore.self_label_ratio = {config.explore.self_label_ratio:g}, and --algo {name} learns from reward "
            "margins, which only the oracle gives",
            f"type {to_type('explore.self_label_ratio', 0)}, or another --algo",
        )
