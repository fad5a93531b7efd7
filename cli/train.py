"""``oatlite train``: flags to a configuration, and the configuration to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oatlite.config.load import load_config, preset_names, resolve
from oatlite.hardware import visible_gpus

from .options import given_settings, setting

RUN, TASK, ALGORITHM, SAMPLING = "Run", "Model and data", "Algorithm", "Sampling"
BATCHES, ORACLE, PLACEMENT = "Batches", "Oracle", "Placement"
EVALUATION, CHECKPOINTS = "Evaluation", "Checkpoints"


def train(
    ctx: typer.Context,
    name: Annotated[str | None, setting("run.name", RUN)] = None,
    run_dir: Annotated[str | None, setting("run.dir", RUN)] = None,
    seed: Annotated[int | None, setting("run.seed", RUN)] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of settings; a run's own config.toml repeats it", rich_help_panel=RUN, metavar="FILE"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="settings to start from; default: demo, on GPUs tldr",
            rich_help_panel=RUN,
            metavar="|".join(preset_names()),
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="any other option; may be repeated", rich_help_panel=RUN, metavar="SECTION.KEY=VALUE"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="say what would run and what is missing; start nothing", rich_help_panel=RUN),
    ] = False,
    ui: Annotated[str | None, setting("run.ui", RUN, metavar="auto|live|plain")] = None,
    wandb: Annotated[bool | None, setting("run.wandb", RUN)] = None,
    model: Annotated[str | None, setting("model.path", TASK)] = None,
    reference_model: Annotated[str | None, setting("model.reference", TASK)] = None,
    prompts: Annotated[str | None, setting("data.prompts", TASK)] = None,
    preferences: Annotated[str | None, setting("data.preferences", TASK)] = None,
    prompt_key: Annotated[str | None, setting("data.prompt_key", TASK)] = None,
    reference_key: Annotated[str | None, setting("data.reference_key", TASK)] = None,
    split: Annotated[str | None, setting("data.split", TASK)] = None,
    chat_template: Annotated[bool | None, setting("data.chat_template", TASK)] = None,
    max_prompt_tokens: Annotated[int | None, setting("data.max_prompt_tokens", TASK)] = None,
    max_prompts: Annotated[int | None, setting("data.max_prompts", TASK)] = None,
    epochs: Annotated[int | None, setting("data.epochs", TASK)] = None,
    max_queries: Annotated[int | None, setting("data.max_queries", TASK)] = None,
    algo: Annotated[str | None, setting("algorithm.name", ALGORITHM, metavar="NAME")] = None,
    beta: Annotated[float | None, setting("algorithm.beta", ALGORITHM)] = None,
    lr: Annotated[float | None, setting("learner.lr", ALGORITHM)] = None,
    lora_rank: Annotated[int | None, setting("lora.rank", ALGORITHM)] = None,
    sync_every: Annotated[int | None, setting("rollout.sync_every", ALGORITHM)] = None,
    async_: Annotated[bool | None, setting("rollout.asynchronous", ALGORITHM)] = None,
    max_staleness: Annotated[int | None, setting("rollout.max_staleness", ALGORITHM)] = None,
    offline: Annotated[bool | None, setting("rollout.offline", ALGORITHM)] = None,
    explore: Annotated[
        str | None, setting("explore.rule", ALGORITHM, metavar="sea-bai|sea-ee|uncertainty|passive|apl")
    ] = None,
    num_candidates: Annotated[int | None, setting("explore.num_candidates", ALGORITHM)] = None,
    sampler: Annotated[
        str | None, setting("rollout.sampler", SAMPLING, metavar="policy|reference|hybrid|mixture")
    ] = None,
    max_new_tokens: Annotated[int | None, setting("sampling.max_new_tokens", SAMPLING)] = None,
    temperature: Annotated[float | None, setting("sampling.temperature", SAMPLING)] = None,
    prompts_per_step: Annotated[int | None, setting("rollout.prompts_per_step", BATCHES)] = None,
    batch_size: Annotated[int | None, setting("learner.batch_size", BATCHES)] = None,
    micro_batch_size: Annotated[int | None, setting("learner.micro_batch_size", BATCHES)] = None,
    oracle: Annotated[list[str] | None, setting("oracle.path", ORACLE, metavar="NAME")] = None,
    oracle_weights: Annotated[str | None, setting("oracle.weights", ORACLE, metavar="NUMBERS")] = None,
    oracle_url: Annotated[str | None, setting("remote.url", ORACLE, metavar="URL")] = None,
    judge_model: Annotated[str | None, setting("judge.model", ORACLE, metavar="NAME")] = None,
    judge_url: Annotated[str | None, setting("judge.url", ORACLE, metavar="URL")] = None,
    flip_prob: Annotated[float | None, setting("oracle.flip_prob", ORACLE)] = None,
    reference_offload: Annotated[bool | None, setting("learner.reference_offload", PLACEMENT)] = None,
    gpus: Annotated[int | None, setting("placement.gpus", PLACEMENT)] = None,
    actors: Annotated[int | None, setting("placement.actors", PLACEMENT)] = None,
    learners: Annotated[int | None, setting("placement.learners", PLACEMENT)] = None,
    gpus_per_actor: Annotated[int | None, setting("placement.gpus_per_actor", PLACEMENT)] = None,
    eval_every: Annotated[int | None, setting("eval.every", EVALUATION)] = None,
    eval_every_queries: Annotated[int | None, setting("eval.every_queries", EVALUATION)] = None,
    eval_oracle: Annotated[list[str] | None, setting("eval.oracle", EVALUATION, metavar="NAME")] = None,
    best_of_n: Annotated[int | None, setting("eval.best_of_n", EVALUATION)] = None,
    eval_prompts: Annotated[int | None, setting("eval.prompts", EVALUATION)] = None,
    save_every: Annotated[int | None, setting("checkpoint.save_every", CHECKPOINTS)] = None,
    keep_last: Annotated[int | None, setting("checkpoint.keep_last", CHECKPOINTS)] = None,
) -> None:
    """Align a policy online: sample, compare, learn, sync.

    Without any flag it runs the demo, on GPUs the preset tldr. Flags win over --config, which wins over --preset.
    """
    available = visible_gpus()
    given = load_config(
        preset=preset, file=config, flags=given_settings(ctx.params), sets=sets or (), num_gpus=len(available)
    )
    if dry_run:
        from oatlite.algorithm_checks import check_algorithm

        from .dry_run import report

        # GPUs that are missing are reported, not refused: the numbers are checked as if they were there.
        planned = resolve(given, max(len(available), given.placement.gpus or 0))
        goes_with_all = planned.rollout.sampler == "policy" and planned.placement.gpus_per_actor == 1
        if planned.explore.rule != "none" or not goes_with_all:  # it takes seconds: torch is loaded
            check_algorithm(planned)
        typer.echo("\n".join(report(planned, available)))
        return
    resolved = resolve(given, len(available))

    from oatlite.run import train as run_training

    raise typer.Exit(run_training(resolved))
