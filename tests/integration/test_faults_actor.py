"""Actors that are stopped, fail and are killed: replaced as often as is allowed, and the run is the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from live import CLEAN_S, EngineMode, Stopwatch, live
from runs import Inputs, Run, command

NOTICED_S = 10.0
SILENCE_S = 30  # a healthy worker that loads torch on a busy machine says nothing for some seconds


@pytest.mark.fault("1", "2", "3")
def test_an_actor_that_is_stopped_fails_and_is_killed_is_replaced_each_time_and_the_run_is_the_same(
    one_by_one: Run, llama: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    arguments = command(llama, folder, "--algo", "simpo", "--set", f"timeouts.silence_s={SILENCE_S}")
    with live(arguments, folder, engine.environment) as run:
        log = folder / "logs" / "actor-0.log"

        run.wait_for("actor 0", "generate: 8 samples")
        run.send("actor-0", signal.SIGSTOP)
        watch = Stopwatch()
        run.wait_for(f"actor 0 was silent for {SILENCE_S} s; restart 1 of 3")
        watch.within(SILENCE_S + CLEAN_S, "actor stopped, to its restart")
        stacks = log.read_text()
        assert "most recent call first" in stacks and "in run_actor" in stacks

        run.wait_for("actor 0", "generate: 8 samples")
        engine.set("raise")
        watch = Stopwatch()
        run.wait_for("actor 0 ended with code 3; restart 2 of 3")
        watch.within(NOTICED_S, "engine raises, to the restart")
        assert "CUDA error: as if" in log.read_text()
        engine.set("slow")

        run.wait_for("actor 0", "generate: 32 samples")
        run.send("actor-0", signal.SIGKILL)
        watch = Stopwatch()
        run.wait_for("actor 0 was killed by SIGKILL; restart 3 of 3")
        watch.within(CLEAN_S, "actor killed, to its restart")
        engine.set("fast")
        run.wait_for("actor 0", "generate: 32 samples")  # the whole batch again

        code, _ = run.end()
    assert code == 0, run.output
    assert Run(folder, code, "").metrics() == one_by_one.metrics()
    assert (folder / "samples.jsonl").read_text() == (one_by_one.folder / "samples.jsonl").read_text()


@pytest.mark.fault("1")
def test_an_actor_that_dies_again_and_again_ends_the_run(llama: Inputs, tmp_path: Path) -> None:
    """At first by a library that ends the process, with the code of a good end."""
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    with live(command(llama, folder), folder, engine.environment) as run:
        run.wait_for("actor 0", "generate")
        pid = run.pid("actor-0")
        engine.set("leave")
        run.wait_for("actor 0 ended in the middle of its work, with code 0; restart 1 of 3")
        engine.set("fast")
        pid = run.pid("actor-0", other_than=pid)
        for number in range(2, 4):
            os.kill(pid, signal.SIGKILL)
            run.wait_for(f"restart {number} of 3")
            pid = run.pid("actor-0", other_than=pid)
        os.kill(pid, signal.SIGKILL)
        watch = Stopwatch()
        code, last = run.end(CLEAN_S)
        watch.within(CLEAN_S, "actor killed for good, to the end")
    assert code == 3, run.output
    assert "actor 0 was killed by SIGKILL after 3 restarts" in last
    assert str(folder / "logs" / "actor-0.log") in last
    assert f"oatlite train --config {folder / 'config.toml'}" in last
