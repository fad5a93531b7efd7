"""Which option has a flag of its own, and the words that tell a person what to type."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

FLAGS: dict[str, str] = {
    "run.name": "--name",
    "run.dir": "--run-dir",
    "run.seed": "--seed",
    "run.ui": "--ui",
    "run.wandb": "--wandb",
    "model.path": "--model",
    "model.reference": "--reference-model",
    "data.prompts": "--prompts",
    "data.preferences": "--preferences",
    "data.prompt_key": "--prompt-key",
    "data.reference_key": "--reference-key",
    "data.split": "--split",
    "data.chat_template": "--chat-template",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.max_prompts": "--max-prompts",
    "data.epochs": "--epochs",
    "data.max_queries": "--max-queries",
    "algorithm.name": "--algo",
    "algorithm.beta": "--beta",
    "learner.lr": "--lr",
    "rollout.sync_every": "--sync-every",
    "rollout.asynchronous": "--async",
    "rollout.max_staleness": "--max-staleness",
    "rollout.offline": "--offline",
    "rollout.sampler": "--sampler",
    "sampling.max_new_tokens": "--max-new-tokens",
    "sampling.temperature": "--temperature",
    "rollout.prompts_per_step": "--prompts-per-step",
    "learner.batch_size": "--batch-size",
    "learner.micro_batch_size": "--micro-batch-size",
    "lora.rank": "--lora-rank",
    "learner.reference_offload": "--reference-offload",
    "explore.rule": "--explore",
    "explore.num_candidates": "--num-candidates",
    "oracle.path": "--oracle",
    "oracle.weights": "--oracle-weights",
    "oracle.flip_prob": "--flip-prob",
    "remote.url": "--oracle-url",
    "judge.model": "--judge-model",
    "judge.url": "--judge-url",
    "placement.gpus": "--gpus",
    "placement.actors": "--actors",
    "placement.learners": "--learners",
    "placement.gpus_per_actor": "--gpus-per-actor",
    "eval.every": "--eval-every",
    "eval.every_queries": "--eval-every-queries",
    "eval.oracle": "--eval-oracle",
    "eval.best_of_n": "--best-of-n",
    "eval.prompts": "--eval-prompts",
    "checkpoint.save_every": "--save-every",
    "checkpoint.keep_last": "--keep-last",
}


def program() -> str:
    """The word that starts a command line of ours, quoted for a shell: ``oatlite``, or what ``cli/bootstrap.py`` says
    that finds it where the person's shell does not."""
    return shlex.quote(os.environ.get("OATLITE_COMMAND") or "oatlite")


def to_type(key: str, value: Any) -> str:
    """What to type on the command line to give ``key`` this value, quoted for a shell."""
    flag = FLAGS.get(key)
    if flag is not None and isinstance(value, tuple):  # of names, each with the flag before it
        return " ".join(f"{flag} {shlex.quote(str(item))}" for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    if flag is None:
        return f"--set {shlex.quote(f'{key}={text}')}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {shlex.quote(text)}"
