"""From what was given to what will run: fills in what was left open, and has the whole checked."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

from oatlite.config.combinations import (
    check_asynchronous,
    check_batches,
    check_gpus,
    check_gpus_per_actor,
    check_lora,
    check_offload,
    check_oracles,
    check_quantization,
    check_ranks,
    check_reference,
    check_samplers,
)
from oatlite.config.flags import to_type
from oatlite.config.on_disk import check_paths, check_run_folder
from oatlite.config.oracle_names import PAIRRM
from oatlite.config.placement import all_share_gpus
from oatlite.config.schema import Config
from oatlite.errors import ConfigError

DEMO = "demo"
DEMO_GOLD_SCORE = "oatlite.demo.task:true_score"
DEFAULT_NAME = re.compile(r".+-\d{8}-\d{6}(-\d+)?")


def resolve(config: Config, num_gpus: int, *, is_resumed: bool = False) -> Config:
    """Fill every ``None`` that has a default, for a machine with ``num_gpus``, and check the whole.

    Resolving a resolved configuration changes nothing but an unset ``run.name``. Raises :class:`ConfigError` for what
    this machine lacks, numbers that don't divide, paths that are not there, and a run folder that cannot be used
    (which ``is_resumed`` expects to be there).
    """
    check_gpus(config, num_gpus)
    resolved = Config.model_validate(_filled(config, num_gpus))
    check_gpus_per_actor(resolved)
    check_lora(resolved)
    check_quantization(resolved)
    check_offload(resolved)
    check_reference(resolved)
    check_samplers(resolved)
    check_asynchronous(resolved)
    check_ranks(resolved)
    resolved = _with_sleep(_with_transport(resolved))
    check_batches(resolved, batch_size_is_default=config.learner.batch_size is None)
    check_oracles(resolved)
    check_paths(resolved)
    if not is_resumed:
        check_run_folder(resolved)
    return resolved


def resolve_inference(config: Config, num_gpus: int) -> Config:
    """As :func:`resolve`, for a command that only generates or scores: it takes one GPU of those that there are, and
    makes no run folder."""
    config = config.model_copy(
        update={"placement": config.placement.model_copy(update={"gpus": _one_engine(config, num_gpus)})}
    )
    check_gpus(config, num_gpus)
    resolved = Config.model_validate(_filled(config, num_gpus))
    check_oracles(resolved)
    check_paths(resolved)
    return resolved


def _one_engine(config: Config, num_gpus: int) -> int:
    return min(1, num_gpus) if config.placement.gpus is None else config.placement.gpus


def _filled(config: Config, num_gpus: int) -> dict[str, Any]:
    values = config.model_dump()
    run, model, data, learner, placement = (values[s] for s in ("run", "model", "data", "learner", "placement"))

    def default(section: dict[str, Any], key: str, value: Any, unset: Any = None) -> None:
        if section[key] == unset:
            section[key] = value

    default(placement, "gpus", num_gpus)
    on_gpu = placement["gpus"] > 0
    each = 1 if config.rollout.offline else placement["gpus_per_actor"]
    if values["rollout"]["asynchronous"] and placement["gpus"] > 1:  # each side has GPUs of its own
        half = placement["gpus"] // 2
        actors = placement["actors"] or max(1, half // each)
        default(placement, "learners", max(1, min(placement["gpus"] - actors * each, half, actors)))
        default(placement, "actors", max(1, (placement["gpus"] - placement["learners"]) // each))
    num_places = placement["gpus"] // each
    default(placement, "learners", min(num_places or 1, placement["actors"] or math.inf))
    default(placement, "actors", 0 if config.rollout.offline else max(num_places, placement["learners"]))
    default(model, "reference", model["path"])
    default(model, "dtype", "bfloat16" if on_gpu else "float32", unset="auto")
    values["explore"]["encoder"] = PAIRRM.get(values["explore"]["encoder"], values["explore"]["encoder"])
    for section, key in (("oracle", "path"), ("eval", "oracle")):
        values[section][key] = tuple(PAIRRM.get(name, name) for name in values[section][key])
    default(values["oracle"], "dtype", "bfloat16" if on_gpu else "float32", unset="auto")
    if values["lora"]["rank"]:
        default(values["lora"], "alpha", 2 * values["lora"]["rank"])
    default(learner, "batch_size", values["rollout"]["prompts_per_step"])
    default(learner, "buffer_size", values["rollout"]["prompts_per_step"])
    # In bfloat16, ZeRO keeps the weights and the sum over micro-batches in float32; without it they lose small steps.
    default(learner, "zero_stage", 2 if placement["learners"] > 1 or model["dtype"] == "bfloat16" else 0)
    if data["prompts"] == DEMO:
        default(values["eval"], "gold_score", DEMO_GOLD_SCORE)
    default(run, "name", _new_name(config))
    return values


def _with_transport(config: Config) -> Config:
    """CUDA IPC where every actor shares its learner's GPU; each process sees its own GPU alone."""
    asked = config.sync.transport
    is_shared = all_share_gpus(config)
    if asked == "cuda_ipc" and not is_shared:
        raise ConfigError(
            "sync.transport = cuda_ipc reaches actors on their learner's GPU, and here they have GPUs of their own",
            f"type {to_type('sync.transport', 'shm')}",
        )
    transport = ("cuda_ipc" if is_shared else "shm") if asked == "auto" else asked
    return config.model_copy(update={"sync": config.sync.model_copy(update={"transport": transport})})


def _with_sleep(config: Config) -> Config:
    """vLLM sleeps where a learner has use for its memory."""
    each = config.placement.gpus_per_actor
    can_sleep = not config.rollout.offline and all_share_gpus(config) and each == 1
    asked = config.placement.sleep
    if asked and each > 1:
        raise ConfigError(
            f"placement.sleep = true, and an engine over placement.gpus_per_actor = {each} GPUs does not sleep",
            f"type {to_type('placement.sleep', False)}",
        )
    if asked and not can_sleep:
        raise ConfigError(
            "placement.sleep = true gives vLLM's memory to a learner on the same GPU, and here not every actor is on "
            "its learner's",
            f"type {to_type('placement.sleep', False)}",
        )
    placement = config.placement.model_copy(update={"sleep": can_sleep if asked is None else asked})
    return config.model_copy(update={"placement": placement})


def _new_name(config: Config) -> str:
    algorithm = config.algorithm.name.rpartition(":")[2].lower()
    name = f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (name, *(f"{name}-{n}" for n in range(2, 100)))
    return next((free for free in taken if not (Path(config.run.dir) / free).exists()), name)
