"""What a configuration names on this disk: models, datasets, files of code, and the folder of the run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from oatlite.config.flags import to_type
from oatlite.config.oracle_names import kind_of, oracle_names
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.hardware import existing_ancestor

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def named_paths(config: Config) -> list[tuple[str, str]]:
    """Every model and dataset that a configuration names, each with its key: files, folders or hub ids."""
    keys = ("model.path", "model.reference", "data.prompts", "data.preferences", "explore.encoder")
    values = [(key, getattr(getattr(config, key.split(".")[0]), key.split(".")[1])) for key in keys]
    models = [(key, name) for key, name in oracle_names(config) if kind_of(name) == "model"]
    return [(key, value) for key, value in [*values, *models] if value is not None]


def check_paths(config: Config) -> None:
    for key, path in named_paths(config):
        looks_local = path.startswith(("/", "./", "../", "~")) or path.endswith(DATA_SUFFIXES)
        if looks_local and ":" not in path and not Path(path).exists():
            home = " (~ is not expanded here: give the whole path)" if path.startswith("~") else ""
            raise ConfigError(f"{key} = {path}: there is no such file or folder{home}", "give its path")
    named = [("algorithm.name", config.algorithm.name), *oracle_names(config)]
    named = [(key, name) for key, name in named if ":" in name and not Path(name).exists()]
    if config.eval.gold_score is not None:
        named.append(("eval.gold_score", config.eval.gold_score))
    for key, reference in named:
        file, _, name = reference.rpartition(":")
        if not file or not name.isidentifier():
            raise ConfigError(f"{key} = {reference!r} must look like file.py:name", "give the file and the name in it")
        if file.endswith(".py") and not Path(file).is_file():
            raise ConfigError(f"{key} = {reference}: there is no file {file}", "give its path from this folder")


def check_run_folder(config: Config) -> None:
    name, folder = config.run.name, Path(config.run.dir)
    assert name is not None
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        plain = re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "my-run"
        raise ConfigError(
            f"run.name = {name!r} must be a plain folder name (letters, digits, . _ + = -)",
            f"type {to_type('run.name', plain)}",
        )
    run = folder / name
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        taken = (f"{name}-{n}" for n in range(2, 1000))
        free = next((other for other in taken if not (folder / other).exists()), f"{name}-new")
        raise ConfigError(f"the run folder {run} is in use", f"type {to_type('run.name', free)}, or remove the folder")
    place = existing_ancestor(run)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot write the run folder {run}: {place} is no folder that you may write to",
            f"type {to_type('run.dir', 'FOLDER')}",
        )
