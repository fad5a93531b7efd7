"""A folder that a command writes is complete or absent, never half there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oatlite.errors import ConfigError, StorageError


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
    """Yield a temporary sibling of ``path`` to write into, and rename it to ``path`` when the block succeeds.

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
        _rename(work, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):  # safetensors says so in words alone
            raise
        raise StorageError(f"cannot write {path}: {full}", "free space on that disk") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename(work: Path, path: Path) -> None:
    try:
        os.rename(work, path)
    except OSError:
        if not (path.is_dir() and any(path.iterdir())):
            raise


def umask() -> int:
    """The bits that new files of this process are made without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
