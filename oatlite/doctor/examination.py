"""The whole examination, in the order in which a person reads it."""

from __future__ import annotations

from pathlib import Path

from oatlite import leftovers
from oatlite.doctor.checks import findings
from oatlite.doctor.findings import Finding
from oatlite.doctor.machine import read
from oatlite.doctor.trial import try_transports


def examine(run_dir: Path, *, clean: bool) -> list[Finding]:
    """Look at this machine, where runs go below ``run_dir``. With ``clean``, what dead runs left is removed first."""
    removed = leftovers.clean() if clean else None
    trial = try_transports()
    return [*findings(read(run_dir, trial.torch, removed)), *trial.findings]
