"""What a check says, and the exit code of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from oatlite.errors import ConfigError, StorageError

Status = Literal["ok", "warning", "problem", "skipped"]
STORAGE = frozenset({"shared-memory", "disk"})


class Finding(NamedTuple):
    """``name`` is stable, ``detail`` what was found, and ``fix`` what to type (empty where nothing is wrong).

    A problem keeps a run from working, a warning makes it slow, fragile or costly; what could not be looked at is
    skipped.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """0 without a problem, 5 where all problems are of storage, else 2."""
    problems = {finding.name for finding in findings if finding.status == "problem"}
    if not problems:
        return 0
    return StorageError.exit_code if problems <= STORAGE else ConfigError.exit_code
