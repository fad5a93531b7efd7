"""What oatlite itself says about the machine, and the tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpu_rows.scale import Scale, Tell

ROOT = Path(__file__).parents[2]


def doctor(scale: Scale, tell: Tell) -> None:
    """The findings of ``oatlite doctor --json``."""
    import oatlite
    from oatlite.doctor.examination import examine

    findings = examine(Path.cwd(), clean=False)
    tell("oatlite", oatlite.__version__, findings=[finding._asdict() for finding in findings])
    for finding in findings:
        if finding.status != "ok" or "cuda" in finding.name:
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            tell(finding.name, f"{finding.status}: {finding.detail}{fix}")


def gpu_tests(scale: Scale, tell: Tell) -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    sys.stderr.write(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    if not lines:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stderr.splitlines() or ['nothing said'])[-1]}")
    is_met = done.returncode == 0 if scale.on_gpu else None
    tell("tests/gpu", lines[-1].strip("= "), is_met=is_met)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")) and not line.endswith("needs a GPU"):
            tell("tests/gpu", line[:300])
