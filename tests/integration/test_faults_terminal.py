"""The terminal that a run was started in goes away, as when a connection breaks."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from pathlib import Path

import pytest
from live import CLEAN_S, Stopwatch, wait_until
from runs import DEADLINE_S, ENVIRONMENT, Inputs, command, leftovers

from oatlite.checkpoint import complete, steps_of


@pytest.mark.fault("7")
@pytest.mark.parametrize(
    ("ui", "is_terminated"), [pytest.param("plain", False, marks=pytest.mark.long), ("live", True)]
)
def test_a_run_whose_terminal_is_gone_saves_its_step(
    ui: str, is_terminated: bool, llama: Inputs, tmp_path: Path
) -> None:
    """Also where whoever ends the session sends SIGTERM too."""
    folder = tmp_path / "run"
    arguments = command(llama, folder, "--ui", ui, "--epochs", "200", "--save-every", "1000")
    child, descriptor = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(arguments[0], arguments, ENVIRONMENT | {"TERM": "xterm"})
    try:
        shown = until_step(descriptor, folder / "metrics.jsonl")
        os.close(descriptor)
        if is_terminated:
            os.kill(child, signal.SIGTERM)
        watch = Stopwatch()
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, 4 * CLEAN_S)
        watch.within(4 * CLEAN_S, "terminal gone, to the end")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143, shown
    [step] = steps_of(folder / "checkpoints")
    assert step >= 1
    complete(folder / "checkpoints")[0].verify()
    wait_until(lambda: not leftovers(folder), CLEAN_S)


def until_step(descriptor: int, metrics: Path) -> bytes:
    """What is shown until the first step is over."""
    shown, deadline = b"", time.monotonic() + DEADLINE_S
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
        assert time.monotonic() < deadline, shown[-2000:]
        if select.select([descriptor], [], [], 0.05)[0]:
            shown += os.read(descriptor, 65536)
    return shown
