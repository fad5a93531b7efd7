"""How many steps a resolved run has, and how many pairs and gradient steps each of them."""

from __future__ import annotations

import math

from oatlite.config.schema import Config


def num_steps(config: Config) -> int | None:
    """Steps of a resolved run, as far as the configuration bounds them; ``None`` where only the data can tell."""
    bounds = []
    if config.data.max_prompts is not None:
        bounds.append(config.data.max_prompts // config.rollout.prompts_per_step * config.data.epochs)
    if config.data.max_queries is not None:
        bounds.append(math.ceil(config.data.max_queries / pairs_of_step(config)))
    return min(bounds, default=None)


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
    """Pairs that the oracle is asked about in a step: one for each prompt, or for a share of them."""
    return pairs_of_prompts(config, config.rollout.prompts_per_step)


def pairs_of_prompts(config: Config, num_prompts: int) -> int:
    """Pairs that the oracle is asked about, all ranks together, where a step has ``num_prompts``."""
    explore, ranks = config.explore, config.placement.learners or 1
    if explore.rule != "apl":
        return num_prompts
    parts = [num_prompts * (rank + 1) // ranks - num_prompts * rank // ranks for rank in range(ranks)]
    return sum(share_of(explore.certainty_share, share_of(explore.entropy_share, part)) for part in parts)


def share_of(share: float, count: int) -> int:
    """``share`` of ``count``, rounded up."""
    return math.ceil(share * count - 1e-9)


def prompts_within(config: Config, num_queries: int) -> int:
    """The most prompts of a step, one at least, that ask for no more than ``num_queries`` pairs."""
    counts = range(config.rollout.prompts_per_step, 0, -1)
    return next((count for count in counts if pairs_of_prompts(config, count) <= num_queries), 1)
