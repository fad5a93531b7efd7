"""From what was given to what will run: fills in what was left open, and refuses what cannot work together."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from oatlite.config.addresses import check_address
from oatlite.config.flags import to_type
from oatlite.config.oracle_names import kind_of
from oatlite.config.placement import places
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.hardware import existing_ancestor

DEMO = "demo"
PAIRRM = {"pairrm": "llm-blender/PairRM-hf"}
DEMO_GOLD_SCORE = "oatlite.demo.task:true_score"
DEFAULT_NAME = re.compile(r".+-\d{8}-\d{6}(-\d+)?")
MAX_ADAPTER_RANK = 512  # of vLLM
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def resolve(config: Config, num_gpus: int, *, is_resumed: bool = False) -> Config:
    """Fill every ``None`` that has a default, for a machine with ``num_gpus``, and check the whole.

    Resolving a resolved configuration changes nothing but an unset ``run.name``. Raises :class:`ConfigError` for what
    this machine lacks, numbers that don't divide, paths that are not there, and a run folder that cannot be used
    (which ``is_resumed`` expects to be there).
    """
    _check_gpus(config, num_gpus)
    resolved = Config.model_validate(_filled(config, num_gpus))
    _check_lora(resolved)
    _check_quantization(resolved)
    _check_offload(resolved)
    _check_reference(resolved)
    _check_samplers(resolved)
    _check_asynchronous(resolved)
    _check_ranks(resolved)
    resolved = _with_transport(resolved)
    _check_batches(resolved, batch_size_is_default=config.learner.batch_size is None)
    _check_oracles(resolved)
    _check_paths(resolved)
    if not is_resumed:
        _check_run_folder(resolved)
    return resolved


def resolve_inference(config: Config, num_gpus: int) -> Config:
    """As :func:`resolve`, for a command that only generates or scores: it takes one GPU of those that there are, and
    makes no run folder."""
    config = config.model_copy(
        update={"placement": config.placement.model_copy(update={"gpus": _one_engine(config, num_gpus)})}
    )
    _check_gpus(config, num_gpus)
    resolved = Config.model_validate(_filled(config, num_gpus))
    _check_oracles(resolved)
    _check_paths(resolved)
    return resolved


def _one_engine(config: Config, num_gpus: int) -> int:
    return min(1, num_gpus) if config.placement.gpus is None else config.placement.gpus


def num_steps(config: Config) -> int | None:
    """Steps of a resolved run, as far as the configuration bounds them; ``None`` where only the data can tell."""
    bounds = []
    if config.data.max_prompts is not None:
        bounds.append(config.data.max_prompts // config.rollout.prompts_per_step * config.data.epochs)
    if config.data.max_queries is not None:
        bounds.append(math.ceil(config.data.max_queries / pairs_of_step(config)))
    return min(bounds, default=None)


def gradient_steps(config: Config, step: int, *, passes: int | None = None) -> int:
    """Gradient steps that ``step`` (from 1) of a resolved run takes where no pair is left out.

    ``passes`` (default: those of the configuration) over all pairs in the buffer, of which there are more with each
    step until it is full or cleared.
    """
    learner, per_step = config.learner, config.rollout.prompts_per_step
    if config.explore.head_only:
        return 0
    assert learner.batch_size is not None and learner.buffer_size is not None, "resolved first"
    since_cleared = (step - 1) % learner.buffer_clear_every + 1 if learner.buffer_clear_every is not None else step
    held_steps = min(since_cleared, learner.buffer_size // per_step)
    count = (
        held_steps * -(-pairs_of_step(config) // learner.batch_size) * (learner.passes if passes is None else passes)
    )
    return min(count, learner.max_gradient_steps or count)


def pairs_of_step(config: Config) -> int:
    """Pairs that the oracle is asked about in a step: one for each prompt, or for a share of them."""
    return pairs_of_prompts(config, config.rollout.prompts_per_step)


def pairs_of_prompts(config: Config, num_prompts: int) -> int:
    """Pairs that the oracle is asked about, all ranks together, where a step has ``num_prompts``."""
    explore, ranks = config.explore, config.placement.learners or 1
    if explore.rule != "apl":
        return num_prompts
    parts = [num_prompts * (rank + 1) // ranks - num_prompts * rank // ranks for rank in range(ranks)]
    return sum(share_of(explore.certainty_share, share_of(explore.entropy_share, part)) for part in parts)


def share_of(share: float, count: int) -> int:
    """``share`` of ``count``, rounded up."""
    return math.ceil(share * count - 1e-9)


def prompts_within(config: Config, num_queries: int) -> int:
    """The most prompts of a step, one at least, that ask for no more than ``num_queries`` pairs."""
    counts = range(config.rollout.prompts_per_step, 0, -1)
    return next((count for count in counts if pairs_of_prompts(config, count) <= num_queries), 1)


def actors_of_rank(config: Config, rank: int) -> list[int]:
    """Actor ``i`` serves the learner rank ``i mod ranks``."""
    actors, learners = config.placement.actors, config.placement.learners
    assert actors is not None and learners is not None, "resolved first"
    return list(range(rank, actors, learners))


def _filled(config: Config, num_gpus: int) -> dict[str, Any]:
    values = config.model_dump()
    run, model, data, learner, placement = (values[s] for s in ("run", "model", "data", "learner", "placement"))

    def default(section: dict[str, Any], key: str, value: Any, unset: Any = None) -> None:
        if section[key] == unset:
            section[key] = value

    default(placement, "gpus", num_gpus)
    on_gpu = placement["gpus"] > 0
    if values["rollout"]["asynchronous"] and placement["gpus"] > 1:  # each side has GPUs of its own
        others = placement["gpus"] - (placement["actors"] or placement["gpus"] // 2)
        default(placement, "learners", max(1, min(others, placement["gpus"] // 2)))
        default(placement, "actors", placement["gpus"] - placement["learners"])
    default(placement, "learners", min(placement["gpus"] or 1, placement["actors"] or math.inf))
    default(placement, "actors", 0 if config.rollout.offline else max(placement["gpus"], placement["learners"]))
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
    all_places = places(config, cores=(0,))
    gpu_of_rank = {place.index: place.gpu for place in all_places if place.role == "learner"}
    is_shared = all(place.gpu is not None and place.gpu == gpu_of_rank[place.serves] for place in all_places)
    if asked == "cuda_ipc" and not is_shared:
        raise ConfigError(
            "sync.transport = cuda_ipc reaches actors on their learner's GPU, and here they have GPUs of their own",
            f"type {to_type('sync.transport', 'shm')}",
        )
    transport = ("cuda_ipc" if is_shared else "shm") if asked == "auto" else asked
    return config.model_copy(update={"sync": config.sync.model_copy(update={"transport": transport})})


def _new_name(config: Config) -> str:
    algorithm = config.algorithm.name.rpartition(":")[2].lower()
    name = f"{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (name, *(f"{name}-{n}" for n in range(2, 100)))
    return next((free for free in taken if not (Path(config.run.dir) / free).exists()), name)


def _check_gpus(config: Config, num_gpus: int) -> None:
    asked = config.placement.gpus
    if asked is not None and asked > num_gpus:
        have = f"this machine has {num_gpus or 'none'}"
        fix = to_type("placement.gpus", num_gpus) + ("" if num_gpus else " to run on the CPU")
        raise ConfigError(f"placement.gpus = {asked}, and {have} (CUDA_VISIBLE_DEVICES counts)", f"type {fix}")
    on_gpu = num_gpus > 0 if asked is None else asked > 0
    if config.sync.transport == "cuda_ipc" and not on_gpu:
        raise ConfigError("sync.transport = cuda_ipc needs a GPU", f"type {to_type('sync.transport', 'shm')}")


def _check_lora(config: Config) -> None:
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


def _check_quantization(config: Config) -> None:
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


def _check_offload(config: Config) -> None:
    learner = config.learner
    for key, stages in (("optimizer_offload", (1, 2, 3)), ("parameter_offload", (3,))):
        if getattr(learner, key) and learner.zero_stage not in stages:
            wanted = " or ".join(map(str, stages))
            raise ConfigError(
                f"learner.{key} needs ZeRO stage {wanted}, and learner.zero_stage is {learner.zero_stage}",
                f"type {to_type('learner.zero_stage', stages[-1])}",
            )


def _check_reference(config: Config) -> None:
    """An adapter's base is its reference: there is no second model."""
    if config.learner.reference_offload and config.lora.rank and config.model.reference == config.model.path:
        raise ConfigError(
            "learner.reference_offload = true, and with an adapter the reference is the policy's own base",
            "leave it out",
        )


