"""Spawns the workers of a run, watches them, and ends everything."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from oatlite.checkpoint import Checkpoint
from oatlite.config.placement import Place, is_shared, places, starts_after
from oatlite.config.schema import Config
from oatlite.errors import (
    BY_EXIT_CODE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DeadlineExceeded,
    WorkerDied,
)
from oatlite.hardware import usable_cores
from oatlite.interrupts import Interrupted, collected_signals
from oatlite.launcher import LocalLauncher, Worker
from oatlite.messages import Failure, Message, Record, Stage
from oatlite.messages.fields import MalformedMessage
from oatlite.metrics.console import Console
from oatlite.preflight import Plan
from oatlite.roles import Role, describe_exit, is_death
from oatlite.stacks import ask_for_stacks
from oatlite.transport import Hub, address
from oatlite.workers.environment import environment_of
from oatlite.workers.spec import CONTROL_SOCKET, END_SIGNAL, EXIT_FINISHED, STOP_SIGNAL, WorkerSpec

POLL_S = 0.2
MAX_ACTOR_RESTARTS = 3
STEPS_TO_FORGIVE = 20  # after so many steps since an actor's last restart, its restarts count from zero again
KILL_S = 30.0
ACTOR_EXIT_S = 30.0
LAST_WORDS_S = 0.5
MAX_REASON_LENGTH = 200
MAX_MESSAGES = 1000


class Supervisor:
    """Spawns the workers and watches them: exits, silence, last words, signals."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        run_dir: Path,
        launcher: LocalLauncher,
        console: Console,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._run_dir = run_dir
        self._launcher = launcher
        self._console = console
        self._resume_from = checkpoint.folder.resolve() if checkpoint is not None else None
        self._first_step = checkpoint.step if checkpoint is not None else 0
        self._hub = Hub(address(launcher.private_dir, CONTROL_SOCKET), launcher.run_id)
        self._roles: dict[str, Role] = {}
        self._signals: list[int] = []
        self._stop_by: float | None = None

    def run(self) -> None:
        """Until all learners are done. Raises the OatliteError that ended the run."""
        with collected_signals(self._signals):
            try:
                waiting = places(self._config, usable_cores())
                while waiting or not self._are_done():
                    waiting = self._spawn_what_can_start(waiting)
                    self._watch()
                if self._stop_by is not None and not (self._run_dir / "model").exists():
                    raise Interrupted(EXIT_TERMINATED, "terminated, saved")
            except Interrupted:
                self._launcher.stop_all(is_hurried=lambda: len(self._signals) > 1)
                raise
            finally:
                self._hub.close()

    def _spawn_what_can_start(self, waiting: list[Place]) -> list[Place]:
        """Spawn the places whose turn it is; returns the others."""
        ready = {role.place.name for role in self._roles.values() if role.was_ready}
        left = []
        for place in waiting:
            self._check_signals()
            if {other.name for other in starts_after(place, places(self._config, usable_cores()))} <= ready:
                self._spawn(place)
            else:
                left.append(place)
        return left

    def _spawn(self, place: Place) -> None:
        spec = WorkerSpec(
            run_id=self._launcher.run_id,
            kind="learner" if place.role == "learner" else "actor",
            index=place.index,
            run_dir=self._run_dir,
            private_dir=self._launcher.private_dir,
            device="cpu" if place.gpu is None else "cuda",
            threads=len(place.cores),
            longest_prompt=self._plan.longest_prompt,
            longest_response=self._plan.longest_response,
            num_steps=self._plan.total_steps,
            most_steps=self._plan.most_steps,
            fingerprints=self._plan.fingerprints,
            engine_share=self._plan.engine_shares.get(place.name),
            gpu_lock=self._launcher.private_dir / f"gpu-{place.gpu}.lock" if self._shares_gpu(place) else None,
            resume_from=self._resume_from,
            config=self._config,
        )
        self._roles[spec.role] = Role(place, spec, self._start(place, spec), restarted_at=self._last_step())
        self._console.stage(place.name, "starting")

    def _shares_gpu(self, place: Place) -> bool:
        return is_shared(place, places(self._config, usable_cores()))

    def _start(self, place: Place, spec: WorkerSpec) -> Worker:
        log = self._run_dir / "logs" / f"{spec.role}.log"
        command = [sys.executable, "-m", "oatlite.workers", str(spec.write())]
        environment = environment_of(place, self._launcher.private_dir)
        return self._launcher.start(command, environment, log, end_signal=END_SIGNAL)

    def _watch(self) -> None:
        self._check_signals()
        self._take_messages(POLL_S)
        roles = list(self._roles.values())
        codes = {role.place.name: role.worker.exit_code() for role in roles}
        if any(map(is_death, codes.values())):
            self._take_messages()
            self._await_last_words([role for role in roles if codes[role.place.name] in BY_EXIT_CODE])
        for role in sorted(roles, key=lambda role: role.is_consequence(codes[role.place.name])):
            code = codes[role.place.name]
            if code is not None:
                self._ended(role, code)
            elif (why := role.frozen(self._config.timeouts)) is not None:
                self._frozen(role, why)

    def _handle(self, peer: str, message: Message) -> None:
        role = self._roles.get(peer)
        if role is None:
            self._hub.drop("unexpected", peer, type(message).__name__)
            return
        role.seen = time.monotonic()
        match message:
            case Stage():
                if role.enters(message.stage, message.detail):
                    self._console.stage(role.place.name, message.stage, message.detail)
            case Record():
                try:
                    self._show(message.kind, message.content())
                except MalformedMessage as error:
                    self._hub.drop("malformed", peer, str(error))
            case Failure():
                role.failure = message

    def _show(self, kind: str, content: dict[str, Any]) -> None:
        match kind:
            case "pair":
                self._console.pair(content)
            case "note":
                self._console.note(content["text"])
            case _:
                self._console.record(content)

    def _ended(self, role: Role, code: int) -> None:
        if not is_death(code):
            return
        failure = role.failure
        known = failure.exit_code if failure is not None else code
        is_for_good = known in BY_EXIT_CODE and known != WorkerDied.exit_code
        if self._may_restart(role) and not is_for_good:
            self._restart(role, describe_exit(code), failure.message if failure is not None else "")
            return
        log = role.worker.log
        if failure is not None and failure.exit_code == DeadlineExceeded.exit_code:
            ask_for_stacks([each.worker for each in self._roles.values()])  # somebody waited in vain: where is each?
        again = f" after {role.num_restarts} restarts" if role.num_restarts else ""
        if failure is not None:
            cls, fix = BY_EXIT_CODE.get(failure.exit_code, WorkerDied), f"{failure.fix}; " if failure.fix else ""
            raise cls(f"{role.place.name}{again}: {failure.message}", f"{fix}log: {log}")
        cls = BY_EXIT_CODE.get(code, WorkerDied)
        raise cls(f"{role.place.name} {describe_exit(code)}{again}", f"log: {log}")

    def _frozen(self, role: Role, why: str) -> None:
        """Get a frozen worker's stacks into its log, then treat it as dead."""
        ask_for_stacks([role.worker])
        role.worker.signal(signal.SIGKILL)
        if not role.worker.wait(KILL_S):  # in a system call that does not return; its memory is still taken
            pid = role.worker.pid
            raise DeadlineExceeded(
                f"{role.place.name} {why}, and process {pid} cannot be killed", f"cat /proc/{pid}/wchan"
            )
        if self._may_restart(role):
            self._restart(role, why)
            return
        raise DeadlineExceeded(f"{role.place.name} {why}", f"its stacks are in {role.worker.log}")

    def _may_restart(self, role: Role) -> bool:
        """A long run may meet more accidents than a short one; an actor that keeps dying gets nowhere."""
        if self._last_step() - role.restarted_at >= STEPS_TO_FORGIVE:
            role.num_restarts = 0
        return role.is_actor and role.was_ready and role.num_restarts < MAX_ACTOR_RESTARTS

    def _last_step(self) -> int:
        return int(self._console.history.last_step.get("step", self._first_step))

    def _restart(self, role: Role, how: str, why: str = "") -> None:
        role.num_restarts += 1
        role.restarted_at = self._last_step()
        reason = f": {textwrap.shorten(why, MAX_REASON_LENGTH, placeholder=' …')}" if why else ""
        self._console.note(f"{role.place.name} {how}; restart {role.num_restarts} of {MAX_ACTOR_RESTARTS}{reason}")
        self._console.stage(role.place.name, "restarting")
        self._launcher.forget(role.worker)
        role.worker = self._start(role.place, role.spec)
        role.stage_since = role.seen = time.monotonic()  # its stage stays: what the one before sent may still come
        role.failure = None

    def _are_done(self) -> bool:
        """All learners ended well; their actors were told to stop, and have a moment for it."""
        learners = [role for role in self._roles.values() if not role.is_actor]
        if any(role.worker.exit_code() != EXIT_FINISHED for role in learners):
            return False
        deadline = time.monotonic() + ACTOR_EXIT_S
        for role in self._roles.values():
            while not role.worker.wait(POLL_S) and time.monotonic() < deadline:
                self._check_signals()
        self._take_messages()
        return True

    def _take_messages(self, timeout_s: float = 0.0) -> None:
        """Those that have come, after at most ``timeout_s``; not all of a flood, in which workers must still be
        watched."""
        for _ in range(MAX_MESSAGES):
            received = self._hub.receive(timeout_s)
            if received is None:
                return
            self._handle(*received)
            timeout_s = 0.0

    def _await_last_words(self, roles: list[Role]) -> None:
        """What a worker sent before it ended may still be on its way through its socket."""
        deadline = time.monotonic() + LAST_WORDS_S
        while any(role.failure is None for role in roles) and (left_s := deadline - time.monotonic()) > 0:
            if (received := self._hub.receive(left_s)) is not None:
                self._handle(*received)

    def _check_signals(self) -> None:
        """Act upon what was asked: SIGTERM lets the step finish and be saved, a second signal or Ctrl-C doesn't."""
        if not self._signals:
            return
        if self._signals[0] == signal.SIGINT:
            raise Interrupted(EXIT_INTERRUPTED)
        learners = [role for role in self._roles.values() if not role.is_actor]
        if len(self._signals) > 1 or not learners or not all(role.was_ready for role in learners):
            raise Interrupted(EXIT_TERMINATED, "terminated, not saved")
        if self._stop_by is None:
            self._console.note("terminating: the step is finished and saved first")
            self._stop_by = time.monotonic() + self._config.timeouts.stop_s
            for role in learners:
                role.worker.tell(STOP_SIGNAL)
        if time.monotonic() > self._stop_by:
            stop_s = self._config.timeouts.stop_s
            raise Interrupted(EXIT_TERMINATED, f"terminated, not saved: the step took longer than {stop_s:.0f} s")
