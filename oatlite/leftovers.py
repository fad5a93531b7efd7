"""What dead runs have left on this machine: segments of shared memory, socket folders, processes.

A run's id is in the names of its folder and its segments, and its folder in the environment of its processes. Its
launcher locks the folder, and whoever maps a segment of weights locks that: the kernel drops a lock with its holder,
however that ends, and shows it to a container whose process numbers differ too. Nothing that is locked, or that a
living launcher or reaper answers for, is ever a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from oatlite import reaper
from oatlite.hardware import SHARED_MEMORY
from oatlite.launcher import PREFIX, RUN_VARIABLE, socket_base

PROCESSES = Path("/proc")
YOUNG_S = 5.0
"""What is empty and newer than this may not be locked yet."""
END_S = 10.0

_RUN = f"{PREFIX}(?P<run>[0-9a-f]{{12}})"
_FOLDER = re.compile(_RUN)
_WEIGHTS = re.compile(f"{_RUN}-[0-9a-f]{{16}}")
_UNLOCKED = re.compile(rf"(?:sem\.)?{_RUN}-(?![0-9a-f]{{16}}\Z).+")
"""What vLLM's processes make: semaphores, and on some CPUs segments of its own."""


class Process(NamedTuple):
    """A process of the run whose private folder is ``folder``."""

    pid: int
    folder: Path
    command: str

    @property
    def run_id(self) -> str:
        return self.folder.name.removeprefix(PREFIX)

    def is_led(self) -> bool:
        """Whether the run's launcher lives: it holds the folder, which is looked at as the process itself sees it."""
        return _is_held(PROCESSES / str(self.pid) / "root" / self.folder.relative_to("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """``segments`` are files in shared memory of ``num_bytes`` together; ``folders`` hold a run's sockets."""

    segments: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    processes: tuple[Process, ...] = ()
    num_bytes: int = 0


def find() -> Leftovers:
    """The leftovers of this user's dead runs. What other users left is theirs, and is not looked at."""
    processes, alive = _processes()
    alive |= {process.run_id for process in processes if process.is_led()}
    bases = {socket_base(), Path(tempfile.gettempdir()), Path("/tmp")} | {p.folder.parent for p in processes}
    folders = [(path, run) for path, run in _named(_FOLDER, bases) if path.is_dir()]
    alive |= {run for path, run in folders if _is_held(path)}
    segments = [path for path, run in _named(_WEIGHTS, [SHARED_MEMORY]) if run not in alive and not _is_held(path)]
    # Without a lock of its own it is judged only where the folder of its run shows that the run is dead.
    dead = {run for _, run in folders} - alive
    segments += [path for path, run in _named(_UNLOCKED, [SHARED_MEMORY]) if run in dead]
    return Leftovers(
        segments=tuple(segments),
        folders=tuple(path for path, run in folders if run not in alive),
        processes=tuple(process for process in processes if process.run_id not in alive),
        num_bytes=sum(_size(path) for path in segments),
    )


def clean() -> Leftovers:
    """End the processes of dead runs and remove what is theirs; returns what is gone."""
    before = find()
    ended = _end(before.processes)
    found = find()  # what those processes held is free now
    sizes = {path: _size(path) for path in found.segments}
    removed = [path for path in sizes if _removed(path)]
    return Leftovers(
        segments=tuple(removed),
        folders=tuple(path for path in sorted({*before.folders, *found.folders}) if _removed(path)),
        processes=ended,
        num_bytes=sum(sizes[path] for path in removed),
    )


def _named(pattern: re.Pattern[str], folders: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """This user's entries of ``folders`` with a name like that, and the run that it names."""
    for folder in sorted(folders):
        for entry in sorted(os.listdir(folder)) if folder.is_dir() else ():
            match = pattern.fullmatch(entry)
            with contextlib.suppress(FileNotFoundError):  # gone in the meantime
                if match is not None and (folder / entry).lstat().st_uid == os.getuid():
                    yield folder / entry, match["run"]


def _is_held(path: Path) -> bool:
    """Whether somebody holds the lock of ``path``, or may be about to."""
    with _claimed(path) as is_ours:
        return not is_ours and path.exists()


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether nobody holds ``path``, which then nobody can take for the length of the block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone, or a link, which no run makes
        yield False
        return
    try:
        if _is_empty(descriptor) and time.time() - os.fstat(descriptor).st_mtime < YOUNG_S:
            yield False
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _is_empty(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return not os.listdir(descriptor) if stat.S_ISDIR(status.st_mode) else status.st_size == 0


def _removed(path: Path) -> bool:
    if _UNLOCKED.fullmatch(path.name):
        path.unlink(missing_ok=True)
        return True
    with _claimed(path) as is_ours:
        if not is_ours:
            return False
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return not path.exists()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _processes() -> tuple[list[Process], set[str]]:
    """This user's processes that belong to runs, and the runs that have a reaper."""
    found: list[Process] = []
    reaped: set[str] = set()
    for entry in PROCESSES.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # ended in the meantime, or not ours to read
            words = [os.fsdecode(word) for word in (entry / "cmdline").read_bytes().split(b"\0")][:-1]
            if any(Path(word).name == Path(reaper.__file__).name for word in words[1:4]):
                reaped |= {match["run"] for match in re.finditer(_RUN, " ".join(words))}
                continue
            folder = _folder_of(entry)
            if folder is not None and entry.stat().st_uid == os.getuid() and int(entry.name) != os.getpid():
                found.append(Process(int(entry.name), folder, " ".join(words)))
    return found, reaped


def _folder_of(process: Path) -> Path | None:
    for assignment in (process / "environ").read_bytes().split(b"\0"):
        name, _, value = assignment.partition(b"=")
        folder = Path(os.fsdecode(value))
        if name == RUN_VARIABLE.encode() and folder.is_absolute() and _FOLDER.fullmatch(folder.name):
            return folder
    return None


def _end(processes: Iterable[Process]) -> tuple[Process, ...]:
    """Kill them, by a handle on each that no later process with its number can stand in for."""
    killed: list[tuple[Process, int]] = []
    for process in processes:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(process.pid)
            killed.append((process, handle))
            if _is_running(process):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    deadline = time.monotonic() + END_S
    while any(_is_running(process) for process, _ in killed) and time.monotonic() < deadline:
        time.sleep(0.05)
    for _, handle in killed:
        os.close(handle)
    return tuple(process for process, _ in killed if not _is_running(process))


def _is_running(process: Process) -> bool:
    """A process that has ended, and one that nobody has collected yet, has no environment."""
    try:
        return _folder_of(PROCESSES / str(process.pid)) == process.folder
    except OSError:
        return False
