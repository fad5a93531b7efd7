"""The process that talks to Weights & Biases, with the real package: its learner is killed; no server is in reach."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from silent_server import silent_server

from oatlite.metrics.sinks import WandbSink

CLOSE_S = 30  # for a busy machine; a fifth of it is waited for the server
T = TypeVar("T")
START_S = 60.0
RUN_FILE = "wandb/offline-run-*/run-*.wandb"
GONE_S = 5.0  # as when the supervisor is killed: `test_faults_supervisor.py`
LEARNER = """
    import sys, time
    from oatlite.metrics.sinks import WandbSink

    sink = WandbSink("p", "n", sys.argv[1], {"seed": 1})
    sink.write({"kind": "step", "step": 1, "loss": 0.5})
    time.sleep(600)
"""


class Processes:
    """Processes of a test, known by a variable that each inherits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._mark = secrets.token_hex(8)
        monkeypatch.setenv("OATLITE_TEST", self._mark)

    def cores(self) -> list[int]:
        """Of wandb-core, which lives as long as its run. Around it are processes that live for a moment."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                    found.append(pid)
        return found

    def pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"OATLITE_TEST={self._mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    for name in ("TMPDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", secrets.token_hex(20))
    found = Processes(monkeypatch)
    yield found
    for pid in found.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_until(condition: Callable[[], T], seconds: float) -> T:
    """What made the condition true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.fault("5", "20")
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_is_gone_soon_after_its_learner_was_killed(
    mode: str, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for a server that never answers; and after its start, when wandb-core hangs."""
    monkeypatch.setenv("WANDB_MODE", mode)
    with silent_server() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        command = [sys.executable, "-c", textwrap.dedent(LEARNER), str(tmp_path)]
        learner = subprocess.Popen(command, start_new_session=True)
        try:
            core = min(_wait_until(processes.cores, START_S))  # a process that it forks has its name for a moment
            if mode == "offline":  # once wandb-core has a run: it writes the file of an offline one itself
                _wait_until(lambda: [file for file in tmp_path.glob(RUN_FILE) if file.stat().st_size], START_S)
                os.kill(core, signal.SIGSTOP)
        finally:
            os.killpg(learner.pid, signal.SIGKILL)
            learner.wait()
        started = time.monotonic()
        _wait_until(lambda: not processes.pids(), GONE_S)
        print(f"FAULT learner killed, until wandb is gone: {time.monotonic() - started:.1f} s")


@pytest.mark.fault("20")
def test_records_for_a_server_that_is_out_of_reach_are_kept(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    warnings: list[str] = []
    with socket.socket() as closed:  # a port that is ours, and where nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        sink = WandbSink("p", "n", tmp_path, {"seed": 1}, warn=warnings.append, close_s=CLOSE_S)
        sink.write({"kind": "eval", "step": 1, "win_rate": 0.75})
        sink.close()
    assert len(warnings) == 1 and "kept offline" in warnings[0]
    [kept] = tmp_path.glob(RUN_FILE)
    assert b"eval/win_rate" in kept.read_bytes()
    _wait_until(lambda: not processes.pids(), 2 * GONE_S)
