"""When an actor's engine sleeps: from each answer to the next request for samples, or to the next sync.

The actor decides alone, and the learner needs to know nothing but that an answer comes when the memory is free: the
engine falls asleep before the samples are sent, and the oracle, the reference and the learner work while it sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from oatlite.engine import Engine
from oatlite.engine.states import State
from oatlite.workers.turns import Turn


class Awake:
    """An engine that never sleeps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def wake(self) -> float:
        """Be ready to generate; returns the seconds spent in waking since the last call, for a sync or here."""
        return 0.0

    def sleep(self, *, is_last_of_version: bool) -> float:
        """After samples were taken, the last of this version or not; returns seconds."""
        return 0.0

    def begin_load(self) -> None:
        self._engine.begin_load()

    def finish_load(self) -> None:
        self._engine.finish_load()


class Rest(Awake):
    """An engine that shares its GPU, and sleeps whenever it does not generate or take weights.

    After the last samples of a version come other weights, all of them, so its own are dropped. They are kept in
    host memory where the same version is sampled from again (``rollout.sync_every`` above 1, each evaluation, and where
    only the head learns) and where ``has_adapter``, whose base is never sent.
    """

    def __init__(self, engine: Engine, turn: Turn, *, has_adapter: bool) -> None:
        super().__init__(engine)
        self._turn = turn
        self._has_adapter = has_adapter
        self._wake_s = 0.0

    def wake(self) -> float:
        if self._engine.state is not State.READY:
            self._timed(self._engine.wake)
        seconds, self._wake_s = self._wake_s, 0.0
        return seconds

    def sleep(self, *, is_last_of_version: bool) -> float:
        start = time.perf_counter()
        with self._turn.taken():
            self._engine.sleep(keeps_weights=self._has_adapter or not is_last_of_version)
        return time.perf_counter() - start

    def begin_load(self) -> None:
        if self._engine.state is not State.READY:
            self._timed(self._engine.wake_weights)
        self._engine.begin_load()

    def finish_load(self) -> None:
        self._engine.finish_load()
        if self._engine.state is not State.READY:
            self._timed(self._engine.wake_cache)

    def _timed(self, wake: Callable[[], None]) -> None:
        start = time.perf_counter()
        with self._turn.taken():
            wake()
        self._wake_s += time.perf_counter() - start
