"""Starting ``oatlite train`` as a person does, on models and prompts that the tests make."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oatlite.launcher import RUN_VARIABLE

# Every run of these tests puts its private folder here, so that what is left behind is known to be theirs.
TEMPORARY = Path(tempfile.mkdtemp(prefix="ot-"))


@atexit.register
def _remove(maker: int = os.getpid()) -> None:
    if os.getpid() == maker:  # and not a process that was forked from it
        shutil.rmtree(TEMPORARY, ignore_errors=True)


ENVIRONMENT = os.environ | {"TMPDIR": str(TEMPORARY), "WANDB_MODE": "offline"}
OATLITE = Path(sys.executable).with_name("oatlite")
DEADLINE_S = 600.0  # with three processes for each core, a run of two ranks took 110 s
TWO_BY_TWO = ("--algo", "simpo", "--actors", "2", "--learners", "2", "--max-queries", "41")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Folders of a policy and a reward model, a file of prompts with references and one of preferences."""

    policy: Path
    reward_model: Path
    prompts: Path
    preferences: Path


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    exit_code: int
    output: str

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_lines(self.folder / "metrics.jsonl") if record["kind"] == kind]

    def metrics(self) -> list[dict[str, Any]]:
        """Everything but what the clock measured."""
        return [{k: v for k, v in r.items() if k != "perf"} for r in read_lines(self.folder / "metrics.jsonl")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:  # str.splitlines ends a line within a text too
        return [json.loads(line) for line in file]


def command(inputs: Inputs, folder: Path, *more: str) -> list[str]:
    online = ("--oracle", str(inputs.reward_model), "--prompts", str(inputs.prompts))
    sampling = ("--max-new-tokens", "12", "--temperature", "1.0")
    what = ("--preferences", str(inputs.preferences)) if "--offline" in more else (*online, *sampling)
    return demo_command(folder, "--model", str(inputs.policy), *what, *more)


def demo_command(folder: Path, *more: str) -> list[str]:
    """Of a run that is the demo where ``more`` names no model and no data."""
    return [
        *(str(OATLITE), "train", "--gpus", "0", "--ui", "plain"),
        *("--run-dir", str(folder.parent), "--name", folder.name),
        *("--prompts-per-step", "16", "--micro-batch-size", "4", "--max-prompts", "48"),
        *(() if "--eval-every-queries" in more else ("--eval-every", "2")),
        *("--eval-prompts", "8", "--lr", "0.001"),
        *more,
    ]


def train(inputs: Inputs, folder: Path, *more: str) -> Run:
    return run_to_end(command(inputs, folder, *more), folder)


def run_to_end(arguments: list[str], folder: Path) -> Run:
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, env=ENVIRONMENT
    )
    return Run(folder=folder, exit_code=done.returncode, output=done.stdout)


def start(inputs: Inputs, folder: Path, *more: str) -> subprocess.Popen[str]:
    return start_command(command(inputs, folder, *more))


def start_command(arguments: list[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT | dict(environment or {}),
    )


def leftovers(folder: Path) -> list[str]:
    """Processes, shared memory and private folders of the run in ``folder``, known by the run's id in its logs."""
    logs = "".join(path.read_text(errors="replace") for path in (folder / "logs").glob("*.log"))
    found = [str(path) for path in TEMPORARY.glob("oatlite-*")]
    of_a_run = f"{RUN_VARIABLE}={TEMPORARY}/".encode()  # of what libraries start, too
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                command, environment = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
                if str(TEMPORARY).encode() in command or of_a_run in environment:
                    found.append(command.decode(errors="replace"))
    for run_id in set(re.findall(r"of run ([0-9a-f]+)", logs)):
        found += [str(path) for path in Path("/dev/shm").glob(f"*oatlite-{run_id}-*")]  # semaphores: sem.oatlite-…
    return found


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine that a server of ours may listen at, and that nobody else is given while this is held."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, which lets them share it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def worker_pids(role: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                words = (entry / "cmdline").read_bytes()
                if str(TEMPORARY).encode() in words and f"{role}.json".encode() in words:
                    found.append(int(entry.name))
    return found
