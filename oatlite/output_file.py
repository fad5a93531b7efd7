"""A file that a command writes is complete or absent, never half there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oatlite.errors import ConfigError, StorageError
from oatlite.output_folder import umask


def require_writable(path: Path, suffixes: tuple[str, ...], *, overwrite: bool = False) -> None:
    """Raise ConfigError unless ``path`` has one of ``suffixes``, is absent (or a file that may be overwritten), and
    something can be written beside it."""
    if path.suffix not in suffixes:
        raise ConfigError(
            f"--output {path} is no {' or '.join(suffixes)} file", f"name it {path.with_suffix(suffixes[0]).name}"
        )
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder", "name a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists", "name another file, or type --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write beside --output {path}: {error.strerror}", "name another file") from None


def write_complete(path: Path, text: Iterable[str], *, overwrite: bool = False) -> None:
    """Write the pieces of ``text`` aside, and rename that to ``path``. Raises StorageError if the disk refuses, or
    where somebody else has made ``path`` meanwhile and it is not to be overwritten."""
    work: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            work = Path(file.name)
            file.writelines(text)
            file.flush()
            os.fsync(file.fileno())
        work.chmod(0o666 & ~umask())
        if path.exists() and not overwrite:
            raise StorageError(f"{path} was made by somebody else meanwhile, and stays as it is")
        work.rename(path)
        work = None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if work is not None:
            work.unlink(missing_ok=True)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
