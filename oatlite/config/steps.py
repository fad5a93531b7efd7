"""How many steps a resolved run has, how many pairs and gradient steps each of them, and which policy it leaves."""

from __future__ import annotations

import math

from oatlite.config.schema import Config


def num_steps(config: Config) -> int | None:
    """Steps of a resolved run, as far as the configuration bounds them; ``None`` where only the data can tell."""
    bounds: list[int | None] = []
    if config.data.max_prompts is not None:
        bounds.append(config.data.max_prompts // config.rollout.prompts_per_step * config.data.epochs)
    if config.data.max_queries is not None:
        bounds.append(steps_to_ask(config, config.data.max_queries))
    return min((bound for bound in bounds if bound is not None), default=None)


def steps_to_ask(config: Config, num_queries: int) -> int | None:
    """Steps in which ``num_queries`` are made, where none is saved; ``None`` where they never are, because the head
    comes to label all pairs itself."""
    burn_in = config.explore.burn_in if _labels_itself(config) else 0
    early, late = (queries_of_step(config, step) for step in (1, burn_in + 1))
    if num_queries <= burn_in * early:
        return -(-num_queries // early)
    return burn_in + -(-(num_queries - burn_in * early) // late) if late else None


def queries_until(config: Config, num_steps: int) -> int:
    """The most queries of the first ``num_steps`` steps together."""
    burn_in = min(config.explore.burn_in, num_steps) if _labels_itself(config) else 0
    late = queries_of_step(config, burn_in + 1)
    return burn_in * queries_of_step(config, 1) + (num_steps - burn_in) * late


def sync_past_epoch(config: Config, num_prompts: int) -> str | None:
    """A warning where an epoch over ``num_prompts`` ends between two syncs, and a later one is reached: who means an
    iteration per epoch then has another."""
    steps, every = num_prompts // config.rollout.prompts_per_step, config.rollout.sync_every
    if config.rollout.offline or not steps < every <= steps * config.data.epochs:
        return None
    return (
        f"an epoch has {steps} steps of {config.rollout.prompts_per_step} prompts, and actors get new weights every "
        f"{every} (--sync-every {steps} syncs after each epoch)"
    )


def newest_version(config: Config, step: int) -> int:
    """The version of the policy after ``step``: the last step that changed it, and none does where only the head
    learns."""
    return 0 if config.explore.head_only else step


def is_followed_by_sync(config: Config, step: int) -> bool:
    """Whether the actors get another policy after ``step``."""
    return step % config.rollout.sync_every == 0 and newest_version(config, step) == step


def gradient_steps(config: Config, step: int, *, passes: int | None = None) -> int:
    """Gradient steps that ``step`` (from 1) of a resolved run takes where no pair is left out.

    ``passes`` (default: those of the configuration) over all pairs in the buffer, of which there are more with each
    step until it is full or cleared.
    """
    learner, per_step = config.learner, config.rollout.prompts_per_step
    if config.explore.head_only:
        return 0
    assert learner.batch_size is not None and learner.buffer_size is not None, "resolved first"
    since_cleared = (step - 1) % learner.buffer_clear_every + 1 if learner.buffer_clear_every is not None else step
    held_steps = min(since_cleared, learner.buffer_size // per_step)
    count = (
        held_steps * -(-pairs_of_step(config) // learner.batch_size) * (learner.passes if passes is None else passes)
    )
    return min(count, learner.max_gradient_steps or count)


def pairs_of_step(config: Config) -> int:
    """Pairs to train on that a step brings: one for each prompt, or for a share of them."""
    return sum(_pairs_of(config, part) for part in _parts(config, config.rollout.prompts_per_step))


def queries_of_step(config: Config, step: int) -> int:
    """Pairs that the oracle is asked about in ``step`` (from 1), at most: without those that the head labels itself."""
    return queries_of_prompts(config, config.rollout.prompts_per_step, step)


def queries_of_prompts(config: Config, num_prompts: int, step: int) -> int:
    """The same, all ranks together, where the step has ``num_prompts``."""
    parts = _parts(config, num_prompts)
    return sum(_pairs_of(config, part) - self_labelled_of(config, part, step) for part in parts)


def candidates_of(config: Config) -> int | None:
    """How many responses of each prompt exploration chooses from; None where the algorithm says. Passive takes the
    first two, and looks at others where the head labels pairs itself."""
    if config.explore.rule == "none":
        return None
    return 2 if config.explore.rule == "passive" and not _labels_itself(config) else config.explore.num_candidates


def self_labelled_of(config: Config, num_prompts: int, step: int) -> int:
    """Of a rank's ``num_prompts`` in ``step``, those whose pairs the head labels itself: none in the burn-in, and a
    share then, rounded down."""
    if not _labels_itself(config) or step <= config.explore.burn_in:
        return 0
    return math.floor(config.explore.self_label_ratio * num_prompts + 1e-9)


def _labels_itself(config: Config) -> bool:
    return config.explore.rule not in ("none", "apl") and config.explore.self_label_ratio > 0


def _parts(config: Config, num_prompts: int) -> list[int]:
    """Prompts of each rank, where a step has ``num_prompts``."""
    ranks = config.placement.learners or 1
    return [num_prompts * (rank + 1) // ranks - num_prompts * rank // ranks for rank in range(ranks)]


def _pairs_of(config: Config, num_prompts: int) -> int:
    """Pairs that a rank's ``num_prompts`` give."""
    explore = config.explore
    if explore.rule != "apl":
        return num_prompts
    return share_of(explore.certainty_share, share_of(explore.entropy_share, num_prompts))


def share_of(share: float, count: int) -> int:
    """``share`` of ``count``, rounded up."""
    return math.ceil(share * count - 1e-9)


def prompts_within(config: Config, num_queries: int, step: int) -> int:
    """The most prompts of ``step``, one at least, that ask for no more than ``num_queries`` pairs."""
    counts = range(config.rollout.prompts_per_step, 0, -1)
    return next((count for count in counts if queries_of_prompts(config, count, step) <= num_queries), 1)
