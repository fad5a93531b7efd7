"""A supervisor that is killed, asked to stop while engines start, and asked to stop by a step that does not end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dead_runs import alone
from live import CLEAN_S, EngineMode, Live, Stopwatch, is_running, live, state_of, wait_until
from runs import ENVIRONMENT, OATLITE, TEMPORARY, Inputs, Run, command, leftovers, worker_pids

from oatlite.checkpoint import checkpoints_of, complete, steps_of, unfinished

GONE_S, SWEPT_S = 5.0, 10.0
STOP_S = 3
LONG = ("--epochs", "200", "--eval-prompts", "0", "--save-every", "1")


@pytest.mark.fault("5", "7", "10")
def test_a_run_killed_in_a_save_leaves_nothing_and_goes_on_at_once_until_a_step_does_not_end(
    llama: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    checkpoints = checkpoints_of(folder)
    with live(command(llama, folder, *LONG), folder) as run:
        wait_until(lambda: len(steps_of(checkpoints)) > 0, 300, lambda: run.output)
        learner = run.pid("learner-0")
        stop_in_a_save(learner, checkpoints)
        half, before = unfinished(checkpoints), steps_of(checkpoints)[0]
        os.kill(run.process.pid, signal.SIGKILL)
        watch = Stopwatch()
        wait_until(lambda: not worker_pids("learner-0") and not worker_pids("actor-0"), GONE_S)
        watch.within(GONE_S, "supervisor killed, until the tree is gone")
        wait_until(lambda: not leftovers(folder), SWEPT_S, lambda: str(leftovers(folder)))
        watch.within(SWEPT_S, "supervisor killed, until segments and sockets are gone")

    resume = [str(OATLITE), "resume", str(folder), "--set", f"timeouts.stop_s={STOP_S}"]
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")  # so that the actor is stopped while it generates for the step after the one that is saved
    with live(resume, folder, engine.environment) as run:
        watch = Stopwatch()
        for path in half:
            run.wait_for(f"{path.name} was not complete when its run ended, and is skipped")
        run.wait_for(f"resuming after step {before}")
        wait_until(lambda: steps_of(checkpoints)[:1] > [before], 300, lambda: run.output)
        watch.within(300, "resumed, until the next step is saved")
        actor = run.send("actor-0", signal.SIGSTOP)
        os.kill(run.process.pid, signal.SIGTERM)
        watch = Stopwatch()
        code, last = run.end(STOP_S + CLEAN_S)
        watch.within(STOP_S + CLEAN_S, "SIGTERM in a step that does not end, to the end")
    assert code == 143, run.output
    assert not is_running(actor)
    assert f"terminated, not saved: the step took longer than {STOP_S} s" in last
    newest = complete(checkpoints)[0]
    newest.verify()
    assert newest.step > before
    assert last.endswith(f"to go on from step {newest.step}: oatlite resume {folder}")


def stop_in_a_save(learner: int, checkpoints: Path) -> None:
    """Leave the process stopped with a checkpoint half written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if unfinished(checkpoints):
            os.kill(learner, signal.SIGSTOP)
            wait_until(lambda: state_of(learner) == "T", CLEAN_S)
            if unfinished(checkpoints):
                return
            os.kill(learner, signal.SIGCONT)
    raise AssertionError("no save was met in the middle")


@pytest.mark.fault("8")
@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGTERM, 143, "learner 0  starting"),
        (signal.SIGINT, 130, "actor 0    starting: engine"),
    ],
)
def test_a_signal_while_engines_start_leaves_no_orphan(
    number: int, code: int, moment: str, llama: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with live(command(llama, folder), folder) as run:
        run.wait_for(moment)
        os.kill(run.process.pid, number)
        watch = Stopwatch()
        ended, last = run.end(CLEAN_S)
        watch.within(CLEAN_S, f"signal {number} at {moment!r}, to the end")
    assert ended == code, run.output
    assert f"to start again: oatlite train --config {folder / 'config.toml'}" in last
    if number == signal.SIGTERM:
        assert "terminated, not saved" in last


@pytest.mark.fault("5")
def test_workers_whose_supervisor_and_reaper_were_both_killed_end_by_themselves(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with alone(), live(command(llama, folder), folder) as run:
        run.wait_for("learner 0", "waiting: for ranks")
        reaper = reaper_of(run)
        (private,) = TEMPORARY.glob("oatlite-*")
        os.kill(reaper, signal.SIGKILL)
        os.kill(run.process.pid, signal.SIGKILL)
        watch = Stopwatch()
        wait_until(
            lambda: all(Path(one).exists() for one in leftovers(folder)), CLEAN_S, lambda: str(leftovers(folder))
        )
        watch.within(CLEAN_S, "supervisor and reaper killed, until only files are left")
        removed = subprocess.run(
            [sys.executable, "-c", "from oatlite.leftovers import clean; print(*clean().folders)"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
    assert removed.stdout.split() == [str(private)], "as by `oatlite doctor --clean`"
    assert leftovers(folder) == []


@pytest.mark.fault("5")
def test_a_run_that_is_resumed_before_the_reaper_has_done_its_work_is_not_disturbed_by_it(
    one_by_one: Run, llama: Inputs, tmp_path: Path
) -> None:
    """The reaper comes late, to a learner that is stopped and would write, while the resumed run is in its steps."""
    folder = tmp_path / "run"
    checkpoints = checkpoints_of(folder)
    with live(command(llama, folder, "--algo", "simpo", "--save-every", "1"), folder) as run:
        wait_until(lambda: len(steps_of(checkpoints)) > 0, 300, lambda: run.output)
        learner, actor = run.send("learner-0", signal.SIGSTOP), run.pid("actor-0")
        (private,) = TEMPORARY.glob("oatlite-*")
        reaper = reaper_of(run)
        os.kill(reaper, signal.SIGSTOP)
        os.kill(run.process.pid, signal.SIGKILL)
    resume = [str(OATLITE), "resume", str(folder)]
    with live(resume, folder) as run:
        wait_until(lambda: not is_running(actor), CLEAN_S)  # by itself
        run.wait_for("step ", "/3")
        assert is_running(learner) and private.exists()
        os.kill(reaper, signal.SIGCONT)
        watch = Stopwatch()
        wait_until(lambda: not is_running(learner) and not private.exists(), SWEPT_S)
        watch.within(SWEPT_S, "reaper goes on, until nothing is left of the run that was killed")
        code, _ = run.end()
    assert code == 0, run.output
    assert Run(folder, 0, "").metrics() == one_by_one.metrics()


def reaper_of(run: Live) -> int:
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    found = []
    for pid in children:
        with contextlib.suppress(OSError):  # of one that has ended since it was found
            if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    (reaper,) = found
    return reaper
