"""Which checkpoint a stopped run goes on from, and whether it is still the same run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oatlite.checkpoint import Checkpoint, checkpoints_of, name_of, read, steps_of
from oatlite.config.flags import program
from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config
from oatlite.errors import CheckpointError, ConfigError

# What may differ between a run and its continuation: it changes nothing that is learned.
FREE_SECTIONS = ("run", "timeouts", "checkpoint", "sync", "remote")
FREE_KEYS = (
    "eval.every",
    "eval.every_queries",
    "eval.url",
    "eval.token_env",
    "eval.judge_url",
    "eval.judge_key_env",
    "judge.url",
    "judge.key_env",
    "judge.concurrency",
    "judge.timeout_s",
    "oracle.batch_tokens",
    "placement.gpus",
    "placement.actors",
    "placement.gpus_per_actor",
    "placement.gpu_memory_utilization",
    "placement.sleep",
    "placement.kv_cache_gib",
)
NEVER_FREE = ("run.seed",)


def resume(run: Path, *, from_step: int | None, sets: Sequence[str], num_gpus: int) -> int:
    """Go on with the run in the folder ``run``, from its newest checkpoint or that of ``from_step``.

    Raises ConfigError where there is no run to go on with, CheckpointError where no checkpoint can be used.
    """
    from oatlite.run import train

    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} is no folder of a run", "type the folder that holds its config.toml")
    if (run / "model").exists():
        raise ConfigError(f"the run {run} is finished", f"its model is {run / 'model'}")
    folder = run.resolve()
    flags = {"run.name": folder.name, "run.dir": str(folder.parent)}
    config = resolve(
        load_config(file=run / "config.toml", flags=flags, sets=sets, num_gpus=num_gpus), num_gpus, is_resumed=True
    )
    checkpoint = choose(checkpoints_of(folder), from_step)
    checkpoint.verify()
    return train(config, checkpoint)


def choose(root: Path, from_step: int | None) -> Checkpoint:
    """The newest checkpoint under ``root``, or that of ``from_step``. Raises CheckpointError if there is none."""
    steps = steps_of(root)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {root}", "start the run again, with a smaller --save-every")
    if from_step is None:
        return read(root / name_of(steps[0]))
    if from_step in steps:
        return read(root / name_of(from_step))
    there = ", ".join(map(str, steps))
    raise CheckpointError(f"there is no checkpoint of step {from_step} in {root}", f"there are those of {there}")


def require_same_run(checkpoint: Checkpoint, config: Config, fingerprints: Mapping[str, str]) -> None:
    """Raises ConfigError naming what differs from the run that saved ``checkpoint`` and would change its course."""
    before, now = _flat(checkpoint.about["config"]), _flat(config.model_dump(mode="json"))
    differing = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_free(key)
    ]
    saved = checkpoint.about["fingerprints"]
    differing += [f"the {what} is another one" for what in saved if saved[what] != fingerprints.get(what)]
    if differing:
        raise ConfigError(
            f"the run cannot go on from {checkpoint.folder.name}: {'; '.join(differing)}",
            "give what it was started with, or start a new run with --model",
        )


def how_to_go_on(run_dir: Path) -> str:
    """The command that resumes a run that has just ended, or starts it again where it has no checkpoint."""
    steps = steps_of(checkpoints_of(run_dir))
    if not steps:
        config_file = shlex.quote(shortest_path(run_dir / "config.toml"))
        return f"no step was saved, to start again: {program()} train --config {config_file}"
    return f"to go on from step {steps[0]}: {program()} resume {shlex.quote(shortest_path(run_dir))}"


def shortest_path(path: Path) -> str:
    """``path`` as a person types it: from the current folder where it lies below that."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _is_free(key: str) -> bool:
    return key not in NEVER_FREE and (key in FREE_KEYS or key.partition(".")[0] in FREE_SECTIONS)


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}
