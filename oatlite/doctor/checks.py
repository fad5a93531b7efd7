"""One small function per check: from what was read of the machine to a finding, with what mends it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from packaging.specifiers import SpecifierSet

from oatlite.config.flags import to_type
from oatlite.config.schema import SyncConfig
from oatlite.doctor.findings import Finding, Status
from oatlite.doctor.machine import GpuState, Limit, Machine, Package, Space
from oatlite.hardware import existing_ancestor, unshareable_memory
from oatlite.launcher import LONGEST_BASE_BYTES
from oatlite.leftovers import Leftovers

GIB = 1 << 30
NAMED = ("torch", "vllm", "deepspeed", "transformers")
"""Packages with a line of their own; the others share one."""
BUFFER_BYTES = 2 * SyncConfig().bucket_mib << 20
"""Two buckets of weights, of the size that is the default: a model that needs more than one takes this much."""
GPU_SHARE = 0.35
"""A GPU with less of it free is somebody else's: a run's own share depends on its models, and is not known here."""
DISK_NEEDED, DISK_WANTED = 1 * GIB, 32 * GIB
"""With 16 bytes a parameter, two checkpoints of a model of a billion parameters; a new one is made beside the last."""
MEMORY_NEEDED, MEMORY_WANTED = 3 * GIB, 8 * GIB
FILES_NEEDED, FILES_WANTED = 256, 1024
THREADS_NEEDED, THREADS_WANTED = 128, 1024


def findings(machine: Machine) -> list[Finding]:
    return [check_python(machine), *check_packages(machine), *(check(machine) for check in CHECKS)]


# Software


def check_python(machine: Machine) -> Finding:
    if SpecifierSet(machine.wanted_python).contains(machine.python, prereleases=True):
        return Finding("python", "ok", machine.python)
    return Finding(
        "python",
        "problem",
        f"{machine.python}, and oatlite is tested with {machine.wanted_python}",
        "python3.11 cli/bootstrap.py setup",
    )


def check_packages(machine: Machine) -> list[Finding]:
    """A finding for each package of :data:`NAMED`, and one for all others that oatlite declares."""
    if not machine.packages:
        fix = f"{shlex.quote(machine.interpreter)} -m pip install ."
        return [Finding("packages", "problem", "oatlite is not installed: nothing says what it needs", fix)]
    by_name = {package.name.removesuffix("-cpu"): package for package in machine.packages}
    found = [_check_package(name, by_name[name], machine) for name in NAMED]
    others = [package for name, package in by_name.items() if name not in NAMED]
    wrong = [package for package in others if not package.fits]
    if wrong:
        detail = ", ".join(_version(package) for package in wrong)
        return [*found, Finding("packages", "problem", detail, _pip(machine, wrong))]
    return [*found, Finding("packages", "ok", f"{len(others)} others, all in their tested ranges")]


def _check_package(name: str, package: Package, machine: Machine) -> Finding:
    if name == "vllm" and package.installed is not None and machine.engine_fault is not None:
        return Finding(name, "problem", machine.engine_fault.message, machine.engine_fault.fix.removeprefix("type "))
    if package.fits:
        build = " for CPUs" if package.name.endswith("-cpu") else ""
        return Finding(name, "ok", f"{package.installed}{build} (tested: {package.wanted})")
    if name in ("torch", "vllm"):  # builds for a CPU and for GPUs lie in different places
        kind = "--gpu" if machine.num_gpus else "--cpu"
        return Finding(name, "problem", _version(package), f"python3 cli/bootstrap.py {kind} setup")
    return Finding(name, "problem", _version(package), _pip(machine, [package]))


def _version(package: Package) -> str:
    if package.installed is None:
        return f"{package.name} is not installed (tested: {package.wanted})"
    return f"{package.name} {package.installed} is not in the tested range {package.wanted}"


def _pip(machine: Machine, packages: Iterable[Package]) -> str:
    wanted = " ".join(shlex.quote(f"{package.name}{package.wanted}") for package in packages)
    return f"{shlex.quote(machine.interpreter)} -m pip install {wanted}"


# GPUs


def check_gpus(machine: Machine) -> Finding:
    if not machine.gpus:
        if machine.num_gpus:
            hidden = f"{machine.num_gpus} here, hidden by CUDA_VISIBLE_DEVICES"
            return Finding("gpus", "warning", f"{hidden}: a run uses the CPU", "unset CUDA_VISIBLE_DEVICES")
        return Finding("gpus", "skipped", "none: a run uses the CPU")
    if machine.torch is not None and len(machine.torch.devices) < len(machine.gpus):
        seen = f"torch {machine.torch.version} sees {len(machine.torch.devices)} of {len(machine.gpus)}"
        if machine.torch.cuda is None:
            return Finding("gpus", "problem", f"{seen}: it is built for CPUs", "python3 cli/bootstrap.py --gpu setup")
        return Finding("gpus", "problem", seen, 'python3 -c "import torch; torch.cuda.init()"  # says why')
    detail = "; ".join(_gpu(number, gpu) for number, gpu in enumerate(machine.gpus))
    full = [number for number, gpu in enumerate(machine.gpus) if gpu.free_bytes < GPU_SHARE * gpu.total_bytes]
    used = [number for number, gpu in enumerate(machine.gpus) if gpu.free_bytes < 0.9 * gpu.total_bytes]
    if not used:
        return Finding("gpus", "ok", detail)
    return Finding("gpus", "problem" if full else "warning", detail, _free_gpus(machine.gpus, full or used))


def _gpu(number: int, gpu: GpuState) -> str:
    if not gpu.total_bytes:
        return f"{number} {gpu.name}, memory unknown"
    users = ", ".join(
        f"{process.name} {process.pid}"
        + (f": {_gib(process.used_bytes)} GiB" if process.used_bytes is not None else "")
        for process in gpu.processes
    )
    free = f"{number} {gpu.name}: {_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} GiB free"
    return f"{free} (used by {users})" if users else free


def _free_gpus(gpus: Sequence[GpuState], used: Sequence[int]) -> str:
    processes = sorted({process.pid for number in used for process in gpus[number].processes})
    numbers = " ".join(map(str, processes))
    fix = f"kill {numbers}  # if that is yours" if processes else "nvidia-smi  # says who uses it"
    others = [number for number in range(len(gpus)) if number not in used]
    if others:
        fix += f", or export CUDA_VISIBLE_DEVICES={','.join(map(str, others))}"
    return fix


def check_driver(machine: Machine) -> Finding:
    if not machine.num_gpus:
        return Finding("driver", "skipped", "not checked: no GPU")
    runs = ".".join(map(str, machine.driver_cuda)) if machine.driver_cuda else "of a version that it does not tell"
    detail = f"{machine.driver or 'version unknown'}, runs CUDA {runs}"
    built = machine.torch.cuda if machine.torch is not None else None
    if built is None:
        return Finding("driver", "ok", detail)
    detail += f"; torch is built for {built}"
    # Within a major version of CUDA, a newer build runs on an older driver.
    if machine.driver_cuda is not None and machine.driver_cuda[0] < int(built.partition(".")[0]):
        return Finding(
            "driver", "problem", detail, f"sudo apt-get install cuda-drivers  # NVIDIA's, for CUDA {built} or later"
        )
    return Finding("driver", "ok", detail)


def check_peers(machine: Machine) -> Finding:
    if machine.torch is None or len(machine.torch.devices) < 2:
        why = "one GPU" if len(machine.gpus) == 1 else "torch does not see them" if machine.gpus else "no GPU"
        return Finding("peer-access", "skipped", f"not checked: {why}")
    if not machine.torch.apart:
        return Finding("peer-access", "ok", f"each of {len(machine.torch.devices)} GPUs reaches the others")
    pairs = ", ".join(f"{first}-{second}" for first, second in machine.torch.apart)
    detail = f"GPUs {pairs} reach each other through host memory alone, and learner ranks on them are slower"
    return Finding("peer-access", "warning", detail, "nvidia-smi topo -p2p r  # says why; an IOMMU may be in the way")


def check_allocator(machine: Machine) -> Finding:
    found = unshareable_memory(machine.environment)
    if found is None:
        return Finding("allocator", "ok", "no setting that breaks CUDA IPC")
    variable, setting = found
    detail = f"{variable} has {setting}, which CUDA IPC cannot share"
    fix = f"unset {variable}, or {to_type('sync.transport', 'shm')}"
    return Finding("allocator", "problem" if machine.num_gpus else "warning", detail, fix)


# Storage


def check_shared_memory(machine: Machine) -> Finding:
    space = machine.shared_memory
    detail = _room(space)
    if space.free_bytes >= BUFFER_BYTES:
        return Finding("shared-memory", "ok", detail)
    detail += f"; a buffer of weights takes up to {_gib(BUFFER_BYTES)}"
    if space.total_bytes < 2 * BUFFER_BYTES:
        fix = f"sudo mount -o remount,size=2G {space.path}, or docker run --shm-size=2g"
    else:
        fix = f"ls -lS {space.path}  # remove what you do not need"
    # With a GPU, weights go by CUDA IPC as a rule.
    return Finding("shared-memory", "warning" if machine.gpus else "problem", detail, fix)


def check_disk(machine: Machine) -> Finding:
    space = machine.disk
    folder = shlex.quote(str(existing_ancestor(space.path)))
    elsewhere = f"oatlite train {to_type('run.dir', '/another/disk')}"
    if not space.is_writable:
        return Finding("disk", "problem", f"{space.path} cannot be written", elsewhere)
    if not space.num_files:
        fix = f"du --inodes -x {folder} | sort -n | tail  # where files are many, or {elsewhere}"
        return Finding("disk", "problem", f"no more files can be made in {space.path}", fix)
    if space.free_bytes >= DISK_WANTED:
        return Finding("disk", "ok", _room(space))
    detail = f"{_room(space)}; two checkpoints of a billion parameters take {_gib(DISK_WANTED)}"
    fix = f"du -xh {folder} | sort -h | tail  # what is large, or {elsewhere}"
    return Finding("disk", "problem" if space.free_bytes < DISK_NEEDED else "warning", detail, fix)


def _room(space: Space) -> str:
    return f"{_gib(space.free_bytes)} of {_gib(space.total_bytes)} GiB free in {space.path}"


# Limits


def check_memory(machine: Machine) -> Finding:
    available = machine.memory_available
    detail = f"{_gib(available)} of {_gib(machine.memory_total)} GiB available"
    if machine.memory_limit is not None:
        available = min(available, machine.memory_limit.limit - machine.memory_limit.used)
        detail = (
            f"{_gib(available)} GiB available, within a container's limit of {_gib(machine.memory_limit.limit)} GiB "
            f"on a machine of {_gib(machine.memory_total)}"
        )
    if available >= MEMORY_WANTED:
        return Finding("memory", "ok", detail)
    fix = "ps aux --sort=-rss | head  # end what you do not need"
    if machine.memory_limit is not None and machine.memory_limit.limit < MEMORY_WANTED:
        fix = f"docker run --memory={_gib(2 * MEMORY_WANTED)}g ..."
    return Finding("memory", "problem" if available < MEMORY_NEEDED else "warning", detail, fix)


def check_cores(machine: Machine) -> Finding:
    detail = f"{machine.cores}, with a load of {machine.load:.1f}"
    if machine.core_quota is not None and machine.core_quota < machine.cores:
        whole = max(1, int(machine.core_quota))
        detail += f"; a container's limit gives the time of {machine.core_quota:g}, and a run starts a thread for each"
        return Finding("cores", "warning", detail, f"taskset -c 0-{whole - 1} oatlite train ...")
    processes = 2 * max(1, len(machine.gpus))
    if machine.cores < processes:
        detail += f"; learners and actors are {processes}, and share them"
        return Finding(
            "cores", "warning", detail, f"docker run --cpus={processes} ..., or sbatch --cpus-per-task={processes} ..."
        )
    return Finding("cores", "ok", detail)


def check_open_files(machine: Machine) -> Finding:
    limit = machine.open_files
    if _is_at_least(limit.soft, FILES_WANTED):
        return Finding("open-files", "ok", f"{_shown(limit.soft)} to a process")
    status: Status = "warning" if _is_at_least(limit.soft, FILES_NEEDED) else "problem"
    return Finding("open-files", status, f"{limit.soft} to a process; {FILES_WANTED} are enough", _raise("n", limit))


def _raise(letter: str, limit: Limit) -> str:
    wanted = {"n": 65536, "u": 65536}[letter]
    if _is_at_least(limit.hard, FILES_WANTED):
        return f"ulimit -{letter} {wanted if _is_at_least(limit.hard, wanted) else limit.hard}"
    name = {"n": "nofile", "u": "nproc"}[letter]
    return f"sudo prlimit --pid $$ --{name}={wanted}, or docker run --ulimit {name}={wanted}"


def check_locked_memory(machine: Machine) -> Finding:
    soft = machine.locked_memory.soft
    shown = "no limit" if soft == -1 else f"{soft // 1024} KiB"
    if not machine.has_infiniband or soft == -1:
        matters = "" if soft == -1 else "; it matters with InfiniBand alone, and there is none"
        return Finding("locked-memory", "ok", shown + matters)
    detail = f"{shown}, and InfiniBand registers what it sends"
    return Finding("locked-memory", "warning", detail, "ulimit -l unlimited, or docker run --ulimit memlock=-1")


def check_processes(machine: Machine) -> Finding:
    """Threads count as processes."""
    limit, group = machine.process_limit, machine.process_group
    left = None if limit.soft == -1 else limit.soft - machine.num_user_threads
    detail = f"{machine.num_user_threads} threads of {_shown(limit.soft)}"
    fix = _raise("u", limit)
    if group is not None and (left is None or group.limit - group.used < left):
        left = group.limit - group.used
        detail = f"{group.used} threads of {group.limit} in this container"
        fix = "docker run --pids-limit=-1 ..."
    if left is None or left >= THREADS_WANTED:
        return Finding("processes", "ok", detail)
    return Finding("processes", "problem" if left < THREADS_NEEDED else "warning", f"{detail}, {left} left", fix)


def check_socket_path(machine: Machine) -> Finding:
    """Of the folder for temporary files, where a run's sockets lie."""
    asked = machine.environment.get("TMPDIR")
    if not machine.base_is_writable:
        detail = f"{machine.base} cannot be written, and the sockets of a run go there"
        return Finding("socket-path", "problem", detail, "export TMPDIR=/a/short/folder")
    if machine.base != machine.temporary:
        num_bytes = len(str(machine.temporary).encode())
        detail = f"TMPDIR has {num_bytes} bytes, more than the {LONGEST_BASE_BYTES} that leave room for a socket's name"
        return Finding("socket-path", "warning", f"{detail}; {machine.base} is used", f"export TMPDIR={machine.base}")
    if asked and machine.temporary.absolute() != Path(asked).absolute():
        detail = f"TMPDIR={asked} cannot be used; {machine.base} is"
        return Finding("socket-path", "warning", detail, f"mkdir -p {shlex.quote(asked)}, or unset TMPDIR")
    return Finding("socket-path", "ok", f"{machine.base}, short enough")


