"""An offline run's halves of the loop: pairs that are read instead of sampled, and held-out pairs to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from oatlite.config.schema import Config
from oatlite.layouts import TokenPair
from oatlite.metrics.records import Mean
from oatlite.preferences import PreferenceSet
from oatlite.workers.buffer import Entry, TrainingPair
from oatlite.workers.contracts import Judged, Share
from oatlite.workers.experience import Rollouts, rows_of_step
from oatlite.workers.update import UpdateStats


class Measures(Protocol):
    """What judging needs of the update; :class:`oatlite.workers.update.Updater` is the real one."""

    def measure(self, entries: Sequence[Entry], at_most: int) -> tuple[UpdateStats, list[tuple[float, float]]]: ...


def training_pair(preferences: PreferenceSet, i: int) -> TrainingPair:
    """Pair ``i``, which no policy of this run has sampled."""
    return TrainingPair(
        tokens=TokenPair(
            prompt=preferences.prompt_tokens[i],
            chosen=preferences.chosen_tokens[i],
            rejected=preferences.rejected_tokens[i],
        ),
        sampler_logprobs=None,
        is_trainable=True,
        margin=float(preferences.margins[i]) if preferences.margins is not None else 0.0,
    )


class RecordedExperience:
    """Reads a rank's pairs of each step, in an order that is drawn anew for each epoch."""

    def __init__(self, config: Config, share: Share, preferences: PreferenceSet) -> None:
        self._config = config
        self._share = share
        self._preferences = preferences

    def collect(self, step: int, num_queries: int) -> Rollouts:
        """The pairs of ``step`` (from 1)."""
        del num_queries  # nothing is asked
        rows, epoch = rows_of_step(len(self._preferences), step, self._config)
        pairs = [training_pair(self._preferences, i) for i in self._share.of(rows)]
        lengths = Mean()
        for pair in pairs:
            lengths.extend([len(pair.tokens.chosen), len(pair.tokens.rejected)])
        return Rollouts(policy_version=None, epoch=epoch, pairs=pairs, means={"response_tokens": lengths})


class HeldOutPairs:
    """Judges the newest policy by its loss and its implicit rewards on a rank's share of the held-out pairs."""

    def __init__(self, share: Share, held_out: PreferenceSet, updater: Measures) -> None:
        self._held_out = held_out
        self._updater = updater
        self._mine: Sequence[int] = share.of(range(len(held_out)))
        self._at_most = -(-len(held_out) // share.count)
        self._entries = [Entry(training_pair(held_out, i), 0) for i in self._mine]

    @property
    def num_prompts(self) -> int:
        return len(self._held_out)

    def judge(self) -> Judged:
        """Metrics that add up over ranks, and a row per pair with the implicit rewards of both answers.

        ``accuracy`` is the share of pairs whose better answer has the higher implicit reward.
        """
        stats, rewards = self._updater.measure(self._entries, self._at_most)
        rows = [
            {
                "prompt": self._held_out.prompts[i],
                "chosen": self._held_out.chosen[i],
                "rejected": self._held_out.rejected[i],
                "chosen_reward": chosen,
                "rejected_reward": rejected,
            }
            for i, (chosen, rejected) in zip(self._mine, rewards, strict=True)
        ]
        return Judged({name: getattr(stats, name) for name in ("loss", "margin", "accuracy", "kl")}, rows)
