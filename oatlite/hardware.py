"""What this machine has: GPUs, cores, memory, space. Standard library alone, so that it answers at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DRIVER = Path("/proc/driver/nvidia/gpus")
SHARED_MEMORY = Path("/dev/shm")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Gpu(NamedTuple):
    """``total_bytes`` is 0 where it is not told."""

    uuid: str
    name: str
    total_bytes: int = 0


def gpu_names() -> list[str]:
    """Names of the GPUs that a process started here can use, in the order in which CUDA numbers them."""
    return [gpu.name for gpu in visible_gpus()]


def visible_gpus() -> list[Gpu]:
    """The GPUs that a process started here can use, in the order in which CUDA numbers them."""
    return visible(all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(gpus: list[Gpu], mask: str | None) -> list[Gpu]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES=mask`` leaves. As in CUDA, the first entry that fits none ends the list."""
    if mask is None:
        return gpus
    left: list[Gpu] = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.isdigit() and int(entry) < len(gpus):
            found = gpus[int(entry)]
        elif entry.startswith("MIG-") and gpus:
            found = Gpu(entry, "MIG slice")
        else:
            matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
            if len(matches) != 1:
                break
            found = matches[0]
        left.append(found)
    return left


def all_gpus() -> list[Gpu]:
    rows = nvidia_smi("--query-gpu=uuid,memory.total,name")
    if rows is None:
        return _driver_gpus()
    return [Gpu(uuid, name, int(mebibytes) << 20 if mebibytes.isdigit() else 0) for uuid, mebibytes, name in rows]


def nvidia_smi(query: str) -> list[list[str]] | None:
    """The rows that nvidia-smi answers to ``query``; None where there is none, or it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    fields = query.count(",") + 1
    try:
        answer = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"], check=False, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return None
    rows = ([cell.strip() for cell in line.split(",", fields - 1)] for line in answer.stdout.splitlines())
    return [row for row in rows if len(row) == fields]


def _driver_gpus() -> list[Gpu]:
    """From the driver's own files; one whose device node a container hides is left out."""
    found = []
    for path in sorted(DRIVER.glob("*/information")):
        try:
            text = path.read_text()
        except OSError:
            continue
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", text, flags=re.MULTILINE))
        if Path(f"/dev/nvidia{fields.get('Device Minor', '')}").exists():
            found.append(Gpu(fields.get("GPU UUID", ""), fields.get("Model", "GPU")))
    return found


def unshareable_memory(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable and its setting that have torch's allocator take memory which CUDA IPC cannot share; else None."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        for setting in ("expandable_segments:True", "backend:cudaMallocAsync"):
            if re.search(setting.replace(":", r"\s*:\s*"), environment.get(name, ""), flags=re.IGNORECASE):
                return name, setting
    return None


def usable_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def available_memory_bytes() -> int:
    """Memory that new processes can take without swapping, within the container's limit."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), flags=re.MULTILINE))
    available = int(fields["MemAvailable"]) * 1024
    for limit in CGROUP_LIMITS:
        try:
            available = min(available, int(limit.read_text()))
        except (OSError, ValueError):  # no such cgroup, or its limit is "max"
            continue
    return available


def free_bytes(path: Path = SHARED_MEMORY) -> int:
    """Free space where ``path`` is, or would be made. Raises ``OSError`` when even its root cannot be read."""
    return shutil.disk_usage(existing_ancestor(path)).free


def existing_ancestor(path: Path) -> Path:
    """``path`` itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
