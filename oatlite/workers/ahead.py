"""Collecting the steps to come while the learner is at work: what ``--async`` adds to the loop.

The actors hold one policy version at a time, so a sync falls between two batches: it waits for the one that is under
way, and the next begins when it is over. How far the actors may be ahead is what bounds the staleness: the batch of
step j begins only when the version that they hold is ``j - 1 - max_staleness`` or newer.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from oatlite.config.schema import Config
from oatlite.config.steps import pairs_of_step
from oatlite.errors import DeadlineExceeded
from oatlite.workers.contracts import Collects

if TYPE_CHECKING:
    from oatlite.workers.experience import Rollouts

POLL_S = 1.0


class Ahead:
    """The sampling half of the steps, in a thread of its own, in order.

    The actors are this thread's from :meth:`go_on` to the return of :meth:`pause`, and the caller's otherwise. What a
    collection raises is raised by the next call from outside, and a collection that hangs by itself, not over an
    actor, is a DeadlineExceeded there after ``timeouts.learn_s``.
    """

    def __init__(
        self,
        config: Config,
        experience: Collects,
        num_steps: int,
        first: int,
        alone_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``first`` is the step, of ``num_steps``, that is collected first, and ``alone_s`` says how many seconds
        ago the collection last waited for an actor."""
        self._experience = experience
        self._alone_s, self._most_alone_s = alone_s, config.timeouts.learn_s
        self._max_staleness = config.rollout.max_staleness
        self._is_strict = config.rollout.strict_staleness
        self._max_queries = config.data.max_queries
        self._pairs = pairs_of_step(config)
        self._num_steps = num_steps
        self._next = first
        self._queries_before: dict[int, int] = {}
        """By step that may be collected: how many queries were made before it, at most."""
        self._is_paused, self._is_busy, self._began = True, False, 0.0
        self._ready: deque[Rollouts] = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="rollouts", daemon=True).start()

    def go_on(self, version: int, num_queries: int) -> None:
        """Collect with policy ``version``, in whose making ``num_queries`` queries were spent, as far as it may go.

        A step counts as asking about as many pairs as it has prompts, which is the most; one that would not have its
        whole share of the budget left waits until it is known what is.
        """
        with self._changed:
            last = min(version + 1 + self._max_staleness, self._num_steps)
            for step in range(self._next, last + 1):
                before = num_queries + (step - version - 1) * self._pairs
                is_known = step == version + 1
                if is_known or self._max_queries is None or before + self._pairs <= self._max_queries:
                    self._queries_before.setdefault(step, before)
            self._is_paused = False
            self._changed.notify_all()

    def take(self) -> Rollouts:
        """The rollouts of the next step, when they are there. :meth:`go_on` has to have allowed it."""
        with self._changed:
            self._wait_until(lambda: bool(self._ready) or self._error is not None)
            if not self._ready:
                assert self._error is not None
                raise self._error
            return self._ready.popleft()

    def pause(self) -> None:
        """Begin no further step, and return when none is under way: strictly, when all have been collected that may
        be, so that the same step is always sampled by the same version."""
        with self._changed:
            self._is_paused = not self._is_strict
            self._wait_until(lambda: self._error is not None or not (self._is_busy or self._goes_on()))
            self._is_paused = True
            if self._error is not None:
                raise self._error

    def give_up(self) -> int:
        """Drop what nobody has taken; returns the queries that were spent on it."""
        with self._changed:
            self._is_strict = False
        self.pause()
        return sum(rollouts.num_queries for rollouts in self._ready)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not self._changed.wait_for(condition, POLL_S):
            alone_s = min(self._alone_s(), time.monotonic() - self._began)
            if self._is_busy and alone_s > self._most_alone_s:
                faulthandler.dump_traceback()  # this process ends with the error: nobody can ask it afterwards
                raise DeadlineExceeded(
                    f"step {self._next} did nothing but choose pairs and score them itself for "
                    f"{self._most_alone_s:.0f} s (timeouts.learn_s)",
                    "its stacks are in the log",
                )

    def _goes_on(self) -> bool:
        return not self._is_paused and self._next in self._queries_before

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(self._goes_on)
                self._is_busy, self._began = True, time.monotonic()
                step = self._next
                num_queries = self._queries_before.pop(step)
            try:
                rollouts = self._experience.collect(step, num_queries)
            except BaseException as error:  # of whatever kind: it is raised where somebody waits
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(rollouts)
                self._next += 1


class Unseen:
    """Of a thread beside the main one: what it does is shown by the actors, which do it. All that it tells of are its
    waits for them."""

    def __init__(self) -> None:
        self._alone_since: float | None = None

    @contextmanager
    def doing(self, stage: str, detail: str = "") -> Iterator[None]:
        self._alone_since = None
        try:
            yield
        finally:
            self._alone_since = time.monotonic()

    def alone_s(self) -> float:
        """Seconds since the last of them ended; none within one, and before the first."""
        since = self._alone_since
        return 0.0 if since is None else time.monotonic() - since
