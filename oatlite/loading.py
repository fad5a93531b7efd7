"""Code of the user's by name: a scoring function, an algorithm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from oatlite.errors import ConfigError
from oatlite.sources import first_line


def load_callable(name: str) -> Callable[..., Any]:
    """What ``file.py:name`` or ``package.module:name`` names: a function or a class.

    Raises ConfigError, in one line, when the module, the name or its import is at fault.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise ConfigError(f"{name} names nothing to import", "type file.py:name or package.module:name")
    module = _import(place)
    if not hasattr(module, attribute):
        there = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__
        ]
        raise ConfigError(f"{place} has no {attribute}", f"it has {', '.join(there) or 'nothing that can be called'}")
    value = getattr(module, attribute)
    if not callable(value):
        raise ConfigError(f"{name} is {type(value).__name__}, and must be a function or a class")
    return value


def _import(place: str) -> ModuleType:
    file = Path(place)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise ConfigError(f"the file {place} does not exist", f"it is looked for in {Path.cwd()}")
    try:
        return _import_file(file) if is_file else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_file and error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(f"there is no module {place}", "install it, or type file.py:name") from error
        raise ConfigError(f"importing {place} failed: {first_line(error)}") from error
    except (Exception, SystemExit) as error:  # a user's code raises what it likes
        raise ConfigError(f"importing {place} failed: {type(error).__name__}: {first_line(error)}") from error


def _import_file(file: Path) -> ModuleType:
    """Import under a name of its own, the same for every import of the file in a process."""
    name = f"oatlite_user_{file.stem}_{zlib.crc32(bytes(file.resolve())):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it is being imported
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
