"""One :class:`Config` out of preset < TOML file < flags, with every mistake told in one line.

Each value keeps the place that it came from, so that an error names the flag or the file to change.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from oatlite.config.algorithms import ALGORITHM_CONFIGS
from oatlite.config.dump import dump_toml
from oatlite.config.explain import explain
from oatlite.config.flags import FLAGS, to_type
from oatlite.config.keys import (
    DEFAULT_ALGORITHM,
    OPTIONS,
    SECTIONS,
    check_key,
    fields_of,
    nearest,
    types_of,
    unknown_key,
    unknown_section,
)
from oatlite.config.resolve import DEMO, resolve, resolve_inference
from oatlite.config.schema import PROMPT, Config
from oatlite.config.steps import num_steps
from oatlite.errors import ConfigError
from oatlite.hardware import gpu_names

__all__ = [
    "dump_toml",
    "load_config",
    "load_settings",
    "num_steps",
    "preset_names",
    "resolve",
    "resolve_inference",
]

PRESETS = Path(__file__).parent / "presets"
BASE = "base"
"""In a preset, the name of the one that it changes."""


class Given(NamedTuple):
    """A value and the words that say where it was given."""

    value: Any
    source: str


Layer = dict[str, Given]

ONLINE_ONLY = ("data.prompts", "data.max_queries", "oracle.path", "placement.actors")
"""Of a preset, what an offline run does not take over; given otherwise, it is refused there."""
OFFLINE_UNREAD = (
    *("sampling.", "explore.", "oracle.", "remote.", "judge.", "sync.", "lora.sync"),
    *("rollout.sync_every", "rollout.sampler"),
    *("eval.gold_score", "eval.oracle", "eval.best_of_n", "eval.online", "eval.every_queries"),
)

HEAD_RULES = ("sea-bai", "sea-ee", "uncertainty", "passive")
EXPLORE_READ_BY: dict[str, tuple[str, ...]] = {
    **{f"explore.{name}": ("apl",) for name in ("entropy_share", "certainty_share")},
    **{f"explore.{name}": ("sea-ee",) for name in ("max_tries", "allow_second_best")},
    "explore.uncertainty": ("sea-bai", "uncertainty"),
    "explore.random_fallback": ("sea-bai", "sea-ee", "uncertainty"),
    **{
        f"explore.{name}": HEAD_RULES
        for name in (
            *("encoder", "head_only", "self_label_ratio", "burn_in", "members", "hidden_size", "lr", "weight_decay"),
            *("gradient_steps", "batch_size", "pull", "fixed_pull", "buffer_size", "learn_until"),
        )
    },
}
"""By option of ``[explore]``: the rules that read it; all others are read by every rule."""


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    num_gpus: int | None = None,
) -> Config:
    """Merge a preset, a TOML file, flags (dotted keys) and ``section.key=value`` settings, the later winning.

    Where nothing says which model and prompts, the preset ``tldr`` is chosen on a machine with GPUs (``num_gpus``,
    default: counted), and ``demo`` elsewhere. Raises :class:`ConfigError` for whatever cannot be used.
    """
    layers = [_read_preset(preset)] if preset is not None else []
    if file is not None:
        layers.append(_read_file(Path(file), str(file)))
    layers.append(_command_line(flags or {}, sets))
    merged = _merge(layers)
    if preset == DEMO:
        available = len(gpu_names()) if num_gpus is None else num_gpus
        merged = _merge([_one_gpu(available), *layers])
    is_offline = "rollout.offline" in merged and merged["rollout.offline"].value is True
    task = ("model.path", "data.prompts", "data.preferences")
    if preset is None and not is_offline and not any(key in merged and merged[key].value for key in task):
        merged = _merge([*_default_preset(num_gpus, merged), *layers])
    if is_offline:
        # A preset's bound on its prompts says nothing of somebody's pairs, either.
        left_out = (*ONLINE_ONLY, "data.max_prompts")
        from_preset = {key for key in left_out if key in merged and merged[key].source.startswith("preset ")}
        merged = {key: given for key, given in merged.items() if key not in from_preset}
    _check_algorithm(merged)
    for key, given in merged.items():
        check_key(key, given.source, _algorithm(merged))
    config = _validate(merged)
    _check_task(config)
    _check_exploration(merged)
    if is_offline:
        _check_all_is_read(merged)
    return config


def load_settings(
    *,
    reads: Sequence[str],
    flags: Mapping[str, Any],
    sets: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The options of a command that trains nothing: ``defaults`` < flags and ``section.key=value`` settings.

    ``reads`` are the keys that the command reads, or whole sections. Raises :class:`ConfigError` for any other.
    """
    typed = _command_line(flags, sets)
    for key, given in typed.items():
        check_key(key, given.source, DEFAULT_ALGORITHM)
        if key not in reads and key.partition(".")[0] not in reads:
            raise ConfigError(f"{key} ({given.source}) is nothing that this command reads", "leave it out")
    own = {key: Given(value, "default") for key, value in (defaults or {}).items()}
    return _validate(_merge([own, typed]))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _read_preset(name: str) -> Layer:
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset {name!r} ({', '.join(preset_names())})",
            f"type --preset {nearest(name, preset_names(), always=True)}",
        )
    layer = _read_file(PRESETS / f"{name}.toml", f"preset {name}")
    base = layer.pop(BASE, None)
    return layer if base is None else _merge([_read_preset(str(base.value)), layer])


