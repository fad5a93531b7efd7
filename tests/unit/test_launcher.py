"""The launcher between a process's start and its being known."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oatlite import launcher as module
from oatlite.launcher import LocalLauncher

PREFIX = "oatlite-test-"
SLEEP = ["sleep", "300"]


class SignalledPopen(subprocess.Popen[bytes]):
    """Stands in for a signal that arrives while the process is started; a handler that raises does so here."""

    number: signal.Signals

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        signal.raise_signal(self.number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[signal.Signals]:
    """A signal that raises KeyboardInterrupt; tests in the background of a shell have Ctrl-C ignored."""
    before = signal.signal(request.param, signal.default_int_handler)
    monkeypatch.setattr(SignalledPopen, "number", request.param, raising=False)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_in_the_moment_of_a_start_loses_no_process(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = LocalLauncher(PREFIX)
    monkeypatch.setattr(module.subprocess, "Popen", SignalledPopen)
    with launcher, pytest.raises(KeyboardInterrupt):
        launcher.start(SLEEP, os.environ, tmp_path / "log")
    assert signal.getsignal(number) is signal.default_int_handler
    [pid] = launcher._started
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_ignored_signal_stays_ignored_where_a_process_is_started(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signal.signal(number, signal.SIG_IGN)
    with LocalLauncher(PREFIX) as launcher:
        monkeypatch.setattr(module.subprocess, "Popen", SignalledPopen)
        worker = launcher.start(["sh", "-c", "grep SigIgn /proc/$$/status"], os.environ, tmp_path / "log")
        assert worker.wait(30) and worker.exit_code() == 0
    ignored = int((tmp_path / "log").read_text().split()[1], 16)
    assert ignored & 1 << number - 1, "and it is by what was started"


def test_another_thread_can_start_processes(tmp_path: Path) -> None:
    with LocalLauncher(PREFIX) as launcher:
        thread = threading.Thread(target=launcher.start, args=(SLEEP, os.environ, tmp_path / "log"))
        thread.start()
        thread.join()
        assert len(launcher._started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(launcher._started[0], 0)


def test_a_reaper_that_is_stopped_does_not_keep_anybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "REAPER_S", 0.5)
    with LocalLauncher(PREFIX) as launcher:
        launcher.start(SLEEP, os.environ, tmp_path / "log")
        launcher._reaper.send_signal(signal.SIGSTOP)
    assert launcher._reaper.returncode == -signal.SIGKILL and not launcher.private_dir.exists()
