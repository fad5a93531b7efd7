"""Decisions of the supervisor that need no process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oatlite.config.schema import Config
from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import Failure, Record, Stage
from oatlite.roles import Role, describe_exit
from oatlite.supervisor import MAX_ACTOR_RESTARTS, MAX_MESSAGES, STEPS_TO_FORGIVE, Supervisor
from oatlite.workers.spec import EXIT_FINISHED

LONG_AGO = -1e6  # of the monotonic clock
TIMEOUTS = {"start_s": 11, "generate_s": 12, "oracle_s": 13, "learn_s": 14, "sync_s": 15}
RUN_ID = "ab" * 6


class FakeWorker:
    """A process that is killed by being asked for."""

    pid = 1

    def __init__(self, log: Path) -> None:
        self.log = log
        self.code: int | None = None

    def exit_code(self) -> int | None:
        return self.code

    def signal(self, number: int) -> None:
        self.code = -number

    def tell(self, number: int) -> None:
        self.log.write_text("in _run_module_as_main")

    def wait(self, timeout_s: float) -> bool:
        return self.code is not None


def supervisor_of(role: str, folder: Path, *, first_step: int = 0) -> Any:
    """A supervisor of one process, ``actor-0`` or ``learner-0``, that has said nothing yet."""
    supervisor: Any = object.__new__(Supervisor)
    supervisor.notes = []
    supervisor._config = Config.model_validate({"timeouts": TIMEOUTS})
    supervisor._console = SimpleNamespace(
        history=SimpleNamespace(last_step={}), stage=lambda *_: None, note=supervisor.notes.append
    )
    supervisor._launcher = SimpleNamespace(forget=lambda worker: None)
    supervisor._hub = SimpleNamespace(receive=lambda timeout_s: None)
    supervisor._signals, supervisor._first_step = [], first_step
    kind, index = role.split("-")
    place: Any = SimpleNamespace(name=f"{kind} {index}", role=kind)

    def started(*_: object) -> FakeWorker:
        worker = FakeWorker(folder / f"{role}.log")
        worker.log.touch()
        return worker

    supervisor._start = started
    filled = Role(place, SimpleNamespace(), started(), restarted_at=supervisor._last_step())  # type: ignore[arg-type]
    supervisor._roles = {role: filled}
    return supervisor


def beat(supervisor: Any, role: str, stage: str, detail: str = "") -> None:
    supervisor._handle(role, Stage(run_id=RUN_ID, role=role, stage=stage, detail=detail))


@pytest.mark.parametrize(
    ("role", "stage", "detail", "bound"),
    [
        ("actor-0", "starting", "engine", "start_s"),
        ("learner-0", "starting", "model", "start_s"),
        ("learner-0", "idle", "", "learn_s"),
        ("learner-0", "evaluate", "step 0", "learn_s"),
        ("learner-0", "learn", "step 1", "learn_s"),
        ("actor-0", "waiting", "for its GPU", None),
        ("actor-0", "idle", "", None),
        ("actor-0", "generate", "8 samples", None),
        ("actor-0", "score", "8 pairs", None),
        ("actor-0", "sync", "version 1", None),
        ("learner-0", "waiting", "for actors", None),
        ("learner-0", "generate", "step 1", None),
        ("learner-0", "score", "step 1", None),
    ],
)
def test_what_a_worker_does_alone_has_an_end_though_it_gives_signs_of_life(
    role: str, stage: str, detail: str, bound: str | None, tmp_path: Path
) -> None:
    supervisor = supervisor_of(role, tmp_path)
    watched = supervisor._roles[role]
    watched.stage_since = LONG_AGO
    beat(supervisor, role, stage, detail)
    supervisor._watch()  # the clock began with this stage
    assert watched.worker.code is None
    watched.stage_since = LONG_AGO
    beat(supervisor, role, stage, detail)
    if bound is None:
        supervisor._watch()
        assert watched.worker.code is None
        return
    told = f"{watched.place.name} did nothing but {stage}.* for {TIMEOUTS[bound]} s .timeouts.{bound}.; its stacks are"
    with pytest.raises(DeadlineExceeded, match=told):
        supervisor._watch()
    assert watched.worker.code is not None


def test_an_actor_that_hangs_in_its_second_start_is_started_once_more_with_a_new_clock(tmp_path: Path) -> None:
    supervisor = supervisor_of("actor-0", tmp_path)
    actor = supervisor._roles["actor-0"]
    beat(supervisor, "actor-0", "idle")
    assert actor.was_ready
    for number in (1, 2):
        beat(supervisor, "actor-0", "starting", "engine")
        actor.stage_since = LONG_AGO
        supervisor._watch()
        assert supervisor.notes[-1].startswith("actor 0 did nothing but starting: engine for 11 s")
        assert supervisor.notes[-1].endswith(f"restart {number} of {MAX_ACTOR_RESTARTS}")
        supervisor._watch()
        assert len(supervisor.notes) == number and actor.worker.code is None


@pytest.mark.parametrize("kind", ["note", "pair", "step", "summary"])
def test_a_record_that_nobody_can_read_is_dropped_and_the_next_one_shown(kind: str, tmp_path: Path) -> None:
    supervisor = supervisor_of("actor-0", tmp_path)
    dropped: list[tuple[str, str, str]] = []
    supervisor._hub.drop = lambda *what: dropped.append(what)
    supervisor._handle("actor-0", Record(run_id=RUN_ID, kind=kind, body="no JSON"))
    supervisor._handle("actor-0", Record(run_id=RUN_ID, kind="note", body='{"text": "words"}'))
    assert [(why, peer) for why, peer, _ in dropped] == [("malformed", "actor-0")]
    assert supervisor.notes == ["words"]


def test_a_worker_that_sends_without_end_does_not_keep_another_from_being_watched(tmp_path: Path) -> None:
    supervisor = supervisor_of("learner-0", tmp_path)
    note = Record(run_id=RUN_ID, kind="note", body='{"text": "words"}')
    supervisor._hub.receive = lambda timeout_s: ("learner-0", note)
    supervisor._watch()
    assert len(supervisor.notes) == MAX_MESSAGES


def test_waiting_is_not_being_ready(tmp_path: Path) -> None:
    supervisor = supervisor_of("learner-0", tmp_path)
    for stage in ("starting", "waiting"):
        beat(supervisor, "learner-0", stage)
        assert not supervisor._roles["learner-0"].was_ready
    beat(supervisor, "learner-0", "idle")
    assert supervisor._roles["learner-0"].was_ready


def test_why_an_actor_failed_is_said_at_each_restart_and_at_the_last(tmp_path: Path) -> None:
    supervisor = supervisor_of("actor-0", tmp_path)
    actor = supervisor._roles["actor-0"]
    actor.was_ready = True

    def fails(message: str) -> None:
        actor.failure = Failure(run_id=RUN_ID, role="actor-0", exit_code=3, message=message, fix="")
        supervisor._ended(actor, 3)

    fails("RuntimeError: CUDA error:\n  as if")
    assert supervisor.notes == ["actor 0 ended with code 3; restart 1 of 3: RuntimeError: CUDA error: as if"]
    supervisor._ended(actor, -9)
    assert supervisor.notes[-1] == "actor 0 was killed by SIGKILL; restart 2 of 3"
    fails("word " * 400)
    assert len(supervisor.notes[-1]) < 300
    with pytest.raises(WorkerDied, match="actor 0 after 3 restarts: RuntimeError: again; log: "):
        fails("RuntimeError: again")


@pytest.mark.parametrize(("code", "words"), [(-9, "killed by SIGKILL"), (-40, "killed by signal 40"), (3, "code 3")])
def test_an_end_by_any_signal_has_words(code: int, words: str) -> None:
    assert describe_exit(code).endswith(words)


def test_the_first_step_after_a_resume_forgives_nothing(tmp_path: Path) -> None:
    supervisor = supervisor_of("actor-0", tmp_path, first_step=500)
    actor = supervisor._roles["actor-0"]
    actor.was_ready = True
    for _ in range(MAX_ACTOR_RESTARTS):
        supervisor._ended(actor, -9)
    supervisor._console.history.last_step = {"step": 501}
    assert not supervisor._may_restart(actor)
    supervisor._console.history.last_step = {"step": 500 + STEPS_TO_FORGIVE}
    assert supervisor._may_restart(actor)


def test_an_actors_restarts_are_forgiven_after_many_steps_and_never_while_it_gets_nowhere() -> None:
    supervisor: Any = object.__new__(Supervisor)
    supervisor._console, supervisor._first_step = SimpleNamespace(history=SimpleNamespace(last_step={})), 0
    actor = SimpleNamespace(is_actor=True, was_ready=True, num_restarts=MAX_ACTOR_RESTARTS, restarted_at=0)
    assert not supervisor._may_restart(actor)
    supervisor._console.history.last_step = {"step": STEPS_TO_FORGIVE - 1}
    assert not supervisor._may_restart(actor)
    supervisor._console.history.last_step = {"step": STEPS_TO_FORGIVE}
    assert supervisor._may_restart(actor) and actor.num_restarts == 0
    actor.num_restarts, actor.restarted_at = MAX_ACTOR_RESTARTS, STEPS_TO_FORGIVE
    assert not supervisor._may_restart(actor)
    learner = SimpleNamespace(is_actor=False, was_ready=True, num_restarts=0, restarted_at=0)
    assert not supervisor._may_restart(learner)


def test_a_learner_that_ends_in_its_middle_has_died_whatever_its_code() -> None:
    supervisor: Any = object.__new__(Supervisor)
    supervisor._console, supervisor._first_step = SimpleNamespace(history=SimpleNamespace(last_step={})), 0
    log = Path("learner-0.log")
    learner = SimpleNamespace(
        is_actor=False,
        failure=None,
        num_restarts=0,
        restarted_at=0,
        place=SimpleNamespace(name="learner 0"),
        worker=SimpleNamespace(log=log),
    )
    supervisor._ended(learner, EXIT_FINISHED)
    for code, words in ((0, "ended in the middle of its work, with code 0"), (1, "ended with code 1")):
        with pytest.raises(WorkerDied, match=f"learner 0 {words}; log: {log}"):
            supervisor._ended(learner, code)