def _default_preset(num_gpus: int | None, asked: Layer) -> list[Layer]:
    """``tldr`` where there are GPUs to run it on, else ``demo``; on as many GPUs as there are, up to the preset's."""
    available = len(gpu_names()) if num_gpus is None else num_gpus
    wanted = asked["placement.gpus"].value if "placement.gpus" in asked else available
    if not available or wanted == 0:
        return [_read_preset(DEMO), _one_gpu(0)]
    preset = _read_preset("tldr")
    gpus = min(preset["placement.gpus"].value, available)
    return [preset, {"placement.gpus": Given(gpus, "preset tldr on this machine")}]


def _one_gpu(available: int) -> Layer:
    """The demo's networks are too small to gain from more."""
    return {"placement.gpus": Given(min(1, available), "preset demo on this machine")}


def _read_file(path: Path, source: str) -> Layer:
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


def _command_line(flags: Mapping[str, Any], sets: Iterable[str]) -> Layer:
    layer = {key: Given(value, FLAGS.get(key, key)) for key, value in flags.items()}
    for text in sets:
        source = f"--set {text}"
        key, equals, raw = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(f"{source}: no setting", "type --set section.key=value, as in --set learner.lr=1e-6")
        if key in SECTIONS:
            raise ConfigError(f"{key} ({source}) is a section", f"type --set {key}.KEY=VALUE")
        given = Given(_parse(key, raw), source)
        if key in layer and layer[key].value != given.value:
            raise ConfigError(f"{key} is given twice: {layer[key].source} {layer[key].value} and {source}", "keep one")
        layer[key] = given
    return layer


def _parse(key: str, raw: str) -> Any:
    """A TOML value; a bare word is text, and so is anything meant for an option that takes nothing but text."""
    try:
        document = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError as error:
        if raw[:1] in ("'", '"', "[", "{"):
            raise ConfigError(f"--set {key}={raw}: no valid TOML value: {error}", "quote it for the shell") from None
        return raw
    except RecursionError:
        raise ConfigError(f"--set {key}: the value is nested too deeply", "give one value or a list") from None
    section, _, name = key.partition(".")
    field = fields_of(section).get(name) if section in SECTIONS else None
    wants_text = field is not None and str in types_of(field)
    is_other = len(document) > 1 or not isinstance(document["value"], str)
    return raw if len(document) > 1 or (wants_text and is_other) else document["value"]


def _merge(layers: Iterable[Layer]) -> Layer:
    merged: Layer = {}
    for layer in layers:
        if "algorithm.name" in layer and _algorithm(layer) != _algorithm(merged):
            # The beta of one algorithm says nothing about another's: a new name starts from its own defaults.
            merged = {key: given for key, given in merged.items() if not key.startswith("algorithm.")}
        merged |= layer
    return merged


def _algorithm(layer: Layer) -> str:
    return str(layer["algorithm.name"].value) if "algorithm.name" in layer else DEFAULT_ALGORITHM


