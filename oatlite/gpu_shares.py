"""What a run takes of each GPU: its configuration and the sizes of its models in, vLLM's shares and lines out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from oatlite.config.flags import to_type
from oatlite.config.oracle_names import kind_of
from oatlite.config.placement import Place, places
from oatlite.config.schema import Config
from oatlite.config.steps import candidates_of
from oatlite.errors import ConfigError
from oatlite.memory import GIB, ActorShape, Division, LearnerShape, adapter_parameters, divide, reward_model
from oatlite.model_size import ModelSize, size_of

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NEED_NO_REFERENCE = ("simpo",)
"""Algorithms that do without a reference model."""
MIXING_BYTES = 5 * GIB
"""Keys and values of the reference that mixes in (:mod:`oatlite.engine.mixing`), and its forward pass."""
SHARE = "placement.gpu_memory_utilization"
LEARNING = "while it learns"


class _NotHere(Exception):
    """A model whose size cannot be told on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU and what runs on it. ``division`` is None where it cannot be told, and ``why`` says what is not known."""

    gpu: int
    actors: tuple[str, ...]
    division: Division | None
    why: str = ""
    given_share: float | None = None

    @property
    def share(self) -> float | None:
        """Of the GPU's memory, for vLLM in each actor, rounded down to a thousandth."""
        if self.given_share is not None or self.division is None or not self.division.total:
            return self.given_share
        return self.division.engine_bytes * 1000 // self.division.total / 1000


def cards(config: Config, totals: Sequence[int], longest: tuple[int, int]) -> list[Card]:
    """Each GPU of a resolved configuration. ``totals`` are the bytes of those that are here, 0 where that is not told;
    ``longest`` are the tokens of the longest prompt and response."""
    found = []
    all_places = places(config, cores=(0,))
    for gpu in sorted({place.gpu for place in all_places if place.gpu is not None}):
        here = [place for place in all_places if place.gpu == gpu]
        actors = tuple(place.name for place in here if place.role == "actor")
        total = totals[gpu] if gpu < len(totals) else None
        share = config.placement.gpu_memory_utilization
        if total == 0:
            found.append(Card(gpu=gpu, actors=actors, division=None, why="its memory", given_share=share))
            continue
        try:
            division = _divided(config, total, here, longest)
        except _NotHere as error:
            found.append(Card(gpu=gpu, actors=actors, division=None, why=f"the size of {error}", given_share=share))
        else:
            found.append(Card(gpu=gpu, actors=actors, division=division, given_share=share))
    return found


def engine_shares(config: Config, totals: Sequence[int], longest: tuple[int, int]) -> dict[str, float]:
    """vLLM's share of its GPU by the name of each actor: the one that is given, or what it needs.

    Raises ConfigError where a GPU is too small, or too little is known to tell, unless a share is given.
    """
    shares: dict[str, float] = {}
    for card in cards(config, totals, longest):
        if not card.actors:
            continue
        if card.share is None:
            raise ConfigError(
                f"vLLM's share of GPU {card.gpu} cannot be computed: {card.why or 'its memory'} is not known",
                f"type {to_type(SHARE, 0.35)}, or another share",
            )
        if card.given_share is None:
            _require_room(config, card)
        shares |= dict.fromkeys(card.actors, card.share)
    return shares


def report(config: Config, totals: Sequence[int], longest: tuple[int, int]) -> Iterator[str]:
    """A line for each GPU, and where vLLM sleeps one more."""
    for card in cards(config, totals, longest):
        division = card.division
        size = "missing" if card.gpu >= len(totals) else f"{_gib(totals[card.gpu])} GiB" if totals[card.gpu] else "?"
        if division is None:
            given = f", vLLM's share is {card.given_share:g}" if card.given_share is not None and card.actors else ""
            yield f"GPU {card.gpu} ({size}): not known without {card.why}{given}"
            continue
        left = f"needs {_gib(division.most)} GiB" if division.total is None else f"free {_gib(division.free)} GiB"
        yield f"GPU {card.gpu} ({size}): {', '.join([*_takers(division), left])}"
        if division.kept is not None:
            given_up = division.num_actors * max(0, division.engine_bytes - division.kept)
            yield f"  vLLM gives up {_gib(given_up)} GiB while the learner learns"


def _takers(division: Division) -> Iterator[str]:
    if division.num_actors:
        times = f"{division.num_actors} x " if division.num_actors > 1 else ""
        yield f"vLLM {times}{_gib(division.engine_bytes)} GiB ({_parts(division.engine)})"
        yield f"beside it {times}{_gib(division.beside)}"
    if division.learner:
        whole = dict(division.learner) | {LEARNING: division.passing}
        yield f"learner {_gib(sum(whole.values()))} GiB ({_parts(whole)})"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _divided(config: Config, total: int | None, here: Sequence[Place], longest: tuple[int, int]) -> Division:
    policy = _size(config.model.path)
    num_actors = sum(place.role == "actor" for place in here)
    learner = _learner(config, policy, longest) if any(place.role == "learner" for place in here) else None
    actor = _actor(config, policy, longest) if num_actors else None
    if learner is None and actor is not None:
        actor = replace(actor, sleeps=False)
    share = config.placement.gpu_memory_utilization
    if share is None or actor is None:
        return divide(total, actor, num_actors, learner)
    wanted = divide(None, actor, num_actors, learner)
    given = dict(wanted.engine) if total is None else {"as given": int(share * total)}
    return replace(wanted, total=total, engine=given)


