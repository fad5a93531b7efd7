"""Refusals of what was typed and nothing reads; a file may hold everything, as that of an earlier run does."""

from __future__ import annotations

from typing import Any

from oatlite.config.algorithms import ALGORITHM_CONFIGS
from oatlite.config.flags import to_type
from oatlite.config.layers import Layer, algorithm_of
from oatlite.config.schema import Config
from oatlite.errors import ConfigError

OFFLINE_UNREAD = (
    *("sampling.", "explore.", "oracle.", "remote.", "judge.", "sync.", "lora.sync"),
    "placement.gpus_per_actor",
    *("rollout.sync_every", "rollout.sampler", "rollout.policy_share", "rollout.asynchronous"),
    *("rollout.max_staleness", "rollout.strict_staleness"),
    *("learner.importance_cap", "placement.gpu_memory_utilization", "placement.sleep"),
    *("eval.gold_score", "eval.oracle", "eval.best_of_n", "eval.online", "eval.every_queries"),
)

ASYNC_ONLY = ("rollout.max_staleness", "rollout.strict_staleness")
HEAD_RULES = ("sea-bai", "sea-ee", "uncertainty", "passive")
EXPLORE_READ_BY: dict[str, tuple[str, ...]] = {
    **{f"explore.{name}": ("apl",) for name in ("entropy_share", "certainty_share")},
    **{f"explore.{name}": ("sea-ee",) for name in ("max_tries", "allow_second_best")},
    "explore.uncertainty": ("sea-bai", "uncertainty"),
    "explore.random_fallback": ("sea-bai", "sea-ee", "uncertainty"),
    **{
        f"explore.{name}": HEAD_RULES
        for name in (
            *("encoder", "head_only", "self_label_ratio", "burn_in", "members", "hidden_size", "lr", "weight_decay"),
            *("gradient_steps", "batch_size", "pull", "fixed_pull", "buffer_size", "learn_until"),
        )
    },
}
"""By option of ``[explore]``: the rules that read it; all others are read by every rule."""


def check_read_online(merged: Layer) -> None:
    """Refuse options that the rule of exploration, the sampler, or a run in turns does not read."""
    rule = _value(merged, "explore.rule", "none")
    sampler, is_async = _value(merged, "rollout.sampler", "policy"), _value(merged, "rollout.asynchronous", False)
    labels_itself = bool(_value(merged, "explore.self_label_ratio", 0))
    for key, given in merged.items():
        if not given.source.startswith("--"):
            continue
        if key.startswith("explore.") and key != "explore.rule" and rule == "none":
            raise ConfigError(f"{given.source} is for exploration, and there is none", "add --explore sea-bai")
        if key in EXPLORE_READ_BY and rule not in EXPLORE_READ_BY[key]:
            readers = " or ".join(EXPLORE_READ_BY[key])
            raise ConfigError(f"{given.source} is for --explore {readers}, and this is {rule}", "leave it out")
        if key in ASYNC_ONLY and not is_async:
            raise ConfigError(f"{given.source} is for --async", "add --async, or leave it out")
        if not labels_itself and (key == "explore.burn_in" or (key, rule) == ("explore.num_candidates", "passive")):
            ratio = to_type("explore.self_label_ratio", 0.3)
            raise ConfigError(
                f"{given.source} with --explore {rule} is for pairs that the head labels itself",
                f"add {ratio}, or leave it out",
            )
        if key == "sampling.mixture_weight" and sampler != "mixture" and algorithm_of(merged) in ALGORITHM_CONFIGS:
            raise ConfigError(f"{given.source} is for --sampler mixture, and this is {sampler}", "leave it out")
        if key == "rollout.policy_share" and sampler == "policy":
            raise ConfigError(
                f"{given.source} is for --sampler reference, hybrid or mixture, and this is policy", "leave it out"
            )


def _value(merged: Layer, key: str, default: Any) -> Any:
    return merged[key].value if key in merged else default


def check_read_oracles(merged: Layer, config: Config) -> None:
    """Refuse options of an oracle that is not asked, and one of two rhythms of evaluation."""
    names = (*config.oracle.path, *config.eval.oracle)
    for key, given in merged.items():
        section = key.partition(".")[0]
        if section in ("remote", "judge") and section not in names and given.source.startswith("--"):
            oracle = to_type("oracle.path", section)
            raise ConfigError(
                f"{given.source} is for {oracle}, and the oracle is {' and '.join(config.oracle.path) or 'another'}",
                f"add {oracle}, or leave it out",
            )
    every = [merged[key].source for key in ("eval.every", "eval.every_queries") if key in merged]
    if len(every) == 2 and all(source.startswith("--") for source in every):
        raise ConfigError(f"{every[0]} and {every[1]} both say when to evaluate", "leave one of them out")


def check_read_offline(merged: Layer) -> None:
    """Refuse options of rollouts in a run that has none."""
    for key, given in merged.items():
        if key.startswith(OFFLINE_UNREAD) and given.source.startswith("--"):
            raise ConfigError(f"{given.source} is for rollouts, and --offline has none", "leave it out")
