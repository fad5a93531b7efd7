"""One :class:`Config` out of preset < TOML file < flags, with every mistake told in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from oatlite.config.algorithms import ALGORITHM_CONFIGS
from oatlite.config.dump import dump_toml
from oatlite.config.explain import explain
from oatlite.config.flags import to_type
from oatlite.config.keys import DEFAULT_ALGORITHM, OPTIONS, check_key, fields_of, nearest, types_of
from oatlite.config.layers import Given, Layer, algorithm_of, command_line, merge, preset_names, read_file, read_preset
from oatlite.config.resolve import DEMO, resolve, resolve_inference
from oatlite.config.schema import Config
from oatlite.config.steps import num_steps
from oatlite.config.task import ONLINE_ONLY, check_task
from oatlite.config.unread import check_read_offline, check_read_online, check_read_oracles
from oatlite.errors import ConfigError
from oatlite.hardware import gpu_names

__all__ = [
    "dump_toml",
    "load_config",
    "load_settings",
    "num_steps",
    "preset_names",
    "resolve",
    "resolve_inference",
]


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    num_gpus: int | None = None,
) -> Config:
    """Merge a preset, a TOML file, flags (dotted keys) and ``section.key=value`` settings, the later winning.

    Where nothing says which model and prompts, the preset ``tldr`` is chosen on a machine with GPUs (``num_gpus``,
    default: counted), and ``demo`` elsewhere. Raises :class:`ConfigError` for whatever cannot be used.
    """
    layers = [read_preset(preset)] if preset is not None else []
    if file is not None:
        layers.append(read_file(Path(file), str(file)))
    layers.append(command_line(flags or {}, sets))
    merged = merge(layers)
    if preset == DEMO:
        available = len(gpu_names()) if num_gpus is None else num_gpus
        merged = merge([_one_gpu(available), *layers])
    is_offline = "rollout.offline" in merged and merged["rollout.offline"].value is True
    task = ("model.path", "data.prompts", "data.preferences")
    if preset is None and not is_offline and not any(key in merged and merged[key].value for key in task):
        merged = merge([*_default_preset(num_gpus, merged), *layers])
    if is_offline:
        # A preset's bound on its prompts says nothing of somebody's pairs, either.
        left_out = (*ONLINE_ONLY, "data.max_prompts")
        from_preset = {key for key in left_out if key in merged and merged[key].source.startswith("preset ")}
        merged = {key: given for key, given in merged.items() if key not in from_preset}
    _check_algorithm(merged)
    for key, given in merged.items():
        check_key(key, given.source, algorithm_of(merged))
    config = _validate(merged)
    check_task(config)
    check_read_online(merged)
    if is_offline:
        check_read_offline(merged)
    else:
        check_read_oracles(merged, config)
    return config


def load_settings(
    *,
    reads: Sequence[str],
    flags: Mapping[str, Any],
    sets: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The options of a command that trains nothing: ``defaults`` < flags and ``section.key=value`` settings.

    ``reads`` are the keys that the command reads, or whole sections. Raises :class:`ConfigError` for any other.
    """
    typed = command_line(flags, sets)
    for key, given in typed.items():
        check_key(key, given.source, DEFAULT_ALGORITHM)
        if key not in reads and key.partition(".")[0] not in reads:
            raise ConfigError(f"{key} ({given.source}) is nothing that this command reads", "leave it out")
    own = {key: Given(value, "default") for key, value in (defaults or {}).items()}
    return _validate(merge([own, typed]))


def _default_preset(num_gpus: int | None, asked: Layer) -> list[Layer]:
    """``tldr`` where there are GPUs to run it on, else ``demo``; on as many GPUs as there are, up to the preset's."""
    available = len(gpu_names()) if num_gpus is None else num_gpus
    wanted = asked["placement.gpus"].value if "placement.gpus" in asked else available
    if not available or wanted == 0:
        return [read_preset(DEMO), _one_gpu(0)]
    preset = read_preset("tldr")
    gpus = min(preset["placement.gpus"].value, available)
    return [preset, {"placement.gpus": Given(gpus, "preset tldr on this machine")}]


def _one_gpu(available: int) -> Layer:
    """The demo's networks are too small to gain from more."""
    return {"placement.gpus": Given(min(1, available), "preset demo on this machine")}


def _check_algorithm(merged: Layer) -> None:
    name = algorithm_of(merged)
    if name not in ALGORITHM_CONFIGS and ":" not in name:
        guess = nearest(name, ALGORITHM_CONFIGS, always=True)
        raise ConfigError(
            f"there is no algorithm {name!r} ({merged['algorithm.name'].source})",
            f"type {to_type('algorithm.name', guess)} (of {', '.join(ALGORITHM_CONFIGS)}, or your own: file.py:Class)",
        )


def _validate(merged: Layer) -> Config:
    tables: dict[str, dict[str, Any]] = {}
    for key, (value, _) in merged.items():
        section, name = key.split(".", 1)
        table = tables.setdefault(section, {})
        if key.startswith(OPTIONS):
            table.setdefault("options", {})[key.removeprefix(OPTIONS)] = value
            continue
        # TOML has no null: an empty text is how a person says "none".
        is_none = value == "" and type(None) in types_of(fields_of(section, algorithm_of(merged))[name])
        table[name] = None if is_none else value
    try:
        # As JSON, because strict Python input would refuse the list that stands for a tuple.
        return Config.model_validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        raise explain(error, {key: given.source for key, given in merged.items()}) from None
