"""The dotted keys that there are, and the nearest one to a key that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from oatlite.config.algorithms import ALGORITHM_CONFIGS, CustomAlgorithmConfig
from oatlite.config.schema import Config
from oatlite.config.section import Section
from oatlite.errors import ConfigError

SECTIONS = tuple(Config.model_fields)
OPTIONS = "algorithm.options."
DEFAULT_ALGORITHM = Config().algorithm.name


def fields_of(section: str, algorithm: str = DEFAULT_ALGORITHM) -> dict[str, FieldInfo]:
    """The options of a section; of ``[algorithm]``, those that the named algorithm has."""
    if section == "algorithm":
        return ALGORITHM_CONFIGS.get(algorithm, CustomAlgorithmConfig).model_fields
    model: type[Section] = Config.model_fields[section].annotation  # type: ignore[assignment]
    return model.model_fields


def types_of(field: FieldInfo) -> tuple[Any, ...]:
    is_list = get_origin(field.annotation) is tuple
    return (field.annotation,) if is_list else get_args(field.annotation) or (field.annotation,)


def is_private(key: str) -> bool:
    """Whether its value is shown nowhere: it names a secret's variable, and a person may have pasted the secret."""
    return key.endswith("_env")


def check_key(key: str, source: str, algorithm: str) -> None:
    """Raises :class:`ConfigError` with the nearest key unless there is an option ``key``."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise unknown_key(key, source)
    fields = fields_of(section, algorithm)
    takes_options = section == "algorithm" and "options" in fields
    if takes_options and key.startswith(OPTIONS) and "." not in key.removeprefix(OPTIONS):
        return
    if name not in fields:
        advice = ""
        if takes_options:
            advice = f"did you mean {OPTIONS}{name.removeprefix('options.').partition('.')[0]}"
        elif section == "algorithm":
            advice = f"{algorithm} has {', '.join(field for field in fields if field != 'name')}"
        raise unknown_key(key, source, advice)
    if takes_options and name == "options":
        raise ConfigError(f"algorithm.options ({source}) must be a table", "write its keys under [algorithm.options]")


def unknown_key(key: str, source: str, advice: str = "") -> ConfigError:
    """The error for an option that there is none of: the same name in another section counts as nearest."""
    section, _, name = key.rpartition(".")
    known = [f"{known_section}.{field}" for known_section in SECTIONS for field in fields_of(known_section)]
    same_name = [option for option in known if option.endswith(f".{name}")]
    same_section = [option for option in known if option.startswith(f"{section}.")]
    guess = next(iter(same_name), None) or nearest(key, same_section) or nearest(key, known)
    advice = advice or (f"did you mean {guess}" if guess else f"sections are {', '.join(SECTIONS)}")
    return ConfigError(f"there is no option {key} ({source})", advice)


def unknown_section(section: str, source: str) -> ConfigError:
    guess = nearest(section, SECTIONS)
    advice = f"did you mean [{guess}]" if guess else f"sections are {', '.join(SECTIONS)}"
    return ConfigError(f"there is no section [{section}] ({source})", advice)


def nearest(word: str, words: Iterable[str], *, always: bool = False) -> str | None:
    """The most similar of ``words``; none when nothing is similar, unless ``always``."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.0 if always else 0.5)
    return found[0] if found else None
