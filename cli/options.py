"""Flags that stand for options of the configuration: name and help come from the schema, so that neither can drift."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import typer

from oatlite.config.flags import FLAGS
from oatlite.config.keys import fields_of


def setting(key: str, panel: str, *, metavar: str | None = None) -> Any:
    """The Typer option for the dotted ``key``, under the heading ``panel`` of the help."""
    section, _, name = key.partition(".")
    field = fields_of(section)[name]
    flag = f"{FLAGS[key]}/--no-{FLAGS[key][2:]}" if field.annotation is bool else FLAGS[key]
    return typer.Option(flag, help=field.description, rich_help_panel=panel, metavar=metavar, show_default=False)


def parameter_of(flag: str) -> str:
    """The parameter that a flag is read into; ``async`` is no name for one."""
    name = flag[2:].replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def given_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key, what was typed: a flag that was not given is ``None`` and leaves the configuration alone."""
    named = {key: parameters.get(parameter_of(flag)) for key, flag in FLAGS.items()}
    # A flag that may be repeated gives nothing in a list where it was not typed.
    return {key: value for key, value in named.items() if value is not None and value not in ([], ())}
