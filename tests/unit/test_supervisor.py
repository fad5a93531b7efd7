"""Decisions of the supervisor that need no process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from oatlite.supervisor import MAX_ACTOR_RESTARTS, STEPS_TO_FORGIVE, Supervisor


def test_an_actors_restarts_are_forgiven_after_many_steps_and_never_while_it_gets_nowhere() -> None:
    supervisor: Any = object.__new__(Supervisor)
    supervisor._console = SimpleNamespace(history=SimpleNamespace(last_step={}))
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
