"""Flags of the commands that generate or score, and the configuration that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from oatlite.config.keys import fields_of
from oatlite.config.load import load_settings, resolve_inference
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.hardware import gpu_names

from .options import given_settings, setting

MODEL, DATA, SAMPLING, ORACLE, OUTPUT, MACHINE = "Model", "Data", "Sampling", "Oracle", "Output", "Machine"
ENGINE_KEYS = (
    *("model.path", "model.dtype", "model.trust_remote_code", "run.seed"),
    *("placement.gpus", "placement.gpu_memory_utilization", "placement.kv_cache_gib"),
    *("timeouts.start_s", "timeouts.generate_s"),
)
DATA_KEYS = (
    *("data.prompts", "data.split", "data.prompt_key", "data.reference_key"),
    *("data.chat_template", "data.max_prompt_tokens", "data.max_prompts"),
)
ORACLE_KEYS = (
    *("oracle.path", "oracle.weights", "oracle.chat_template", "oracle.max_tokens", "oracle.batch_tokens"),
    *("oracle.dtype", "remote", "judge", "timeouts.oracle_s", "run.seed", "placement.gpus", "model.trust_remote_code"),
)
WHOLE_GPU = 0.85
"""vLLM's share of a GPU where no learner wants one."""
OWN_FLAGS = {"top_p": "sampling.top_p", "top_k": "sampling.top_k", "feedback": "oracle.feedback"}
"""Options without a flag in ``oatlite train``, where they are given with --set."""


def _own(key: str, panel: str, flag: str, *, default: str = "", **more: Any) -> Any:
    section, _, name = key.partition(".")
    text = fields_of(section)[name].description
    return typer.Option(flag, help=f"{text}{default}", rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str, typer.Option("--model", help="a folder, a hub id, or demo", rich_help_panel=MODEL, show_default=False)
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="LoRA adapter for the model, a folder such as runs/NAME/adapter",
        rich_help_panel=MODEL,
        metavar="DIR",
        show_default=False,
    ),
]
Prompts = Annotated[str, _own("data.prompts", DATA, "--prompts")]
PromptKey = Annotated[str | None, setting("data.prompt_key", DATA)]
ReferenceKey = Annotated[str | None, setting("data.reference_key", DATA)]
Split = Annotated[
    str | None,
    typer.Option("--split", help="split of the data; default: train", rich_help_panel=DATA, show_default=False),
]
ChatTemplate = Annotated[bool | None, setting("data.chat_template", DATA)]
MaxPromptTokens = Annotated[int | None, setting("data.max_prompt_tokens", DATA)]
MaxPrompts = Annotated[
    int | None,
    typer.Option(
        "--max-prompts",
        help="so many of the prompts, the same for every seed; default: all",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Temperature = Annotated[float | None, _own("sampling.temperature", SAMPLING, "--temperature", default="; default: 0.7")]
MaxNewTokens = Annotated[
    int | None, _own("sampling.max_new_tokens", SAMPLING, "--max-new-tokens", default="; default: 53")
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="the likeliest tokens of so much probability; 1: off",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", help="so many of the likeliest tokens; 0: off", rich_help_panel=SAMPLING, show_default=False
    ),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="the likeliest token each time", rich_help_panel=SAMPLING)]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="seed of what is drawn; default: 0", rich_help_panel=SAMPLING, show_default=False),
]
Oracle = Annotated[list[str] | None, setting("oracle.path", ORACLE)]
OracleWeights = Annotated[str | None, setting("oracle.weights", ORACLE, metavar="NUMBERS")]
OracleUrl = Annotated[str | None, setting("remote.url", ORACLE, metavar="URL")]
JudgeModel = Annotated[str | None, setting("judge.model", ORACLE)]
JudgeUrl = Annotated[str | None, setting("judge.url", ORACLE, metavar="URL")]
Feedback = Annotated[Literal["threshold", "bernoulli"] | None, _own("oracle.feedback", ORACLE, "--feedback")]
FlipProb = Annotated[float | None, setting("oracle.flip_prob", ORACLE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output if it exists", rich_help_panel=OUTPUT)]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus", help="1: a GPU, 0: the CPU; default: a GPU if there is one", min=0, max=1, rich_help_panel=MACHINE,
        show_default=False,
    ),
]  # fmt: skip
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="any other option that the command reads; may be repeated",
        rich_help_panel=MACHINE,
        metavar="SECTION.KEY=VALUE",
        show_default=False,
    ),
]


def refuse_with_greedy(greedy: bool, flags: Mapping[str, object]) -> None:
    """Raise ConfigError where a flag of ``flags`` is given that greedy sampling does not read."""
    given = [flag for flag, value in flags.items() if value is not None]
    if greedy and given:
        raise ConfigError(f"{given[0]} is for samples, and --greedy takes none", "leave one of them out")


def settings(
    parameters: Mapping[str, Any],
    sets: Sequence[str] | None,
    *,
    reads: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that a command's parameters and ``--set`` come to, checked, on this machine.

    Raises ConfigError.
    """
    flags = given_settings(parameters)
    flags |= {key: parameters[name] for name, key in OWN_FLAGS.items() if parameters.get(name) is not None}
    own = {"placement.gpu_memory_utilization": WHOLE_GPU, **(defaults or {})}
    given = load_settings(reads=reads, flags=flags, sets=sets or (), defaults=own)
    config = resolve_inference(given, len(gpu_names()))
    from oatlite.demo.settings import with_demo

    return with_demo(config)