def _check_samplers(config: Config) -> None:
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


def _check_asynchronous(config: Config) -> None:
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
        raise ConfigError(
            f"--explore {config.explore.rule} chooses by what the step before has taught, and --async samples before "
            "that",
            f"type {to_type('rollout.asynchronous', False)}",
        )
    assert place.actors is not None and place.learners is not None and place.gpus is not None
    if 0 < place.gpus < place.actors + place.learners:
        raise ConfigError(
            f"--async wants a GPU for each process, and {_count(place.learners, 'learner rank')} and "
            f"{_count(place.actors, 'actor')} have {_count(place.gpus, 'GPU')}",
            f"type {to_type('rollout.asynchronous', False)}, or --learners and --actors that fit",
        )


def _check_ranks(config: Config) -> None:
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


def _check_batches(config: Config, *, batch_size_is_default: bool) -> None:
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


def _check_paths(config: Config) -> None:
    for key, path in named_paths(config):
        looks_local = path.startswith(("/", "./", "../", "~")) or path.endswith(DATA_SUFFIXES)
        if looks_local and ":" not in path and not Path(path).exists():
            home = " (~ is not expanded here: give the whole path)" if path.startswith("~") else ""
            raise ConfigError(f"{key} = {path}: there is no such file or folder{home}", "give its path")
    named = [("algorithm.name", config.algorithm.name), *_oracle_names(config)]
    named = [(key, name) for key, name in named if ":" in name and not Path(name).exists()]
    if config.eval.gold_score is not None:
        named.append(("eval.gold_score", config.eval.gold_score))
    for key, reference in named:
        file, _, name = reference.rpartition(":")
        if not file or not name.isidentifier():
            raise ConfigError(f"{key} = {reference!r} must look like file.py:name", "give the file and the name in it")
        if file.endswith(".py") and not Path(file).is_file():
            raise ConfigError(f"{key} = {reference}: there is no file {file}", "give its path from this folder")


