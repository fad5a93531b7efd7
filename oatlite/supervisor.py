"""The process that a person starts: it checks, places and spawns, shows what happens, and ends everything."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from oatlite.checkpoint import Checkpoint, unfinished
from oatlite.config.placement import Place, places, starts_after
from oatlite.config.schema import Config
from oatlite.demo.settings import with_demo
from oatlite.errors import (
    BY_EXIT_CODE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DeadlineExceeded,
    OatliteError,
    WorkerDied,
    as_storage_error,
)
from oatlite.hardware import usable_cores
from oatlite.launcher import LocalLauncher, Worker
from oatlite.messages import Failure, Message, Record, Stage
from oatlite.metrics.console import Console, open_console
from oatlite.preflight import Plan, check
from oatlite.resuming import how_to_go_on, require_same_run
from oatlite.run_folder import create_run_dir, held, summary
from oatlite.transport import Hub, address
from oatlite.workers.spec import CONTROL_SOCKET, END_SIGNAL, STOP_SIGNAL, WorkerSpec

POLL_S = 0.2
MAX_ACTOR_RESTARTS = 3
STEPS_TO_FORGIVE = 20  # after so many steps since an actor's last restart, its restarts count from zero again
STACK_DUMP_S = 2.0
KILL_S = 30.0
ACTOR_EXIT_S = 30.0
LAST_WORDS_S = 0.5
BOUNDED_STAGES = ("learn", "sync", "save", "saving")
"""What a learner does alone, so that no deadline of its own ends it."""
SEGMENT_PREFIX = "oatlite-"


class Interrupted(OatliteError):
    """Ctrl-C or SIGTERM ended the run; ``exit_code`` says which."""

    def __init__(self, exit_code: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class _Role:
    """A place in the run and the process that fills it now. ``seen`` is the time of its last sign of
    life, in monotonic seconds, and ``restarted_at`` the last step before its last restart."""

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


def train(config: Config, checkpoint: Checkpoint | None = None) -> int:
    """Run a resolved configuration to its end, from its start or from a ``checkpoint`` of the same run.

    Returns 0, or raises the OatliteError that ended the run.
    """
    effective = with_demo(config)
    plan = check(effective)
    if checkpoint is None:
        run_dir = create_run_dir(config)
    else:
        run_dir = checkpoint.folder.parents[1].resolve()
        require_same_run(checkpoint, effective, plan.fingerprints)
    title = f"{run_dir.name}  {config.algorithm.name}  {config.model.path}"
    with (
        held(run_dir),
        LocalLauncher(SEGMENT_PREFIX) as launcher,
        open_console(config.run.ui, title=title, total_steps=plan.total_steps) as console,
    ):
        if plan.num_dropped:
            console.note(_dropped(config, plan.num_dropped))
        if checkpoint is not None:
            for path in unfinished(checkpoint.folder.parent):
                console.note(f"{path.name} was not complete when its run ended, and is skipped")
            console.note(f"resuming after step {checkpoint.step}")
        started = time.monotonic()
        resume_from = checkpoint.folder.resolve() if checkpoint is not None else None
        try:
            Supervisor(effective, plan, run_dir, launcher, console, resume_from).run()
        except (OatliteError, OSError) as error:
            known = error if isinstance(error, OatliteError) else as_storage_error(error)
            if known is None:
                raise
            known.fix = "; ".join(part for part in (known.fix, how_to_go_on(run_dir)) if part)
            raise known from error.__cause__
        last_step = console.history.last_step
        if not last_step and checkpoint is not None:  # resumed after its last step, for the model alone
            last_step = {"step": checkpoint.step, "queries": checkpoint.about["progress"]["num_queries"] or None}
        console.close(summary(config, last_step, run_dir, time.monotonic() - started))
    return 0


def _dropped(config: Config, num: int) -> str:
    if config.rollout.offline:
        return f"{num} pairs had something empty or too long, or two equal answers, and are left out"
    return f"{num} prompts were empty or too long and are left out"


class Supervisor:
    """Spawns the workers and watches them: exits, silence, last words, signals."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        run_dir: Path,
        launcher: LocalLauncher,
        console: Console,
        resume_from: Path | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._run_dir = run_dir
        self._launcher = launcher
        self._console = console
        self._resume_from = resume_from
        self._hub = Hub(address(launcher.private_dir, CONTROL_SOCKET), launcher.run_id)
        self._roles: dict[str, _Role] = {}
        self._signals: list[int] = []
        self._stop_by: float | None = None

    def run(self) -> None:
        """Until all learners are done. Raises the OatliteError that ended the run."""
        with _collected_signals(self._signals):
            try:
                waiting = places(self._config, usable_cores())
                while waiting or not self._are_done():
                    waiting = self._spawn_what_can_start(waiting)
                    self._watch()
                if self._stop_by is not None and not (self._run_dir / "model").exists():
                    raise Interrupted(EXIT_TERMINATED, "terminated, saved")
            except Interrupted:
                self._launcher.stop_all(grace_s=0.0 if len(self._signals) > 1 else 5.0)
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
            resume_from=self._resume_from,
            config=self._config,
        )
        self._roles[spec.role] = _Role(place, spec, self._start(place, spec))
        self._console.stage(place.name, "starting")

    def _start(self, place: Place, spec: WorkerSpec) -> Worker:
        log = self._run_dir / "logs" / f"{spec.role}.log"
        command = [sys.executable, "-m", "oatlite.workers", str(spec.write())]
        environment = _environment(place, self._launcher.private_dir)
        return self._launcher.start(command, environment, log, end_signal=END_SIGNAL)

    def _watch(self) -> None:
        self._check_signals()
        received = self._hub.receive(POLL_S)
        while received is not None:
            self._handle(*received)
            received = self._hub.receive(0)
        roles = list(self._roles.values())
        codes = {role.place.name: role.worker.exit_code() for role in roles}
        if any(codes.values()):
            self._watch_last_messages()
            self._await_last_words([role for role in roles if (codes[role.place.name] or 0) > 0])
        for role in sorted(roles, key=lambda role: _is_consequence(role, codes[role.place.name])):
            code = codes[role.place.name]
            if code is not None:
                self._ended(role, code)
            elif time.monotonic() - role.seen > self._config.timeouts.silence_s:
                self._frozen(role, f"was silent for {self._config.timeouts.silence_s:.0f} s")
            elif self._is_stuck(role):
                stage = ": ".join(filter(None, role.stage))
                self._frozen(role, f"did nothing but {stage} for {self._config.timeouts.learn_s:.0f} s")

    def _handle(self, peer: str, message: Message) -> None:
        role = self._roles.get(peer)
        if role is None:
            self._hub.drop("unexpected", peer, type(message).__name__)
            return
        role.seen = time.monotonic()
        match message:
            case Stage():
                if role.stage != (message.stage, message.detail):
                    self._console.stage(role.place.name, message.stage, message.detail)
                    role.stage_since = time.monotonic()
                role.stage = (message.stage, message.detail)
                role.was_ready |= message.stage != "starting"
            case Record(kind="pair"):
                self._console.pair(json.loads(message.body))
            case Record(kind="note"):
                self._console.note(str(json.loads(message.body)["text"]))
            case Record():
                self._console.record(json.loads(message.body))
            case Failure():
                role.failure = message

    def _ended(self, role: _Role, code: int) -> None:
        if code == 0:
            return
        failure = role.failure
        known = failure.exit_code if failure is not None else code
        is_for_good = known in BY_EXIT_CODE and known != WorkerDied.exit_code
        if self._may_restart(role) and not is_for_good:
            self._restart(role, _describe_exit(code))
            return
        log = role.worker.log
        if failure is not None and failure.exit_code == DeadlineExceeded.exit_code:
            self._dump_stacks()
        if failure is not None:
            cls = BY_EXIT_CODE.get(failure.exit_code, WorkerDied)
            raise cls(f"{role.place.name}: {failure.message}", f"{failure.fix + '; ' if failure.fix else ''}log: {log}")
        again = f" after {role.num_restarts} restarts" if role.num_restarts else ""
        cls = BY_EXIT_CODE.get(code, WorkerDied)
        raise cls(f"{role.place.name} {_describe_exit(code)}{again}", f"log: {log}")

    def _is_stuck(self, role: _Role) -> bool:
        """A learner whose main thread hangs, in a driver or on a dead disk, still gives signs of life from another."""
        is_bounded = not role.is_actor and role.stage[0] in BOUNDED_STAGES
        return is_bounded and time.monotonic() - role.stage_since > self._config.timeouts.learn_s

    def _frozen(self, role: _Role, why: str) -> None:
        """Get a frozen worker's stacks into its log, then treat it as dead. A stopped process runs no handler."""
        role.worker.tell(signal.SIGUSR1)
        role.worker.signal(signal.SIGCONT)
        time.sleep(STACK_DUMP_S)
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

    def _dump_stacks(self) -> None:
        """Somebody waited in vain: let the log of every worker say where it is."""
        for role in self._roles.values():
            role.worker.tell(signal.SIGUSR1)
            role.worker.signal(signal.SIGCONT)
        time.sleep(STACK_DUMP_S)

    def _may_restart(self, role: _Role) -> bool:
        """A long run may meet more accidents than a short one; an actor that keeps dying gets nowhere."""
        if self._last_step() - role.restarted_at >= STEPS_TO_FORGIVE:
            role.num_restarts = 0
        return role.is_actor and role.was_ready and role.num_restarts < MAX_ACTOR_RESTARTS

    def _last_step(self) -> int:
        return int(self._console.history.last_step.get("step", 0))

    def _restart(self, role: _Role, why: str) -> None:
        role.num_restarts += 1
        role.restarted_at = self._last_step()
        self._console.note(f"{role.place.name} {why}; restart {role.num_restarts} of {MAX_ACTOR_RESTARTS}")
        self._console.stage(role.place.name, "restarting")
        self._launcher.forget(role.worker)
        role.worker = self._start(role.place, role.spec)
        role.seen = time.monotonic()
        role.failure = None

    def _are_done(self) -> bool:
        """All learners ended well; their actors were told to stop, and have a moment for it."""
        learners = [role for role in self._roles.values() if not role.is_actor]
        if any(role.worker.exit_code() != 0 for role in learners):
            return False
        deadline = time.monotonic() + ACTOR_EXIT_S
        for role in self._roles.values():
            while not role.worker.wait(POLL_S) and time.monotonic() < deadline:
                self._check_signals()
        self._watch_last_messages()
        return True

    def _watch_last_messages(self) -> None:
        while (received := self._hub.receive(0)) is not None:
            self._handle(*received)

    def _await_last_words(self, roles: list[_Role]) -> None:
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


