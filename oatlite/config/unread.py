"""Refusals of what was typed and nothing reads; a file may hold everything, as that of an earlier run does."""

from __future__ import annotations

from oatlite.config.algorithms import ALGORITHM_CONFIGS
from oatlite.config.layers import Layer, algorithm_of
from oatlite.errors import ConfigError

OFFLINE_UNREAD = (
    *("sampling.", "explore.", "oracle.", "remote.", "judge.", "sync.", "lora.sync"),
    *("rollout.sync_every", "rollout.sampler", "rollout.asynchronous", "rollout.max_staleness"),
    *("rollout.strict_staleness", "learner.importance_cap"),
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
    rule, sampler, is_async = (
        merged[key].value if key in merged else none
        for key, none in (("explore.rule", "none"), ("rollout.sampler", "policy"), ("rollout.asynchronous", False))
    )
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
        if key == "sampling.mixture_weight" and sampler != "mixture" and algorithm_of(merged) in ALGORITHM_CONFIGS:
            raise ConfigError(f"{given.source} is for --sampler mixture, and this is {sampler}", "leave it out")


def check_read_offline(merged: Layer) -> None:
    """Refuse options of rollouts in a run that has none."""
    for key, given in merged.items():
        if key.startswith(OFFLINE_UNREAD) and given.source.startswith("--"):
            raise ConfigError(f"{given.source} is for rollouts, and --offline has none", "leave it out")
