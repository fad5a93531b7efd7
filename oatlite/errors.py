"""One exception per cause of a run's end, each with its exit code and the words that name the fix."""

from __future__ import annotations

import errno
import os


class OatliteError(Exception):
    """A failure that a person can act on.

    ``str(error)`` is one line: what is wrong, where, and (``fix``) what to type instead.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = " ".join(message.split())
        self.fix = " ".join(fix.split())
        super().__init__(self.message, self.fix)

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message


class ConfigError(OatliteError):
    """The configuration or an input that it names cannot be used."""

    exit_code = 2


class WorkerDied(OatliteError):
    """A worker process ended and could not be replaced."""

    exit_code = 3


class CheckpointError(OatliteError):
    """A checkpoint is missing, torn or does not fit."""

    exit_code = 4


class StorageError(OatliteError):
    """A disk or shared memory is full or refuses a write."""

    exit_code = 5


class OracleError(OatliteError):
    """The oracle failed past its retries, or its answers cannot be used."""

    exit_code = 6


class DeadlineExceeded(OatliteError):
    """A peer did not answer before its deadline."""

    exit_code = 7


FREE_SPACE = "free space on that disk"
_FULL = os.strerror(errno.ENOSPC)

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

BY_EXIT_CODE: dict[int, type[OatliteError]] = {
    cls.exit_code: cls
    for cls in (ConfigError, WorkerDied, CheckpointError, StorageError, OracleError, DeadlineExceeded)
}


def as_storage_error(error: BaseException) -> StorageError | None:
    """What an error comes to that was raised over a full disk; ``None`` for any other."""
    cause = system_error(error)
    if cause is None or not is_full(cause):
        return None
    where = f"cannot write {cause.filename}: " if cause.filename else ""
    return StorageError(f"{where}{cause.strerror}", FREE_SPACE)


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that ``error`` is or was raised over: of several, that of a full disk, which
    some libraries tell in words alone."""
    found: OSError | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            found = cause if found is None or is_full(cause) else found
        elif found is None and _FULL in str(cause):
            found = OSError(errno.ENOSPC, _FULL)
        cause = cause.__cause__ or cause.__context__
    return found


def is_full(error: OSError) -> bool:
    """Whether a disk, or what a user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