def _learner(config: Config, policy: ModelSize, longest: tuple[int, int]) -> LearnerShape:
    learner, b = config.learner, WEIGHT_BYTES[config.model.dtype]
    has_adapter = config.lora.rank > 0
    trained = adapter_parameters(policy, config.lora.rank) if has_adapter else policy.num_parameters
    is_own = has_adapter and config.model.reference == config.model.path
    trains = not config.explore.head_only
    asks = trains and (config.algorithm.name not in NEED_NO_REFERENCE or learner.log_kl or config.explore.rule == "apl")
    sent = trained if config.lora.sync == "adapter" else policy.num_parameters
    slot = max(config.sync.bucket_mib << 20, b * policy.vocab_size * policy.hidden_size)
    on_gpu = config.sync.transport == "cuda_ipc" and not config.rollout.offline
    return LearnerShape(
        policy=policy,
        weight_bytes=b,
        num_trained=trained,
        zero_stage=int(learner.zero_stage or 0),
        ranks=int(config.placement.learners or 1),
        num_rows=2 * learner.micro_batch_size,  # where the model takes no rows with both responses
        row_tokens=sum(longest),
        buffer_bytes=min(b * sent, 2 * slot) if on_gpu else 0,
        reference=_size(config.model.reference) if asks and not is_own else None,
        is_reference_offloaded=learner.reference_offload,
        is_optimizer_offloaded=learner.optimizer_offload,
        are_parameters_offloaded=learner.parameter_offload,
        is_quantized=config.lora.quantize != "none",
        recomputes_activations=learner.gradient_checkpointing,
    )


def _actor(config: Config, policy: ModelSize, longest: tuple[int, int]) -> ActorShape:
    b, num_actors = WEIGHT_BYTES[config.model.dtype], int(config.placement.actors or 1)
    candidates = candidates_of(config) or 2
    batches = config.rollout.prompts_per_step * candidates, config.eval.prompts * config.eval.best_of_n
    oracles = [*config.oracle.path, *config.eval.oracle]
    if config.explore.rule not in ("none", "apl") and config.explore.encoder not in (None, *config.oracle.path):
        oracles.append(str(config.explore.encoder))
    rewards = [_size(name) for name in oracles if kind_of(name) == "model"]
    beside = sum(reward_model(size, WEIGHT_BYTES[config.oracle.dtype], config.oracle.batch_tokens) for size in rewards)
    if config.rollout.sampler == "mixture":
        beside += b * _size(config.model.reference).num_parameters + MIXING_BYTES
    return ActorShape(
        model=policy,
        weight_bytes=b,
        num_sequences=-(-max(batches) // num_actors),
        sequence_tokens=sum(longest),
        num_gpus=config.placement.gpus_per_actor,
        beside_bytes=beside,
        sleeps=bool(config.placement.sleep),
    )


def _size(name: str | None) -> ModelSize:
    size = size_of(str(name))
    if size is None:
        raise _NotHere(name)
    return size


def _require_room(config: Config, card: Card) -> None:
    division = card.division
    assert division is not None and division.total is not None
    if division.free >= 0:
        return
    largest = max([*division.learner, LEARNING], key=lambda name: _of(division, name))
    raise ConfigError(
        f"GPU {card.gpu} has {_gib(division.total)} GiB, and what is to run there needs {_gib(division.most)} GiB: "
        f"{', '.join(_takers(division))}",
        f"type {_remedy(config, largest)}, or {to_type(SHARE, 0.35)} to have it your way",
    )


def _of(division: Division, part: str) -> int:
    return division.passing if part == LEARNING else division.learner[part]


def _remedy(config: Config, largest: str) -> str:
    """What makes the largest part of a learner smaller."""
    learner = config.learner
    if largest == LEARNING and learner.micro_batch_size > 1:
        return to_type("learner.micro_batch_size", learner.micro_batch_size // 2)
    if largest == LEARNING and not learner.gradient_checkpointing:
        return to_type("learner.gradient_checkpointing", True)
    if largest == "reference" and not learner.reference_offload:
        return to_type("learner.reference_offload", True)
    if largest in ("optimizer", "gradients") and learner.zero_stage and not learner.optimizer_offload:
        return to_type("learner.optimizer_offload", True)
    if largest in ("optimizer", "gradients") and not config.lora.rank:
        return to_type("lora.rank", 16)
    return "a smaller --model, or more --gpus"