def named_paths(config: Config) -> list[tuple[str, str]]:
    """Every model and dataset that a configuration names, each with its key: files, folders or hub ids."""
    keys = ("model.path", "model.reference", "data.prompts", "data.preferences", "explore.encoder")
    values = [(key, getattr(getattr(config, key.split(".")[0]), key.split(".")[1])) for key in keys]
    models = [(key, name) for key, name in _oracle_names(config) if kind_of(name) == "model"]
    return [(key, value) for key, value in [*values, *models] if value is not None]


def _oracle_names(config: Config) -> list[tuple[str, str]]:
    keys = (("oracle.path", config.oracle.path), ("eval.oracle", config.eval.oracle))
    return [(key, name) for key, names in keys for name in names]


def _check_oracles(config: Config) -> None:
    """That each oracle has what its kind needs, and several have a weight each."""
    names = [name for _, name in _oracle_names(config)]
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
    for key, weights, paths in (
        ("oracle.weights", config.oracle.weights, config.oracle.path),
        ("eval.weights", config.eval.weights, config.eval.oracle),
    ):
        _check_weights(key, weights, paths)


def _check_weights(key: str, weights: tuple[float, ...], paths: tuple[str, ...]) -> None:
    if weights and len(weights) != len(paths):
        raise ConfigError(
            f"{key} has {_count(len(weights), 'number')}, and there are {_count(len(paths), 'oracle')}",
            f"type {to_type(key, ','.join('1' * len(paths)))}" if len(paths) > 1 else "leave it out",
        )


def _check_run_folder(config: Config) -> None:
    name, folder = config.run.name, Path(config.run.dir)
    assert name is not None
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        plain = re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "my-run"
        raise ConfigError(
            f"run.name = {name!r} must be a plain folder name (letters, digits, . _ + = -)",
            f"type {to_type('run.name', plain)}",
        )
    run = folder / name
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        taken = (f"{name}-{n}" for n in range(2, 1000))
        free = next((other for other in taken if not (folder / other).exists()), f"{name}-new")
        raise ConfigError(f"the run folder {run} is in use", f"type {to_type('run.name', free)}, or remove the folder")
    place = existing_ancestor(run)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot write the run folder {run}: {place} is no folder that you may write to",
            f"type {to_type('run.dir', 'FOLDER')}",
        )


def _multiples_near(number: int, unit: int) -> list[int]:
    below = number // unit * unit
    return [size for size in (below, below + unit) if size > 0]


def _choices(key: str, values: list[int]) -> str:
    return " or ".join(to_type(key, value) for value in values)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
