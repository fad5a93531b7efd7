"""That a task is whole: what is trained, on which prompts or pairs, and who judges."""

from __future__ import annotations

from oatlite.config.flags import to_type
from oatlite.config.schema import PROMPT, Config
from oatlite.errors import ConfigError

ONLINE_ONLY = ("data.prompts", "data.max_queries", "oracle.path", "placement.actors")
"""Of a preset, what an offline run does not take over; given otherwise, it is refused there."""


def check_task(config: Config) -> None:
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
