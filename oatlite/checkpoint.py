"""Checkpoints as folders that are complete or absent, and are what was written.

A checkpoint is written beside its place, each file hashed and synced to disk, then its manifest, then it is renamed:
``checkpoints/step-000120`` is complete if it exists. What a killed run left half written has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from oatlite.errors import CheckpointError, StorageError, is_full, system_error
from oatlite.output_folder import sync

MANIFEST = "manifest.json"
FORMAT = 2
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".writing-"
_DOOMED = ".removing-"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint by its path within: size in bytes and BLAKE2b-256 of the content."""

    name: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint; ``about`` is what was saved with it: numbers, texts, and tables of these."""

    folder: Path
    step: int
    about: dict[str, Any]
    files: tuple[FileRecord, ...]

    def verify(self) -> None:
        """Read every file. Raises CheckpointError naming the first that is missing, torn or changed."""
        for record in self.files:
            path = self.folder / record.name
            try:
                size = path.stat().st_size
                digest = _digest(path) if size == record.num_bytes else ""
            except OSError as error:
                raise self._damaged(f"{path} cannot be read: {error.strerror}") from error
            if size != record.num_bytes:
                raise self._damaged(f"{path} has {size} bytes, and {record.num_bytes} were written")
            if digest != record.digest:
                raise self._damaged(f"{path} is not what was written")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(what, _older_than(self.folder, self.step))


def _older_than(folder: Path, step: int) -> str:
    older = [other for other in steps_of(folder.parent) if other < step]
    return f"add --from-step {older[0]}, the checkpoint before it" if older else "there is no older checkpoint"


class CheckpointWriter:
    """One process's part of a checkpoint of ``step`` under ``root``.

    The processes that write one together each call :meth:`begin` (the first of them before all others), write their
    files, and give their ``records`` to the first, which calls :meth:`complete`. ``or_else`` is what helps on a full
    disk besides more space.
    """

    def __init__(self, root: Path, step: int, *, or_else: str = ", or go on with --set checkpoint.keep_last=1") -> None:
        self.folder = root / f"{_UNFINISHED}{name_of(step)}"
        self.records: list[FileRecord] = []
        self._final = root / name_of(step)
        self._or_else = or_else

    def begin(self) -> None:
        """Make the folder anew. Raises StorageError if the disk refuses."""
        with self._storage_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def adopt(self, written: Path) -> None:
        """Begin with what a library wrote into the folder ``written`` beside this one, hashed and synced from there."""
        with self._storage_errors(written):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(written, self.folder)
            paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
            # Other ranks wait meanwhile, and they do not wait for ever.
            with ThreadPoolExecutor() as threads:
                self.records += threads.map(self._adopted, paths)

    def _adopted(self, path: Path) -> FileRecord:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return FileRecord(path.relative_to(self.folder).as_posix(), path.stat().st_size, _digest(path))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A new file of the checkpoint to write from start to end; on disk when the block ends.

        Raises StorageError with the space that is left if the disk refuses.
        """
        path = self.folder / name
        with self._storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                hashing = _HashingFile(file)
                yield cast(BinaryIO, hashing)
                file.flush()
                os.fsync(file.fileno())
        self.records.append(FileRecord(name, hashing.num_bytes, hashing.digest()))

    def complete(self, step: int, records: list[FileRecord], about: Mapping[str, Any]) -> None:
        """Write the manifest over all processes' ``records`` and give the folder its name."""
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": [{"name": r.name, "num_bytes": r.num_bytes, "digest": r.digest} for r in records],
            "about": dict(about),
        }
        with self.open(MANIFEST) as file:
            file.write(json.dumps(manifest | {"digest": _digest_of_manifest(manifest)}, indent=1).encode())
        with self._storage_errors(self._final):
            for folder in {(self.folder / r.name).parent for r in records} | {self.folder}:
                sync(folder)
            # A run that was resumed from before this step makes it again.
            _remove(self._final)
            os.rename(self.folder, self._final)
            for folder in (self._final.parent, self._final.parent.parent):
                sync(folder)

    @contextmanager
    def _storage_errors(self, path: Path) -> Iterator[None]:
        """Also for what a library makes of an error of the disk on its way through."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            cause = system_error(error)
            if cause is None:
                raise
            fix = "give the run a folder that can be written to"
            if is_full(cause):
                fix = f"{self._space()}; free more{self._or_else}"
            raise StorageError(f"cannot write {path}: {cause.strerror or cause}", fix) from error

    def _space(self) -> str:
        """Bytes needed and free, where what is half written counts as free, because it goes when the run goes on."""
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        place = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        free = shutil.disk_usage(place).free + written
        before = steps_of(self._final.parent)
        if not before:
            return f"a checkpoint takes more than {written} bytes and {free} are free"
        last = self._final.with_name(name_of(before[0]))
        needed = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        return f"a checkpoint takes {needed} bytes and {free} are free"


def checkpoints_of(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def complete(root: Path) -> list[Checkpoint]:
    """The complete checkpoints under ``root``, newest first. Raises CheckpointError for an unreadable manifest."""
    return [read(root / name_of(step)) for step in steps_of(root)]


def steps_of(root: Path) -> list[int]:
    """The steps of the complete checkpoints under ``root``, newest first, by their names alone."""
    names = (_NAME.fullmatch(path.name) for path in (root.iterdir() if root.is_dir() else ()))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def unfinished(root: Path) -> list[Path]:
    """What runs that were killed while saving have left, or while removing a checkpoint."""
    return sorted(path for mark in (_UNFINISHED, _DOOMED) for path in root.glob(f"{mark}*"))


def prune(root: Path, keep_last: int, *, newer_than: int | None = None) -> None:
    """Remove all but the ``keep_last`` newest, what is half written, and what is ``newer_than`` a step, if given."""
    for path in unfinished(root):
        shutil.rmtree(path, ignore_errors=True)
    steps = steps_of(root)
    kept = [step for step in steps if newer_than is None or step <= newer_than][:keep_last]
    for step in steps:
        if step not in kept:
            _remove(root / name_of(step))


def _remove(folder: Path) -> None:
    """Its name goes first, so that a removal that is interrupted leaves nothing that looks complete."""
    doomed = folder.with_name(f"{_DOOMED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, by its manifest alone. Raises CheckpointError where that cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has the format {manifest['format']}, and this version reads {FORMAT}")
        if manifest.pop("digest") != _digest_of_manifest(manifest) or name_of(manifest["step"]) != folder.name:
            raise ValueError("another manifest was written")
        files = tuple(FileRecord(f["name"], int(f["num_bytes"]), f["digest"]) for f in manifest["files"])
        return Checkpoint(folder=folder, step=int(manifest["step"]), about=manifest["about"], files=files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = _NAME.fullmatch(folder.name)
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read: {type(error).__name__}",
            _older_than(folder, int(name[1])) if name else "",
        ) from error


class _HashingFile:
    """The writing half of a file, as far as what saves into it needs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.blake2b(digest_size=32)
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def _digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """Of what it says, in whatever order and however set; ``digest`` itself is not in it."""
    said = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(said.encode(), digest_size=32).hexdigest()


def _digest(path: Path) -> str:
    found = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