def _check_algorithm(merged: Layer) -> None:
    name = _algorithm(merged)
    if name not in ALGORITHM_CONFIGS and ":" not in name:
        guess = nearest(name, ALGORITHM_CONFIGS, always=True)
        raise ConfigError(
            f"there is no algorithm {name!r} ({merged['algorithm.name'].source})",
            f"type {to_type('algorithm.name', guess)} (of {', '.join(ALGORITHM_CONFIGS)}, or your own: file.py:Class)",
        )


def _validate(merged: Layer) -> Config:
    tables: dict[str, dict[str, Any]] = {}
    for key, (value, _) in merged.items():
        section, name = key.split(".", 1)
        table = tables.setdefault(section, {})
        if key.startswith(OPTIONS):
            table.setdefault("options", {})[key.removeprefix(OPTIONS)] = value
            continue
        # TOML has no null: an empty text is how a person says "none".
        is_none = value == "" and type(None) in types_of(fields_of(section, _algorithm(merged))[name])
        table[name] = None if is_none else value
    try:
        # As JSON, because strict Python input would refuse the list that stands for a tuple.
        return Config.model_validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        raise explain(error, {key: given.source for key, given in merged.items()}) from None


def _check_task(config: Config) -> None:
    _check_template(config)
    if config.rollout.offline:
        _check_offline_task(config)
        return
    if config.data.preferences is not None:
        raise ConfigError("--preferences is given, and a run that samples reads none", "add --offline")
    if (config.model.path is None) != (config.data.prompts is None):
        given, other = ("--model", "--prompts") if config.data.prompts is None else ("--prompts", "--model")
        raise ConfigError(f"{given} is given and {other} is not", "give both, or neither for a preset")
    if not config.oracle.path:
        raise ConfigError("no oracle is given", "add --oracle REWARD_MODEL (a folder or a hub id)")


def _check_template(config: Config) -> None:
    template = config.data.prompt_template
    if template is None:
        return
    if config.data.chat_template:
        raise ConfigError(
            "data.prompt_template and data.chat_template are both given, and a prompt has one template",
            f"type {to_type('data.chat_template', False)}",
        )
    if template.count(PROMPT) != 1:
        raise ConfigError(
            f"data.prompt_template = {template!r} does not say {PROMPT} once, where the prompt goes",
            f"type {to_type('data.prompt_template', 'Question: {prompt} Answer:')}",
        )


def _check_exploration(merged: Layer) -> None:
    """Refuse options that were typed and that the rule of exploration, or the sampler, does not read."""
    rule, sampler = (
        merged[key].value if key in merged else none
        for key, none in (("explore.rule", "none"), ("rollout.sampler", "policy"))
    )
    for key, given in merged.items():
        if not given.source.startswith("--"):
            continue
        if key.startswith("explore.") and key != "explore.rule" and rule == "none":
            raise ConfigError(f"{given.source} is for exploration, and there is none", "add --explore sea-bai")
        if key in EXPLORE_READ_BY and rule not in EXPLORE_READ_BY[key]:
            readers = " or ".join(EXPLORE_READ_BY[key])
            raise ConfigError(f"{given.source} is for --explore {readers}, and this is {rule}", "leave it out")
        if key == "sampling.mixture_weight" and sampler != "mixture" and _algorithm(merged) in ALGORITHM_CONFIGS:
            raise ConfigError(f"{given.source} is for --sampler mixture, and this is {sampler}", "leave it out")


def _check_all_is_read(merged: Layer) -> None:
    """Refuse what was typed for nothing; a file may hold everything, as that of an earlier run does."""
    for key, given in merged.items():
        if key.startswith(OFFLINE_UNREAD) and given.source.startswith("--"):
            raise ConfigError(f"{given.source} is for rollouts, and --offline has none", "leave it out")


def _check_offline_task(config: Config) -> None:
    if config.data.preferences is None:
        raise ConfigError("--offline trains on pairs, and none are given", "add --preferences with a file or a dataset")
    if config.model.path is None:
        raise ConfigError("--preferences is given and --model is not", "add --model with a folder or a hub id")
    for key in ONLINE_ONLY:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value:
            shown = ", ".join(value) if isinstance(value, tuple) else value
            raise ConfigError(
                f"{key} = {shown}, and --offline has no rollouts: no actor, no prompts of its own, no oracle",
                "leave it out, or leave out --offline",
            )
