"""Configurations spoiled at random: each is refused in one line, or repeats itself through its own dump and passes what
is checked before a run."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Any

from fuzz_preflight import at_hand, preflight_outcome

from oatlite.config.dump import dump_toml, toml_value
from oatlite.config.keys import SECTIONS, fields_of
from oatlite.config.load import load_config, preset_names, resolve
from oatlite.demo.build import DemoPaths
from oatlite.errors import ConfigError

Tables = dict[str, Any]
NUM_GPUS = 8

TEXTS = ("", "x", "demo", "dpo", "a\nb", "a\0b", "é" * 300, "/" * 5000, "../..", "~/x", "%s{0}{prompt}", "[bold]", "1")
NUMBERS = (*(0, 1, -1, 7, 2**31, 2**63, 10**40, -(10**40)), *(0.0, -0.5, 1.5, 1e-300, 1e308))
RAW = ("nan", "inf", "-inf", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[" * 60 + "]" * 60, "0x10", "1e400")
RAW += ("[" * 3000 + "]" * 3000, "{a = " * 500 + "1" + "}" * 500, '"""' + "x\n" * 50 + '"""', "'single'", "tru", "")


class Raw(str):
    """Text that stands in the file as it is."""


def _value(generator: random.Random) -> Any:
    match generator.randrange(12):
        case 0 | 1 | 2:
            return generator.choice(TEXTS)
        case 3 | 4 | 5:
            return generator.choice(NUMBERS)
        case 6 | 7:
            return generator.choice((True, False))
        case 8 | 9:
            return [generator.choice((*TEXTS, *NUMBERS, True)) for _ in range(generator.randrange(5))]
        case 10:
            return {"a": {"b": [generator.choice(NUMBERS)]}}
        case _:
            return Raw(generator.choice(RAW))


def _misspelt(generator: random.Random, word: str) -> str:
    place = generator.randrange(len(word))
    return generator.choice((word[:place] + word[place + 1 :], word[:place] + "x" + word[place:], word.upper(), "a b"))


def _near(generator: random.Random, value: Any) -> Any:
    """Another value of the same kind, or the same one written as another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return generator.choice((value + 1, value * 2, value // 2, -value, float(value), str(value), value * 1.5))
    if isinstance(value, list):
        return generator.choice((value[:-1], value * 2, value[0] if value else 1))
    if isinstance(value, str):
        return generator.choice((value + "x", value[:-1], value.upper(), [value], ""))
    return value


def _preset(name: str) -> Tables:
    """Everything that a preset comes to on a machine with GPUs enough."""
    return tomllib.loads(dump_toml(load_config(preset=name, num_gpus=NUM_GPUS)))


def _spoil(generator: random.Random, tables: Tables) -> None:
    section = generator.choice(SECTIONS)
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):  # spoiled already
        return
    known = list(fields_of(section))
    match generator.randrange(16):
        case 0 | 1 if table:
            key = generator.choice(list(table))
            table[_misspelt(generator, key)] = table.pop(key)
        case 2:
            tables[_misspelt(generator, section)] = tables.pop(section)
        case 3:
            tables[section] = _value(generator)
        case 4:
            tables[generator.choice(("seed", "lr", "x"))] = _value(generator)
        case 5 | 6 | 7 | 8 | 9 | 10 if table:
            key = generator.choice(list(table))
            table[key] = _near(generator, table[key])
        case _:
            table[generator.choice(known)] = _value(generator)


def _nudge(generator: random.Random, tables: Tables) -> None:
    """Give one setting another value, such as a person may try."""
    table = tables[generator.choice([name for name, table in tables.items() if table])]
    key = generator.choice(list(table))
    table[key] = _near(generator, table[key])


def _toml(tables: Tables) -> str:
    loose = [f"{_key(name)} = {_shown(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    lines = list(loose)
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{_key(name)}]", *(f"{_key(key)} = {_shown(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() and name.isascii() else toml_value(name)


def _shown(value: Any) -> str:
    return value if isinstance(value, Raw) else toml_value(value)


def _spoil_bytes(generator: random.Random, text: bytes) -> bytes:
    data = bytearray(text)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        more = generator.choice((b"\0", b"\xff", b"[", b"]", b'"', b"=", b".", b"\n", b"'''", generator.randbytes(3)))
        data[place : place + generator.randrange(4)] = more
    return bytes(data)


def spoiled_settings(generator: random.Random, folder: Path, paths: DemoPaths) -> dict[str, Any]:
    """Arguments of ``load_config``: a preset, a file made of one and spoiled, settings of the command line. Half of the
    presets work with what is at ``paths``, and most of those are spoiled less."""
    tables = _preset(generator.choice(preset_names()))
    spoil = _spoil
    if generator.random() < 0.5:
        at_hand(tables, paths)
        spoil = generator.choice((_nudge, _nudge, _spoil))
    tables["run"]["dir"] = str(folder / "runs")
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        spoil(generator, tables)
    text = _toml(tables).encode()
    file = folder / "spoiled.toml"
    file.write_bytes(_spoil_bytes(generator, text) if spoil is _spoil and generator.random() < 0.2 else text)
    sets = []
    if generator.random() < 0.3:
        section = generator.choice(SECTIONS)
        key = f"{section}.{generator.choice(list(fields_of(section)))}"
        key = _misspelt(generator, key) if generator.random() < 0.2 else key
        sets.append(f"{key}={_shown(_value(generator))}")
    preset = generator.choice(preset_names()) if generator.random() < 0.2 else None
    num_gpus = NUM_GPUS if generator.random() < 0.8 else generator.choice((0, 1, 2))
    return {"preset": preset, "file": file, "sets": sets, "num_gpus": num_gpus}


def outcome(given: dict[str, Any], folder: Path) -> str:
    """``refused``, ``refused before a start``, ``valid``, or what is wrong with how it was handled; whatever else is
    raised is raised here too."""
    try:
        config = resolve(load_config(**given), given["num_gpus"])
    except ConfigError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"not one line: {str(error)!r}"
    again = folder / "again.toml"
    again.write_text(dump_toml(config), encoding="utf-8")
    name = f"run.name={toml_value(config.run.name)}"
    repeated = resolve(load_config(file=again, sets=[name], num_gpus=given["num_gpus"]), given["num_gpus"])
    return preflight_outcome(config) if repeated == config else "its dump is another configuration"
