"""``oatlite doctor``: one screen that checks this machine before the night."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import oatlite
from oatlite.config.schema import RunConfig

from .options import setting

if TYPE_CHECKING:
    from oatlite.doctor.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def doctor(
    run_dir: Annotated[str | None, setting("run.dir", "Options")] = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="end the processes of dead runs and remove what they left")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Check this machine before a run, and say what to mend.

    Exit code 0: no problem; 5: problems of storage alone; 2: any other problem. Warnings leave it at 0.
    """
    from oatlite.doctor.examination import examine
    from oatlite.doctor.findings import exit_code

    with _waiting():  # for the processes of the trial, which import torch
        findings = examine(Path(run_dir or RunConfig().dir), clean=clean)
    code = exit_code(findings)
    if as_json:
        told = [finding._asdict() for finding in findings]
        print(json.dumps({"oatlite": oatlite.__version__, "exit_code": code, "findings": told}, indent=2))
    elif sys.stdout.isatty():
        _show(findings)
    else:
        print("\n".join(_line(finding) for finding in findings))
        print(_summary(findings))
    raise typer.Exit(code)


def _waiting() -> AbstractContextManager[object]:
    from rich.console import Console

    return Console(stderr=True).status("looking at this machine, and trying its transports")


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        detail = Text(finding.detail, style="dim" if finding.status == "skipped" else "")
        if finding.fix:
            detail.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.status, style=STYLES[finding.status]), finding.name, detail)
    console = Console(highlight=False)
    console.print(table)
    console.print(_summary(findings), style="bold")


def _line(finding: Finding) -> str:
    fix = f"; fix: {finding.fix}" if finding.fix else ""
    return f"{finding.status:<8} {finding.name}: {finding.detail}{fix}"


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    parts = [
        f"{counts[status] or 'no'} {status}{'' if counts[status] == 1 else 's'}" for status in ("problem", "warning")
    ]
    return ", ".join(parts)
