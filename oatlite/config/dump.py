"""The configuration of a run as TOML that repeats it."""

from __future__ import annotations

import json
from typing import Any

import oatlite
from oatlite.config.schema import Config
from oatlite.config.section import Section


def dump_toml(config: Config) -> str:
    """Everything but ``run.name``, which a repetition must not share; the first comment tells it.

    ``load_config(file=...)`` of the text gives ``config`` back, but for that name.
    """
    lines = [
        f"# oatlite {oatlite.__version__}, run {json.dumps(config.run.name)}, everything resolved.",
        "# oatlite train --config THIS_FILE repeats it under a new name.",
    ]
    for name in Config.model_fields:
        section: Section = getattr(config, name)
        lines += ["", f"[{name}]"]
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if (name, key) == ("run", "name"):
                continue
            if value is None and field.default is not None:
                value = ""
            if value is not None:
                lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One value in TOML. Raises ``TypeError`` for what TOML has no form for."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON's escapes are TOML's, but TOML wants DEL escaped too.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(toml_value(item) for item in value)}]"
        case dict():
            pairs = (f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items())
            return f"{{ {', '.join(pairs)} }}"
        case _:
            raise TypeError(f"TOML has no form for {value!r}")
