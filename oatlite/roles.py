"""A place in a run and the process that fills it: what it does now, for how long it may, and how it ended."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field

from oatlite.config.placement import Place
from oatlite.config.schema import TimeoutConfig
from oatlite.errors import WorkerDied
from oatlite.launcher import Worker
from oatlite.messages import Failure
from oatlite.workers.spec import EXIT_FINISHED, WorkerSpec

STARTING_STAGES = ("starting", "waiting")
BOUNDS = {
    ("actor", "starting"): "start_s",
    ("learner", "starting"): "start_s",
    **dict.fromkeys(
        [("learner", stage) for stage in ("idle", "learn", "sync", "evaluate", "save", "saving")], "learn_s"
    ),
}
"""Which of ``timeouts`` bounds what a worker does alone, by role and stage, until stage or detail changes. Whoever
waits for another process (``waiting``, and a learner's ``generate`` and ``score``) has a deadline of its own, which
bounds what an actor does for its learner too."""


@dataclass(slots=True)
class Role:
    """A place in the run and the process that fills it now. ``seen`` is the time of its last sign of life, in monotonic
    seconds, and ``restarted_at`` the last step before its last restart or, without one, before its start."""

    place: Place
    spec: WorkerSpec
    worker: Worker
    stage: tuple[str, str] = ("", "")
    stage_since: float = 0.0
    seen: float = field(default_factory=time.monotonic)
    was_ready: bool = False
    num_restarts: int = 0
    restarted_at: int = 0
    failure: Failure | None = None

    @property
    def is_actor(self) -> bool:
        return self.place.role == "actor"

    def enters(self, stage: str, detail: str) -> bool:
        """Whether the process does something else than before, from now on."""
        is_new = (stage, detail) != self.stage
        if is_new:
            self.stage, self.stage_since = (stage, detail), time.monotonic()
        self.was_ready |= stage not in STARTING_STAGES
        return is_new

    def frozen(self, timeouts: TimeoutConfig) -> str | None:
        """Why the process counts as frozen, if it does. One whose main thread hangs, in a driver, on a dead disk or in
        a user's function, still gives signs of life from another."""
        now = time.monotonic()
        if now - self.seen > timeouts.silence_s:
            return f"was silent for {timeouts.silence_s:.0f} s"
        bound = BOUNDS.get((self.place.role, self.stage[0]))
        if bound is None or now - self.stage_since <= getattr(timeouts, bound):
            return None
        stage = ": ".join(filter(None, self.stage))
        return f"did nothing but {stage} for {getattr(timeouts, bound):.0f} s (timeouts.{bound})"

    def is_consequence(self, code: int | None) -> bool:
        """Whether this end may have followed from another one that is found at the same moment: a rank that loses its
        peer raises something unspecific, while one that was killed, or says what ails it, is the cause."""
        if code is None or not is_death(code):
            return True
        return code > 0 and (self.failure is None or self.failure.exit_code == WorkerDied.exit_code)


def is_death(code: int | None) -> bool:
    """Whether a process that has ended, with this exit code, had not finished."""
    return code not in (None, EXIT_FINISHED)


def describe_exit(code: int) -> str:
    if code < 0:
        has_name = -code in set(signal.Signals)  # real-time signals but the first and the last have none
        return f"was killed by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
    return f"ended with code {code}" if code else "ended in the middle of its work, with code 0"
