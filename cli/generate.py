"""``oatlite generate``: responses to many prompts, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from oatlite.config.flags import to_type

from .building import command
from .inference import (
    DATA,
    DATA_KEYS,
    ENGINE_KEYS,
    OUTPUT,
    SAMPLING,
    Adapter,
    ChatTemplate,
    Gpus,
    Greedy,
    MaxNewTokens,
    MaxPrompts,
    MaxPromptTokens,
    Model,
    Overwrite,
    PromptKey,
    Prompts,
    Seed,
    Sets,
    Split,
    Temperature,
    TopK,
    TopP,
    refuse_with_greedy,
    settings,
)
from .options import given_settings


def generate(
    ctx: typer.Context,
    model: Model,
    prompts: Prompts,
    output: Annotated[
        Path,
        typer.Option(
            help="file to make, a JSON line for each response",
            rich_help_panel=OUTPUT,
            metavar="FILE.jsonl",
            show_default=False,
        ),
    ],
    overwrite: Overwrite = False,
    adapter: Adapter = None,
    prompt_key: PromptKey = None,
    reference_key: Annotated[
        str | None,
        typer.Option(
            help="column of answers, which are copied; default: reference, if there is one",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    split: Split = None,
    chat_template: ChatTemplate = None,
    max_prompt_tokens: MaxPromptTokens = None,
    max_prompts: MaxPrompts = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    num_samples: Annotated[int, typer.Option(help="responses to each prompt", min=1, rich_help_panel=SAMPLING)] = 1,
    seed: Seed = None,
    gpus: Gpus = None,
    sets: Sets = None,
) -> None:
    """Sample responses to the prompts of a dataset into a file.

    A line has the prompt, its row, the response with the number of the sample, its tokens, whether it is finished, and
    the sum of the tokens' log-probabilities at temperature 1. `oatlite label` makes preferences of two samples.
    """
    refuse_with_greedy(greedy, {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k})
    config = settings(ctx.params, sets, reads=(*ENGINE_KEYS, *DATA_KEYS, "sampling"))
    from oatlite.fitting import console_report
    from oatlite.inference.generate import GenerateOptions
    from oatlite.inference.generate import generate as run
    from oatlite.inference.signals import stopped_by_signals

    options = GenerateOptions(
        config=config,
        output=output,
        adapter=adapter,
        num_samples=num_samples,
        is_greedy=greedy,
        overwrite=overwrite,
        needs_references=reference_key is not None,
    )
    with stopped_by_signals(), console_report() as report:
        made = run(options, report)
    dropped = f", {made.num_dropped} left out as empty or too long" if made.num_dropped else ""
    print(
        f"{output}: {made.num_responses} responses to {made.num_prompts} prompts{dropped}, "
        f"{made.mean_tokens:.0f} tokens each, {made.share_truncated:.0%} not finished"
    )
    if num_samples > 1:
        flags: dict[str, str | Path] = {
            "--data": output,
            "--oracle": "REWARD_MODEL",
            "--output": output.with_name(f"{output.stem}-pairs.jsonl"),
        }
        print(f"next: {command('label', flags, {})}")
    else:
        following = _eval_of(ctx.params)
        if following is not None:
            print(f"next: {following}")


def _eval_of(parameters: Mapping[str, Any]) -> str | None:
    """The command that judges the model on the same prompts; none for an adapter, which ``oatlite eval`` does not
    take."""
    if parameters["adapter"] is not None:
        return None
    flags = {
        "--model": parameters["model"],
        "--against": "references",
        "--oracle": "REWARD_MODEL",
        "--prompts": parameters["prompts"],
    }
    given = {key: value for key, value in given_settings(parameters).items() if key in DATA_KEYS}
    del given["data.prompts"]
    return " ".join([command("eval", flags, {}), *(to_type(key, value) for key, value in given.items())])