@contextmanager
def _collected_signals(into: list[int]) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP instead of raising, so that they are acted upon between two steps of the watch.

    Once there was one, the end has begun, and takes a bounded time that another one must not cut into. SIGHUP, of a
    terminal that is gone, may come twice for one, and nothing can be written there from then on.
    """
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def note(number: int, frame: FrameType | None) -> None:
        into.append(number)

    def hang_up(number: int, frame: FrameType | None) -> None:
        if number not in into:
            into.append(number)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if into else handler)


def _environment(place: Place, private_dir: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # What libraries leave in the folder for temporary files goes with the run, but for kernels compiled for a GPU.
    if place.gpu is not None:
        kernels = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    environment["TMPDIR"] = str(private_dir)
    threads = str(len(place.cores))
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait take the cores from the process whose turn it is, and from other people.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which GPUs are counted here
    environment["CUDA_VISIBLE_DEVICES"] = "" if place.gpu is None else _visible_gpu(place.gpu)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _visible_gpu(gpu: int) -> str:
    """The name that CUDA knows the ``gpu``-th visible GPU by."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu].strip() if visible else str(gpu)


def _is_consequence(role: _Role, code: int | None) -> bool:
    """Whether this end may have followed from another one that is found at the same moment: a rank that loses its peer
    raises something unspecific, while one that was killed, or says what ails it, is the cause."""
    return not code or (code > 0 and (role.failure is None or role.failure.exit_code == WorkerDied.exit_code))


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
