"""A folder that a command writes is complete or absent, never half there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oatlite.errors import FREE_SPACE, ConfigError, StorageError, is_full, system_error


def require_free(path: Path) -> None:
    """Raise ConfigError unless ``path`` is absent or an empty folder, and something can be written beside it."""
    if (path.exists() or path.is_symlink()) and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"--output {path} exists and is not empty", "name another folder, or remove that one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write beside --output {path}: {error.strerror}", "name another folder") from None


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write into, and rename it to ``path`` when the block succeeds and the
    disk has it.

    Where another process has made ``path`` meanwhile, its folder stays and ours goes; so nobody who reads ``path``
    has it change under them. Raises StorageError if the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise StorageError(f"cannot write beside {path}: {error.strerror}") from error
    try:
        yield work
        work.chmod(0o777 & ~umask())
        _sync_all(work)
        _rename(work, path)
        sync(path.parent)
    except Exception as error:
        cause = system_error(error)
        if cause is None or not (isinstance(error, OSError) or is_full(cause)):
            raise
        fix = f"{_space(work)}; {FREE_SPACE}" if is_full(cause) else ""
        raise StorageError(f"cannot write {path}: {cause.strerror or cause}", fix) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def half_written(path: Path) -> list[Path]:
    """What processes that were killed in the middle of :func:`complete_or_absent` have left of ``path``; what one that
    is alive writes looks the same."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(other for other in beside if left.fullmatch(other.name) and other.is_dir())


def _rename(work: Path, path: Path) -> None:
    try:
        os.rename(work, path)
    except OSError:
        if not (path.is_dir() and any(path.iterdir())):
            raise


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until the disk has what is in a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _space(work: Path) -> str:
    """What is half written counts as free, because it goes."""
    written = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    return f"it takes more than {written} bytes and {shutil.disk_usage(work).free + written} are free"


def umask() -> int:
    """The bits that new files of this process are made without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
