"""``oatlite chat``: a conversation with a model."""

from __future__ import annotations

from typing import Annotated

import typer

from .inference import (
    ENGINE_KEYS,
    MODEL,
    SAMPLING,
    Adapter,
    Gpus,
    Greedy,
    Model,
    Seed,
    Sets,
    Temperature,
    TopK,
    TopP,
    refuse_with_greedy,
    settings,
)

LONGEST_ANSWER = 512


def chat(
    ctx: typer.Context,
    model: Model,
    adapter: Adapter = None,
    system: Annotated[
        str | None,
        typer.Option(help="message of the system, before all others", rich_help_panel=MODEL, show_default=False),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            help="of the conversation with its answer; default: what the model takes, up to 4096",
            min=2,
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"longest answer, in tokens; default: {LONGEST_ANSWER}", rich_help_panel=SAMPLING, show_default=False
        ),
    ] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    seed: Seed = None,
    gpus: Gpus = None,
    sets: Sets = None,
) -> None:
    """Talk to a model.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. Through a pipe each line gets one
    line in answer, in which a line break is written as a backslash and an n.
    """
    refuse_with_greedy(greedy, {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k})
    defaults = {"sampling.max_new_tokens": LONGEST_ANSWER}
    config = settings(
        ctx.params,
        sets,
        reads=(*(key for key in ENGINE_KEYS if not key.startswith("timeouts.")), "sampling"),
        defaults=defaults,
    )
    from oatlite.inference.chat import ChatOptions
    from oatlite.inference.chat import chat as talk
    from oatlite.inference.signals import stopped_by_signals

    with stopped_by_signals():
        talk(
            ChatOptions(config=config, adapter=adapter, is_greedy=greedy, system=system, context_tokens=context_tokens)
        )
