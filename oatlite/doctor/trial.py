"""Each transport tried between two real processes, and what torch sees in one of them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oatlite.config.flags import to_type
from oatlite.doctor.findings import Finding
from oatlite.doctor.machine import TorchDevice, TorchView
from oatlite.launcher import LocalLauncher

TRIALS = ("messages", "weights-shm", "weights-cuda-ipc")
LONGEST_S = 180.0
"""Two minutes for both processes to import torch on a busy machine, ten seconds for each transport, and some."""
FIXES = {
    "messages": "export TMPDIR=/tmp  # or another folder where Unix sockets work",
    "weights-shm": "oatlite doctor --clean, or sudo mount -o remount,size=2G /dev/shm, or docker run --shm-size=2g",
    "weights-cuda-ipc": f"oatlite train {to_type('sync.transport', 'shm')}",
}


class Trial(NamedTuple):
    torch: TorchView | None
    findings: list[Finding]


def try_transports() -> Trial:
    """Start a learner and an actor, have them try what a run will do, and leave nothing of them."""
    try:
        with LocalLauncher("oatlite-") as launcher:
            folder = launcher.private_dir
            peers = {
                role: launcher.start(_command(role, folder, launcher.run_id), _environment(), folder / f"{role}.log")
                for role in ("learner", "actor")
            }
            ended = peers["learner"].wait(LONGEST_S)
            logs = {role: (folder / f"{role}.log").read_text(errors="replace") for role in peers}
            codes = {role: peer.exit_code() for role, peer in peers.items()}
    except OSError as error:
        detail = f"no process can be started there: {error.filename or ''} {error.strerror or error}"
        return Trial(None, [Finding(name, "problem", detail, FIXES["messages"]) for name in TRIALS])
    told = {line["name"]: line for line in _told(logs["learner"])}
    broken = "" if ended and codes["learner"] == 0 else _last_words(codes, logs)
    view = _torch_view(told["torch"]) if "torch" in told else None
    return Trial(view, [finding(name, told.get(name), view, broken) for name in TRIALS])


def _command(role: str, folder: Path, run_id: str) -> list[str]:
    return [sys.executable, "-m", "oatlite.doctor.peers", role, str(folder), run_id]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _told(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith('{"name": ')]


def _torch_view(line: Mapping[str, Any]) -> TorchView:
    return TorchView(
        line["version"],
        line["cuda"],
        tuple(TorchDevice(*device) for device in line["devices"]),
        tuple((first, second) for first, second in line["apart"]),
    )


def _last_words(codes: Mapping[str, int | None], logs: Mapping[str, str]) -> str:
    """Of the actor where it ended badly, for then the learner has waited for it."""
    role = "actor" if codes["actor"] else "learner"
    code, lines = codes[role], logs[role].strip().splitlines()
    end = f"did not end within {LONGEST_S:.0f} s" if code is None else f"ended with code {code}"
    return f"the {role} of the trial {end}" + (f": {lines[-1]}" if lines else "")


def finding(name: str, told: Mapping[str, Any] | None, view: TorchView | None, broken: str) -> Finding:
    """What the learner ``told`` of a transport, or why it told nothing: ``broken`` says how the trial ended."""
    if told is not None and "error" in told:
        return Finding(name, "problem", told["error"], FIXES[name])
    if told is not None:
        return Finding(name, "ok", told["detail"])
    if view is not None and not view.devices and name == "weights-cuda-ipc":
        return Finding(name, "skipped", "not checked: no GPU that torch sees")
    return Finding(name, "problem", broken, f"{shlex.quote(sys.executable)} -m pip check  # names what to mend")
