"""A validation error of pydantic's, said in one line: what is wrong, where it was given, what to type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from oatlite.config.dump import toml_value
from oatlite.config.flags import to_type
from oatlite.config.keys import fields_of, is_private, nearest
from oatlite.errors import ConfigError

MUST_BE = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "missing": "has too few values",
    "too_long": "has too many values",
    "value_error": "{error}",  # of a validator of ours, in its own words
    "string_pattern_mismatch": "must look like file.py:Class",
}


def explain(error: ValidationError, sources: Mapping[str, str]) -> ConfigError:
    """``sources`` says where each dotted key was given. Only the first mistake is told; others are counted."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    key = _key(first["loc"])
    shown = first["input"] if not isinstance(first["input"], str) else repr(first["input"])
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    source = sources.get(key, "default")
    given = key if is_private(key) else f"{key} = {shown}"
    return ConfigError(f"{given} ({source}) {must_be(error)}{more}", _example(key, first, source))


def must_be(error: ValidationError) -> str:
    """What the first mistake should be."""
    first = error.errors(include_url=False)[0]
    return MUST_BE.get(first["type"], first["msg"]).format(**first.get("ctx", {}))


def _key(loc: tuple[int | str, ...]) -> str:
    """The dotted key, without the algorithm's tag and positions in a list."""
    parts = [str(part) for part in loc]
    if parts[0] == "algorithm":
        del parts[1:2]
    return ".".join(parts[:2])


def _example(key: str, mistake: Any, source: str) -> str:
    if mistake["type"] == "literal_error":
        choices = [word.strip("'") for word in mistake["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        value: Any = nearest(str(mistake["input"]), choices, always=True)
    else:
        section, name = key.split(".", 1)
        field = fields_of(section, str(mistake["loc"][1])).get(name)
        value = None if field is None or field.is_required() else field.default
    if value is None or isinstance(value, tuple):
        return ""
    if source.startswith("-"):
        return f"for example {to_type(key, value)}"
    section, name = key.split(".", 1)
    return f"for example [{section}] {name} = {toml_value(value)}"
