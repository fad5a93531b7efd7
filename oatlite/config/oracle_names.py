"""What a name given with ``--oracle`` means."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["model", "function", "remote", "judge"]


def kind_of(name: str) -> Kind:
    """``remote`` and ``judge`` mean themselves, ``file.py:name`` and ``package.module:name`` a function, and anything
    else a model: a folder or a hub id."""
    if name in ("remote", "judge"):
        return name  # type: ignore[return-value]  # which mypy does not narrow to
    if ":" in name and not Path(name).exists():
        return "function"
    return "model"
