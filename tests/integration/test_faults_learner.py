"""Learner ranks that are stopped and killed: the run ends with the cause's name, and goes on as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from live import CLEAN_S, EngineMode, Stopwatch, live, wait_until
from runs import OATLITE, TWO_BY_TWO, Inputs, Run, command

from oatlite.checkpoint import complete, steps_of

SILENCE_S = 30  # a healthy worker that loads torch on a busy machine says nothing for some seconds


def go_on(run: Path, *more: str) -> list[str]:
    return [str(OATLITE), "resume", str(run), *more]


@pytest.mark.fault("3b", "4", "18")
def test_a_rank_that_is_stopped_and_one_that_is_killed_end_the_run_and_it_goes_on(
    two_by_two: Run, llama: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("fast")
    silence = ("--set", f"timeouts.silence_s={SILENCE_S}")
    with live(command(llama, folder, *TWO_BY_TWO, "--save-every", "1", *silence), folder, engine.environment) as run:
        run.wait_for("actor 0", "generate: 16 samples")
        engine.set("slow")
        wait_until(lambda: steps_of(folder / "checkpoints") == [1], 300, lambda: run.output)
        run.send("learner-1", signal.SIGSTOP)
        watch = Stopwatch()
        code, last = run.end(SILENCE_S + CLEAN_S)
        watch.within(SILENCE_S + CLEAN_S, "rank stopped, to the end")
    assert code == 7, run.output
    log = folder / "logs" / "learner-1.log"
    assert f"learner 1 was silent for {SILENCE_S} s; its stacks are in {log}" in last
    assert last.endswith(f"to go on from step 1: oatlite resume {folder}")
    assert "most recent call first" in log.read_text()

    with live(go_on(folder), folder, engine.environment) as run:
        engine.set("slow")
        run.wait_for("actor 1", "generate: 16 samples")
        engine.set("halt actor-1")  # so that its rank waits for it with the weights offered
        run.wait_for("learner 1", "sync: version")
        run.wait_until_stopped("actor-1")
        run.send("learner-1", signal.SIGKILL)
        watch = Stopwatch()
        code, last = run.end(CLEAN_S)
        watch.within(CLEAN_S, "rank killed, to the end")
    assert code == 3, run.output
    assert "learner 1 was killed by SIGKILL" in last and str(log) in last
    assert last.endswith(f"to go on from step 1: oatlite resume {folder}")
    (saved,) = complete(folder / "checkpoints")
    saved.verify()

    engine.set("fast")
    with live(go_on(folder), folder, engine.environment) as run:
        code, _ = run.end()
    assert code == 0, run.output
    assert Run(folder, code, "").metrics() == two_by_two.metrics()
    assert (folder / "samples.jsonl").read_text() == (two_by_two.folder / "samples.jsonl").read_text()
