"""Refusals of what cannot work together, or not on this machine. Each raises :class:`ConfigError`."""

from __future__ import annotations

import importlib.util
import math
from urllib.parse import urlsplit

from oatlite.config.addresses import check_address
from oatlite.config.flags import to_type
from oatlite.config.oracle_names import oracle_names
from oatlite.config.placement import actors_of_rank
from oatlite.config.schema import Config
from oatlite.errors import ConfigError

MAX_ADAPTER_RANK = 512  # of vLLM


def check_gpus(config: Config, num_gpus: int) -> None:
    asked = config.placement.gpus
    if asked is not None and asked > num_gpus:
        have = f"this machine has {num_gpus or 'none'}"
        fix = to_type("placement.gpus", num_gpus) + ("" if num_gpus else " to run on the CPU")
        raise ConfigError(f"placement.gpus = {asked}, and {have} (CUDA_VISIBLE_DEVICES counts)", f"type {fix}")
    on_gpu = num_gpus > 0 if asked is None else asked > 0
    if config.sync.transport == "cuda_ipc" and not on_gpu:
        raise ConfigError("sync.transport = cuda_ipc needs a GPU", f"type {to_type('sync.transport', 'shm')}")


def check_gpus_per_actor(config: Config) -> None:
    """Actors with several GPUs each share none of them with another actor. The CPU takes any number of processes."""
    gpus, actors, each = config.placement.gpus, config.placement.actors, config.placement.gpus_per_actor
    assert gpus is not None and actors is not None
    if each == 1 or not 0 < gpus < actors * each:
        return
    fixes = [to_type("placement.gpus_per_actor", max(1, gpus // actors))]
    if each <= gpus:
        fixes.append(to_type("placement.actors", gpus // each))
    raise ConfigError(
        f"{_count(actors, 'actor')} of placement.gpus_per_actor = {each} would be on {_count(actors * each, 'GPU')}, "
        f"and there {'is' if gpus == 1 else 'are'} {gpus}",
        f"type {' or '.join(fixes)}",
    )


def check_lora(config: Config) -> None:
    is_quantized = config.lora.quantize != "none"
    if config.lora.rank == 0 and (config.lora.sync == "adapter" or config.lora.targets or is_quantized):
        others = f"lora.quantize = {config.lora.quantize}" if is_quantized else "lora.targets"
        given = "lora.sync = adapter" if config.lora.sync == "adapter" else others
        raise ConfigError(f"{given} is for an adapter, and there is none", f"type {to_type('lora.rank', 16)}")
    if config.lora.sync == "adapter" and config.lora.rank > MAX_ADAPTER_RANK:
        raise ConfigError(
            f"lora.rank = {config.lora.rank}, and vLLM takes adapters up to rank {MAX_ADAPTER_RANK}",
            f"type {to_type('lora.rank', MAX_ADAPTER_RANK)} or {to_type('lora.sync', 'merged')}",
        )


def check_quantization(config: Config) -> None:
    if config.lora.quantize == "none":
        return
    off = f"type {to_type('lora.quantize', 'none')}"
    if not config.placement.gpus:
        raise ConfigError("lora.quantize = nf4 is for GPUs, and this run has none", f"{off} on the CPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.quantize = nf4 needs bitsandbytes, which is not installed", "pip install bitsandbytes")
    if config.learner.zero_stage == 3:
        raise ConfigError(
            "lora.quantize = nf4 with learner.zero_stage = 3: quantized weights cannot be cut up among ranks",
            f"type {to_type('learner.zero_stage', 2)}",
        )
    if config.lora.sync == "adapter":
        raise ConfigError(
            "lora.quantize = nf4 with lora.sync = adapter: the actors' base is not rounded to 4 bits, and would "
            "sample by another policy",
            f"type {to_type('lora.sync', 'merged')}",
        )


def check_offload(config: Config) -> None:
    learner = config.learner
    for key, stages in (("optimizer_offload", (1, 2, 3)), ("parameter_offload", (3,))):
        if getattr(learner, key) and learner.zero_stage not in stages:
            wanted = " or ".join(map(str, stages))
            raise ConfigError(
                f"learner.{key} needs ZeRO stage {wanted}, and learner.zero_stage is {learner.zero_stage}",
                f"type {to_type('learner.zero_stage', stages[-1])}",
            )


def check_reference(config: Config) -> None:
    """An adapter's base is its reference: there is no second model."""
    if config.learner.reference_offload and config.lora.rank and config.model.reference == config.model.path:
        raise ConfigError(
            "learner.reference_offload = true, and with an adapter the reference is the policy's own base",
            "leave it out",
        )


def check_samplers(config: Config) -> None:
    """XPO says itself where its responses come from; an engine with an adapter of its own has one reference."""
    is_xpo = config.algorithm.name == "xpo"
    if is_xpo and config.rollout.offline:
        raise ConfigError(
            "--algo xpo explores with responses of the policy and the reference, and --offline has none",
            f"type {to_type('algorithm.name', 'dpo')}, or leave out --offline",
        )
    if is_xpo and config.rollout.sampler != "policy":
        typed = to_type("rollout.sampler", config.rollout.sampler)
        raise ConfigError(f"{typed}, and --algo xpo says itself where its responses come from", "leave it out")
    samples_reference = is_xpo or config.rollout.sampler in ("reference", "hybrid")
    if samples_reference and config.lora.sync == "adapter" and config.model.reference != config.model.path:
        raise ConfigError(
            f"model.reference = {config.model.reference} is to be sampled from, and with lora.sync = adapter the "
            "actors have the policy's own base alone",
            f"type {to_type('lora.sync', 'merged')}",
        )


def check_asynchronous(config: Config) -> None:
    """Actors that sample while learners learn: between two steps, and on GPUs of their own."""
    rollout, place = config.rollout, config.placement
    if not rollout.asynchronous:
        return
    if rollout.sync_every != 1:
        raise ConfigError(
            f"rollout.sync_every = {rollout.sync_every}, and --async syncs after each step",
            f"type {to_type('rollout.sync_every', 1)}, or {to_type('rollout.asynchronous', False)}",
        )
    if config.explore.rule != "none":
        reason = {
            "apl": "asks the learner's reference before the oracle, and with --async the learner is at work then",
            "passive": "has a head that learns from each step in turn, and --async samples steps ahead",
        }.get(config.explore.rule, "chooses by what the step before has taught, and --async samples before that")
        raise ConfigError(
            f"--explore {config.explore.rule} {reason}",
            f"type {to_type('rollout.asynchronous', False)}",
        )
    assert place.actors is not None and place.learners is not None and place.gpus is not None
    if 0 < place.gpus < place.actors * place.gpus_per_actor + place.learners:
        wants, of_each = "a GPU for each process", ""
        if place.gpus_per_actor > 1:
            wants, of_each = "GPUs of its own for each process", f" of {place.gpus_per_actor} GPUs each"
        raise ConfigError(
            f"--async wants {wants}, and {_count(place.learners, 'learner rank')} and "
            f"{_count(place.actors, 'actor')}{of_each} have {_count(place.gpus, 'GPU')}",
            f"type {to_type('rollout.asynchronous', False)}, or --learners and --actors that fit",
        )


def check_ranks(config: Config) -> None:
    place, per_step = config.placement, config.rollout.prompts_per_step
    assert place.actors is not None and place.learners is not None and place.gpus is not None
    if place.actors < place.learners and not config.rollout.offline:
        raise ConfigError(
            f"placement.actors = {place.actors} is less than placement.learners = {place.learners}; a rank needs one",
            f"type {to_type('placement.actors', place.learners)} or {to_type('placement.learners', place.actors)}",
        )
    if 0 < place.gpus < place.learners:
        raise ConfigError(
            f"placement.learners = {place.learners} ranks do not fit on {place.gpus} GPUs, one on each",
            f"type {to_type('placement.learners', place.gpus)} {to_type('placement.actors', place.gpus)}",
        )
    sizes = {len(actors_of_rank(config, rank)) for rank in range(place.learners)} - {0}
    unit = place.learners * math.lcm(*sizes)
    if per_step % unit:
        each = " or ".join(str(size) for size in sorted(sizes))
        actors = f" with {each} actor{'' if sizes == {1} else 's'} each" if sizes else ""
        raise ConfigError(
            f"rollout.prompts_per_step = {per_step} does not split over "
            f"{_count(place.learners, 'learner rank')}{actors}",
            f"type {_choices('rollout.prompts_per_step', _multiples_near(per_step, unit))}",
        )


def check_batches(config: Config, *, batch_size_is_default: bool) -> None:
    per_step, batch, micro = config.rollout.prompts_per_step, config.learner.batch_size, config.learner.micro_batch_size
    ranks = config.placement.learners
    assert batch is not None and ranks is not None
    if batch % (ranks * micro):
        fits = [size for size in range(1, micro) if batch % (ranks * size) == 0][-1:]
        fixes = [_choices("learner.micro_batch_size", fits)] if fits else []
        changed = "rollout.prompts_per_step" if batch_size_is_default else "learner.batch_size"
        fixes.append(_choices(changed, _multiples_near(batch, ranks * micro)))
        origin = " (a whole step, as it was not given)" if batch_size_is_default else ""
        raise ConfigError(
            f"learner.batch_size = {batch}{origin} is no multiple of {_count(ranks, 'rank')} x {micro} pairs "
            "(learner.micro_batch_size)",
            f"type {' or '.join(fixes)}",
        )
    if per_step % batch:
        divisors = [size for size in range(ranks * micro, per_step + 1, ranks * micro) if per_step % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - batch))[:2])
        fixes = [_choices("learner.batch_size", near)] if near else []
        fixes.append(_choices("rollout.prompts_per_step", _multiples_near(per_step, batch)))
        raise ConfigError(
            f"rollout.prompts_per_step = {per_step} is no multiple of learner.batch_size = {batch}",
            f"type {' or '.join(fixes)}",
        )
    buffer = config.learner.buffer_size
    assert buffer is not None
    if buffer % per_step:
        raise ConfigError(
            f"learner.buffer_size = {buffer} is no multiple of rollout.prompts_per_step = {per_step}: "
            "the buffer holds whole steps",
            f"type {_choices('learner.buffer_size', _multiples_near(buffer, per_step))}",
        )
    for key in ("max_prompts", "max_queries"):
        bound = getattr(config.data, key)
        if bound is not None and bound < per_step:
            raise ConfigError(
                f"data.{key} = {bound} is less than one step's prompts, rollout.prompts_per_step = {per_step}",
                f"type {to_type(f'data.{key}', per_step)} or more",
            )


def check_oracles(config: Config) -> None:
    """That each oracle has what its kind needs, and several have a weight each."""
    names = [name for _, name in oracle_names(config)]
    needs_server = "remote" in config.oracle.path or ("remote" in names and config.eval.url is None)
    if needs_server and config.remote.url is None:
        raise ConfigError("the oracle is remote, and its server is not named", "add --oracle-url http://HOST:PORT")
    for name in names:
        if name.startswith(("http://", "https://")):
            typed = f"{to_type('oracle.path', 'remote')} {to_type('remote.url', name)}"
            raise ConfigError(f"the oracle {name} is a web address", f"type {typed}")
    needs_judge = "judge" in config.oracle.path or ("judge" in names and config.eval.judge_model is None)
    if needs_judge and config.judge.model is None:
        raise ConfigError("the oracle is a judge, and its model is not named", "add --judge-model NAME")
    urls = ("remote.url", "judge.url", "eval.url", "eval.judge_url")
    for key, url in ((key, getattr(getattr(config, key.split(".")[0]), key.split(".")[1])) for key in urls):
        if url is not None:
            check_address(key, url)
    _check_secrets(config)
    for key, weights, paths in (
        ("oracle.weights", config.oracle.weights, config.oracle.path),
        ("eval.weights", config.eval.weights, config.eval.oracle),
    ):
        _check_weights(key, weights, paths)


def _check_secrets(config: Config) -> None:
    """That a key or token which was meant for one host goes to no other."""
    remote, judge, eval_ = config.remote, config.judge, config.eval
    for kind, training, evaluation, variable, own, key in (
        ("remote", remote.url, eval_.url, remote.token_env, eval_.token_env, "eval.token_env"),
        ("judge", judge.url, eval_.judge_url, judge.key_env, eval_.judge_key_env, "eval.judge_key_env"),
    ):
        both_ask = kind in config.oracle.path and kind in config.eval.oracle
        if not both_ask or own is not None or training is None or evaluation is None:
            continue
        hosts = [urlsplit(url).hostname for url in (training, evaluation)]
        if hosts[0] != hosts[1]:
            raise ConfigError(
                f"evaluation asks {hosts[1]}, and the secret in {variable} is for {hosts[0]}",
                f"name the variable with the other's, {to_type(key, 'NAME')}",
            )


def _check_weights(key: str, weights: tuple[float, ...], paths: tuple[str, ...]) -> None:
    if weights and len(weights) != len(paths):
        there = f"there {'is' if len(paths) == 1 else 'are'} {_count(len(paths), 'oracle')}"
        raise ConfigError(
            f"{key} has {_count(len(weights), 'number')}, and {there}",
            f"type {to_type(key, ','.join('1' * len(paths)))}" if len(paths) > 1 else "leave it out",
        )


def _multiples_near(number: int, unit: int) -> list[int]:
    below = number // unit * unit
    return [size for size in (below, below + unit) if size > 0]


def _choices(key: str, values: list[int]) -> str:
    return " or ".join(to_type(key, value) for value in values)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
