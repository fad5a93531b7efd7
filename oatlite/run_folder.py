"""The folder of a run: claimed once, held by one supervisor at a time, and what is said of it at the end."""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oatlite.config.dump import dump_toml
from oatlite.config.flags import program
from oatlite.config.resolve import DEFAULT_NAME
from oatlite.config.schema import Config
from oatlite.errors import FREE_SPACE, ConfigError, StorageError, is_full
from oatlite.hardware import free_bytes
from oatlite.output_folder import half_written
from oatlite.resuming import shortest_path

OFFLINE_SYNC_EVERY = 100_000
OUTPUTS = ("adapter", "head", "model")
"""The folders that a run leaves at its end, each complete or absent, in this order: with the last it is finished."""


def create_run_dir(config: Config) -> Path:
    """Claim the run's folder; of runs that start at the same moment under a default name, each gets one of its own."""
    assert config.run.name is not None
    run_dir = Path(config.run.dir) / config.run.name
    try:
        for candidate in (run_dir, *(run_dir.with_name(f"{run_dir.name}-{n}") for n in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                (candidate / "logs").mkdir(parents=True)
                (candidate / "config.toml").write_text(dump_toml(config), encoding="utf-8")
                return candidate.resolve()
            if not DEFAULT_NAME.fullmatch(run_dir.name):
                break
    except OSError as error:
        _give_back(candidate)
        if is_full(error):
            raise StorageError(
                f"cannot write the run folder {run_dir}: {error.strerror}",
                f"{free_bytes(run_dir)} bytes are free; {FREE_SPACE}, or give another --run-dir",
            ) from None
        raise ConfigError(
            f"cannot write the run folder {run_dir}: {error.strerror}", "give another --run-dir"
        ) from None
    raise ConfigError(f"the run folder {run_dir} is in use", "type another --name")


def _give_back(folder: Path) -> None:
    """Undo a claim that failed half-way; what else was in the folder stays."""
    with contextlib.suppress(OSError):
        if (folder / "logs").exists():  # then it is ours, and so is the configuration
            (folder / "config.toml").unlink(missing_ok=True)
            (folder / "logs").rmdir()
        folder.rmdir()


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep every other supervisor out of the run's folder; the lock ends with this process, however that ends.

    In the end nothing is left there that a worker was killed in the middle of.
    """
    with (run_dir / "config.toml").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"the run {run_dir} is still going on", "stop it first, or name another run") from None
        try:
            yield
        finally:
            remove_half_written(run_dir)


def remove_half_written(run_dir: Path) -> list[str]:
    """Remove what is there of a model, an adapter or a head whose worker was killed while it wrote them; returns the
    names of what was there."""
    found = [path for name in OUTPUTS for path in half_written(run_dir / name)]
    if not (run_dir / OUTPUTS[-1]).exists():
        found += [run_dir / name for name in OUTPUTS if (run_dir / name).exists()]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def summary(config: Config, last_step: Mapping[str, Any], run_dir: Path, seconds: float) -> dict[str, Any]:
    """The record that closes a run, whose last step's record is given, with the commands that may come next."""
    config_file = shlex.quote(shortest_path(run_dir / "config.toml"))
    train = f"{program()} train --config {config_file}"
    following = [f"{train} --seed {config.run.seed + 1}"]
    if not config.rollout.offline:
        following.append(f"{train} --sync-every {OFFLINE_SYNC_EVERY}  # the offline baseline")
    return {
        "kind": "summary",
        "steps": last_step.get("step"),
        "queries": last_step.get("queries"),
        "seconds": seconds,
        "run_dir": str(run_dir),
        "model": str(run_dir / "model"),
        "next": following,
    }
