"""The learner's loop: collect, learn, push, and judge now and then. It is written here once, for all algorithms."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from oatlite.config.schema import Config
from oatlite.config.steps import is_followed_by_sync, newest_version
from oatlite.errors import WorkerDied
from oatlite.metrics.records import Mean
from oatlite.workers.ahead import Ahead
from oatlite.workers.contracts import Actors, Collects, Judges, Keeps, Policies, Ranks, Shows, Updates
from oatlite.workers.experience import Rollouts
from oatlite.workers.rollout import ParameterSource
from oatlite.workers.saving import Progress, Saves
from oatlite.workers.update import UpdateStats


class Learner:
    """One rank of the learner. All ranks go through the same steps; ``journal`` is None on all but rank 0, and
    ``actors`` where nothing is sampled. ``ahead`` collects in place of this loop, where a run is asynchronous, and
    ``turn`` is held while it learns, on a GPU that it shares."""

    def __init__(
        self,
        *,
        config: Config,
        num_steps: int,
        experience: Collects,
        judge: Judges,
        actors: Actors | None,
        updater: Updates,
        ranks: Ranks,
        policies: Policies,
        journal: Keeps | None,
        shows: Shows,
        measure: Callable[[], dict[str, Any]],
        keeper: Saves | None = None,
        progress: Progress | None = None,
        is_stop_asked: Callable[[], bool] = lambda: False,
        ahead: Ahead | None = None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._config = config
        self._num_steps = num_steps
        self._experience = experience
        self._judge = judge
        self._actors = actors
        self._updater = updater
        self._ranks = ranks
        self._policies = policies
        self._journal = journal
        self._shows = shows
        self._measure = measure
        self._keeper = keeper
        self._progress = progress or Progress()
        self._is_stop_asked = is_stop_asked
        self._ahead = ahead
        self._turn = turn

    def run(self) -> bool:
        """All steps that are left, with an evaluation before the first, after the last, and every so often between.

        Returns whether the last step was reached: a stop that was asked for ends the run after a step, with a
        checkpoint.
        """
        config = self._config
        if not self._progress.step:
            self.evaluate(0)
        if self._is_spent():  # resumed after the last step
            return True
        for step in range(self._progress.step + 1, self._num_steps + 1):
            clock = _Clock()
            rollouts = self._collect(step)
            clock.lap("collect_s")
            with self._shows.doing("learn", f"step {step}"), self._turn():
                stats = self._updater.learn(rollouts.pairs, step)
            clock.lap("learn_s")
            if self._ahead is not None:
                with self._shows.doing("generate", f"version {step} waits for the batch under way"):
                    self._ahead.pause()
                clock.lap("pause_s")
            if self._actors is not None and is_followed_by_sync(config, step):
                self._sync(self._actors, step, self._policies.adopt)
            clock.lap("sync_s")
            before = self._progress.num_queries
            self._report(step, rollouts, stats, clock)
            is_last = step == self._num_steps or self._is_spent()
            if is_last or self._is_evaluation_due(step, before):
                self.evaluate(step)
            is_stopping = not is_last and self._ranks.maximum(float(self._is_stop_asked())) > 0
            if is_stopping and self._ahead is not None:
                self._give_up(self._ahead)
            is_due = is_stopping or is_last or step % config.checkpoint.save_every == 0
            if self._keeper is not None and is_due:  # the last step too: the model may not find room
                with self._shows.doing("save", f"step {step}"):
                    self._keeper.save(self._progress, newest_version(config, step))
            if is_stopping:
                return False
            if is_last:
                break
        return True

    def _collect(self, step: int) -> Rollouts:
        if self._ahead is None:
            return self._experience.collect(step, self._progress.num_queries)
        self._ahead.go_on(step - 1, self._progress.num_queries)
        with self._shows.doing("generate", f"step {step}"):
            return self._ahead.take()

    def _give_up(self, ahead: Ahead) -> None:
        """What was sampled ahead is lost in a stop; its queries were spent all the same."""
        with self._shows.doing("generate", "stopping after the batch under way"):
            num_given_up = ahead.give_up()
        (num_lost,) = map(int, self._ranks.add_up([num_given_up]))
        self._progress = replace(self._progress, num_queries=self._progress.num_queries + num_lost)
        if num_lost and self._journal is not None:
            self._journal.note(f"stopping: {num_lost} pairs that were judged ahead are not trained on")

    def _is_spent(self) -> bool:
        """Whether the budget of oracle queries is used up."""
        most = self._config.data.max_queries
        return most is not None and self._progress.num_queries >= most

    def _is_evaluation_due(self, step: int, queries_before: int) -> bool:
        """Every so many steps, or when the queries of this step have crossed a multiple of ``every_queries``."""
        every = self._config.eval.every_queries
        if every is None:
            return step % self._config.eval.every == 0
        return self._progress.num_queries // every > queries_before // every

    def evaluate(self, step: int) -> None:
        """Judge the newest policy, that of ``step``."""
        if not self._judge.num_prompts:
            return
        clock = _Clock()
        with self._shows.doing("evaluate", f"step {step}"), self._newest_at_actors(step):
            judged = self._judge.judge()
        means, all_rows = self._add_up(judged.means), self._gather(judged.rows)
        failures, asked = map(int, self._ranks.add_up([judged.num_failures, judged.num_queries]))
        clock.lap("eval_s")
        perf = clock.laps | {"score_s": judged.score_s} | ({"oracle_failures": failures} if failures else {})
        if self._journal is not None:
            self._journal.evaluation(step, all_rows)
            share = means["judged"].value if "judged" in means else None
            if share is not None and share < 1:
                self._journal.note(
                    f"evaluation at step {step}: the oracle gave no verdict on {1 - share:.0%} of the held-out "
                    "prompts, which count nowhere"
                )
            has_oracle = self._actors is not None
            self._journal.record(
                "eval",
                step=step,
                queries=self._progress.num_queries if has_oracle else None,
                eval_queries=asked if has_oracle else None,
                prompts=self._judge.num_prompts,
                perf=perf,
                **means,
            )

    @contextmanager
    def _newest_at_actors(self, step: int) -> Iterator[None]:
        """Where the actors hold an older policy than that of ``step``, push the newest and restore theirs after."""
        actors = self._actors
        if actors is None or actors.policy_version == newest_version(self._config, step):
            yield
            return
        behaviour_version = actors.policy_version
        self._sync(actors, step, lambda: self._policies.newest)
        yield
        self._sync(actors, behaviour_version, lambda: self._policies.behaviour)

    def _sync(self, actors: Actors, version: int, source: Callable[[], ParameterSource]) -> None:
        """Push weights to the actors. Raises WorkerDied on all ranks where they have not pushed the same."""
        with self._shows.doing("sync", f"version {version}"):
            pushed = "".join(actors.sync(version, source()))
            number = float(int.from_bytes(hashlib.blake2b(pushed.encode(), digest_size=6).digest()))
            if self._ranks.maximum(number) != -self._ranks.maximum(-number):
                raise WorkerDied(f"the learner's ranks hold weights {version} that are not the same")

    def _report(self, step: int, rollouts: Rollouts, stats: UpdateStats, clock: _Clock) -> None:
        """Add the ranks' numbers up and write the record of the step."""
        means = self._add_up(rollouts.means | stats.means())
        num_trained = sum(pair.is_trainable for pair in rollouts.pairs)
        counts = [len(rollouts.pairs), num_trained, rollouts.num_tokens, rollouts.num_queries]
        counts += [rollouts.num_failures, rollouts.num_without_verdict]
        pairs, trained, tokens, queries, failures, without_verdict = map(int, self._ranks.add_up(counts))
        actors, sampled_with = self._actors, self._oldest(step, rollouts.policy_version)
        self._progress = Progress(
            step=step,
            num_queries=self._progress.num_queries + queries,
            policy_version=actors.policy_version if actors is not None else step,
        )
        rows = self._gather(rollouts.rows)
        if self._journal is None:
            return
        self._journal.samples(rows)
        if pairs and not trained:
            self._journal.note(
                f"step {step} trains on nothing: each of its {pairs} pairs is tied, of two equal texts, or too long "
                "for the oracle"
            )
        perf = clock.laps | {
            "generate_s": rollouts.generate_s,
            "score_s": rollouts.score_s,
            "encode_s": rollouts.encode_s,
            "head_s": rollouts.head_s,
            "reference_s": stats.reference_s,
        }
        if actors is not None and rollouts.generate_s is not None:
            perf |= {"reload_s": actors.reload_s, "tokens_per_s": tokens / max(rollouts.generate_s, 1e-9)}
        if actors is not None and actors.sleep_s:
            perf |= {"sleep_s": actors.sleep_s, "wake_s": actors.wake_s}
            actors.sleep_s = actors.wake_s = 0.0
        if failures:
            perf["oracle_failures"] = failures
        self._journal.record(
            "step",
            step=step,
            policy_version=sampled_with,
            queries=self._progress.num_queries if actors is not None else None,
            epoch=rollouts.epoch,
            lr=stats.lr,
            gradient_steps=stats.num_steps,
            mismatch_max=stats.mismatch_max if means["mismatch_mean"].count else None,
            staleness=newest_version(self._config, step - 1) - sampled_with if sampled_with is not None else None,
            trained_pairs=trained,
            unusable_pairs=pairs - trained,
            without_verdict=without_verdict if actors is not None else None,
            perf=perf | self._measure() | {"step_s": clock.total()},
            **means,
        )

    def _oldest(self, step: int, version: int | None) -> int | None:
        """The oldest of the versions that the ranks' actors sampled ``step`` with; in turns they are the same."""
        if self._ahead is None or version is None:
            return version
        return step - int(self._ranks.maximum(float(step - version)))

    def _add_up(self, means: dict[str, Mean]) -> dict[str, Mean]:
        flat = self._ranks.add_up([value for mean in means.values() for value in (mean.sum, mean.count)])
        return {name: Mean(flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(means)}

    def _gather(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of all ranks, on rank 0."""
        parts = self._ranks.gather_bytes(json.dumps(rows).encode())
        return [row for part in parts for row in json.loads(part)] if self._journal is not None else []


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start