# What dead runs left


def check_leftovers(machine: Machine) -> Finding:
    found = machine.leftovers
    if found.segments or found.folders:
        return Finding("leftovers", "warning", f"of dead runs: {_left(found)}", "oatlite doctor --clean")
    removed = machine.removed
    if removed is not None and (removed.segments or removed.folders):
        return Finding("leftovers", "ok", f"removed {_left(removed)}")
    return Finding("leftovers", "ok", "none of dead runs")


def _left(found: Leftovers) -> str:
    parts = []
    if found.segments:
        parts.append(f"{_count(found.segments, 'segment')} of {found.num_bytes / (1 << 20):.1f} MiB in shared memory")
    if found.folders:
        parts.append(f"{_count(found.folders, 'socket folder')}")
    return " and ".join(parts)


def check_orphans(machine: Machine) -> Finding:
    processes = machine.leftovers.processes
    if processes:
        numbers = " ".join(str(process.pid) for process in processes)
        detail = f"{_count(processes, 'process', 'es')} of dead runs still there: {numbers}"
        return Finding("orphans", "problem", detail, "oatlite doctor --clean")
    if machine.removed is not None and machine.removed.processes:
        return Finding("orphans", "ok", f"ended {_count(machine.removed.processes, 'process', 'es')} of dead runs")
    return Finding("orphans", "ok", "no process of a dead run")


def _count(items: Sequence[object], noun: str, plural: str = "s") -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else plural}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.{0 if num_bytes >= 100 * GIB or num_bytes % GIB == 0 else 1}f}"


def _is_at_least(limit: int, wanted: int) -> bool:
    return limit == -1 or limit >= wanted


def _shown(limit: int) -> str:
    return "no limit" if limit == -1 else str(limit)


CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_gpus,
    check_driver,
    check_peers,
    check_allocator,
    check_shared_memory,
    check_disk,
    check_memory,
    check_cores,
    check_open_files,
    check_locked_memory,
    check_processes,
    check_socket_path,
    check_leftovers,
    check_orphans,
)
