"""A run, from its resolved configuration to its end: checked, given a folder, shown, supervised, summed up."""

from __future__ import annotations

import time
from pathlib import Path

from oatlite.checkpoint import Checkpoint, name_of, steps_of, unfinished
from oatlite.config.schema import Config
from oatlite.demo.settings import with_demo
from oatlite.errors import OatliteError, as_storage_error
from oatlite.launcher import LocalLauncher
from oatlite.metrics.console import Console, open_console
from oatlite.preflight import check
from oatlite.resuming import how_to_go_on, require_same_run
from oatlite.run_folder import create_run_dir, held, remove_half_written, summary
from oatlite.supervisor import Supervisor

SEGMENT_PREFIX = "oatlite-"


def train(config: Config, checkpoint: Checkpoint | None = None) -> int:
    """Run a resolved configuration to its end, from its start or from a ``checkpoint`` of the same run.

    Returns 0, or raises the OatliteError that ended the run.
    """
    effective = with_demo(config)
    plan = check(effective)
    if checkpoint is None:
        run_dir = create_run_dir(config)
    else:
        run_dir = checkpoint.folder.parents[1].resolve()
        require_same_run(checkpoint, effective, plan.fingerprints)
    title = f"{run_dir.name}  {config.algorithm.name}  {config.model.path}"
    with (
        held(run_dir),
        LocalLauncher(SEGMENT_PREFIX) as launcher,
        open_console(config.run.ui, title=title, total_steps=plan.total_steps) as console,
    ):
        if plan.num_dropped:
            console.note(_dropped(config, plan.num_dropped))
        for note in plan.notes:
            console.note(note)
        if checkpoint is not None:
            _tell_what_goes(checkpoint, run_dir, console)
        started = time.monotonic()
        try:
            Supervisor(effective, plan, run_dir, launcher, console, checkpoint).run()
        except (OatliteError, OSError) as error:
            known = error if isinstance(error, OatliteError) else as_storage_error(error)
            if known is None:
                raise
            known.fix = "; ".join(part for part in (known.fix, how_to_go_on(run_dir)) if part)
            raise known from error.__cause__
        last_step = console.history.last_step
        if not last_step and checkpoint is not None:  # resumed after its last step, for the model alone
            last_step = {"step": checkpoint.step, "queries": checkpoint.about["progress"]["num_queries"] or None}
        console.close(summary(config, last_step, run_dir, time.monotonic() - started))
    return 0


def _tell_what_goes(checkpoint: Checkpoint, run_dir: Path, console: Console) -> None:
    """Of what the run that is resumed has left: what is not complete, and what is done again. The first rank removes
    checkpoints, once it has taken up the run."""
    names = [path.name for path in unfinished(checkpoint.folder.parent)]
    for name in names + remove_half_written(run_dir):
        console.note(f"{name} was not complete when its run ended, and is skipped")
    newer = [name_of(step) for step in steps_of(checkpoint.folder.parent) if step > checkpoint.step]
    if newer:
        console.note(f"{', '.join(newer)} will be removed: the run goes on from before, and Ctrl-C now keeps them")
    console.note(f"resuming after step {checkpoint.step}")


def _dropped(config: Config, num: int) -> str:
    if config.rollout.offline:
        return f"{num} pairs had something empty or too long, or two equal answers, and are left out"
    return f"{num} prompts were empty or too long and are left out"
