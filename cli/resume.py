"""``oatlite resume``: a stopped run goes on from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oatlite.hardware import gpu_names


def resume(
    run: Annotated[Path, typer.Argument(help="folder of the run", metavar="RUN", show_default=False)],
    from_step: Annotated[
        int | None, typer.Option(help="an older checkpoint; default: the newest", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="an option that does not change the course of the run, such as timeouts.*",
            metavar="SECTION.KEY=VALUE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Go on with a stopped run from its last checkpoint.

    It comes to the same end as if it had never stopped.
    """
    from oatlite.resuming import resume as go_on

    raise typer.Exit(go_on(run, from_step=from_step, sets=sets or (), num_gpus=len(gpu_names())))
