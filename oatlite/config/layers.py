"""Values as they were given, by dotted key: in a preset, in a TOML file, or on the command line.

Each keeps the place that it came from, so that an error names the flag or the file to change.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from oatlite.config.flags import FLAGS
from oatlite.config.keys import (
    DEFAULT_ALGORITHM,
    OPTIONS,
    SECTIONS,
    fields_of,
    nearest,
    types_of,
    unknown_key,
    unknown_section,
)
from oatlite.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
BASE = "base"
"""In a preset, the name of the one that it changes."""


class Given(NamedTuple):
    """A value and the words that say where it was given."""

    value: Any
    source: str


Layer = dict[str, Given]


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> Layer:
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset {name!r} ({', '.join(preset_names())})",
            f"type --preset {nearest(name, preset_names(), always=True)}",
        )
    layer = read_file(PRESETS / f"{name}.toml", f"preset {name}")
    base = layer.pop(BASE, None)
    return layer if base is None else merge([read_preset(str(base.value)), layer])


def read_file(path: Path, source: str) -> Layer:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}", "--config takes a .toml file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text", "--config takes a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is no valid TOML: {error}", 'write lines such as name = "text" or lr = 1e-4'
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", "no option takes more than a list or a table") from None
    layer: Layer = {}
    if path.parent == PRESETS and BASE in tables:
        layer[BASE] = Given(tables.pop(BASE), source)
    for section, table in tables.items():
        if section not in SECTIONS:
            raise unknown_section(section, source) if isinstance(table, dict) else unknown_key(section, source)
        if not isinstance(table, dict):
            raise ConfigError(f"{section} ({source}) is a section", f"write [{section}] and its options below")
        for key, value in table.items():
            if f"{section}.{key}." == OPTIONS and isinstance(value, dict):
                layer |= {f"{OPTIONS}{name}": Given(option, source) for name, option in value.items()}
            else:
                layer[f"{section}.{key}"] = Given(value, source)
    return layer


def command_line(flags: Mapping[str, Any], sets: Iterable[str]) -> Layer:
    """What was typed. No source repeats a value: it may be a secret, under a name that there is none of."""
    layer = {key: Given(value, FLAGS.get(key, key)) for key, value in flags.items()}
    for text in sets:
        key, equals, raw = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError("--set without a setting", "type --set section.key=value, as in --set learner.lr=1e-6")
        source = f"--set {key}=..."
        if key in SECTIONS:
            raise ConfigError(f"{key} ({source}) is a section", f"type --set {key}.KEY=VALUE")
        given = Given(_parse(key, raw, source), source)
        if key in layer and layer[key].value != given.value:
            raise ConfigError(f"{key} is given twice: {layer[key].source} and {source}", "keep one")
        layer[key] = given
    return layer


def _parse(key: str, raw: str, source: str) -> Any:
    """A TOML value; a bare word is text, and so is anything meant for an option that takes nothing but text."""
    try:
        document = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError as error:
        if raw[:1] in ("'", '"', "[", "{"):
            raise ConfigError(f"{source}: no valid TOML value: {error}", "quote it for the shell") from None
        return raw
    except RecursionError:
        raise ConfigError(f"--set {key}: the value is nested too deeply", "give one value or a list") from None
    section, _, name = key.partition(".")
    field = fields_of(section).get(name) if section in SECTIONS else None
    wants_text = field is not None and str in types_of(field)
    is_other = len(document) > 1 or not isinstance(document["value"], str)
    return raw if len(document) > 1 or (wants_text and is_other) else document["value"]


def merge(layers: Iterable[Layer]) -> Layer:
    merged: Layer = {}
    for layer in layers:
        if "algorithm.name" in layer and algorithm_of(layer) != algorithm_of(merged):
            # The beta of one algorithm says nothing about another's: a new name starts from its own defaults.
            merged = {key: given for key, given in merged.items() if not key.startswith("algorithm.")}
        merged |= layer
    return merged


def algorithm_of(layer: Layer) -> str:
    return str(layer["algorithm.name"].value) if "algorithm.name" in layer else DEFAULT_ALGORITHM
