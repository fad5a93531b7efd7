"""``oatlite serve-oracle`` as a process of a test, and a run against an oracle behind a server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runs import ENVIRONMENT, OATLITE, Inputs, Run, reserved_port, train

START_S, END_S, SOON_S = 240.0, 60.0, 30.0


@dataclass(frozen=True, slots=True)
class Served:
    process: subprocess.Popen[str]
    url: str
    line: str
    temporary: Path
    errors: Path
    run_id: str = ""

    def semaphores(self) -> set[Path]:
        """Those named after it."""
        assert self.run_id
        return set(Path("/dev/shm").glob(f"sem.oatlite-{self.run_id}-*"))

    def pids(self) -> set[int]:
        """Of the process and all that it started, and they in turn."""
        found = {self.process.pid}
        parents = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found


def ended(pids: set[int]) -> bool:
    """Where nobody collects orphans, what has ended stays as a zombie."""
    states = []
    for pid in pids:
        with contextlib.suppress(OSError):
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"Z"}


@contextlib.contextmanager
def oracle_server(folder: Path, model: object, *more: str, token: str = "", wait: bool = True) -> Iterator[Served]:
    with reserved_port() as port:
        yield from serving_at(port, folder, model, *more, token=token, wait=wait)


def serving_at(port: int, folder: Path, model: object, *more: str, token: str, wait: bool) -> Iterator[Served]:
    folder.mkdir()
    # Sockets go elsewhere where the default folder for temporary files has a long name.
    temporary, errors = Path(tempfile.mkdtemp(prefix="os-")), folder / "errors"
    environment = ENVIRONMENT | {"TMPDIR": str(temporary), "OATLITE_ORACLE_TOKEN": token}
    command = [str(OATLITE), "serve-oracle", "--model", str(model), "--devices", "cpu", "--port", str(port), *more]
    with errors.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
    served = Served(process, f"http://127.0.0.1:{port}", "", temporary, errors)
    pids = {process.pid}
    try:
        if wait:
            assert process.stdout is not None
            watchdog = threading.Timer(START_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            assert line, errors.read_text()
            (private,) = temporary.glob("oatlite-*")
            served = replace(served, line=line.rstrip("\n"), run_id=private.name.removeprefix("oatlite-"))
            pids = served.pids()
        yield served
    finally:
        process.terminate()  # in good order: with its reaper killed, its semaphores would stay
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(END_S)
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(temporary)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def train_remote(llama: Inputs, folder: Path, *more: str) -> Run:
    """As :func:`runs.train`, with the remote oracle in place of the reward model."""
    return train(Inputs(llama.policy, Path("remote"), llama.prompts, llama.preferences), folder, *more)
