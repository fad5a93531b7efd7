"""Which process goes on which GPU and which cores: one pure function of a resolved configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oatlite.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one process runs. ``gpus`` counts visible GPUs from 0; none is the CPU."""

    role: str
    """``"learner"`` or ``"actor"``."""
    index: int
    gpus: tuple[int, ...]
    cores: tuple[int, ...]
    serves: int
    """The learner rank whose prompts an actor answers; a learner's own rank."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def gpu(self) -> int | None:
        """Its first GPU, which is the one that it may share."""
        return self.gpus[0] if self.gpus else None


def places(config: Config, cores: Sequence[int]) -> list[Place]:
    """Learners first. Where the GPUs suffice for all, each process has its own; else actors and learners share them:
    of an actor with several GPUs, the first is shared.

    Learners and actors each have all ``cores`` between them, because in turn one group waits for the other; where they
    do not take turns, the kernel shares the cores out.
    """
    num_gpus, learners, actors = config.placement.gpus, config.placement.learners, config.placement.actors
    assert num_gpus is not None and learners is not None and actors is not None, "resolved first"
    each = config.placement.gpus_per_actor
    has_own = learners + actors * each <= num_gpus

    def of_learner(rank: int) -> tuple[int, ...]:
        return (rank if has_own else rank * each,) if num_gpus else ()

    def of_actor(actor: int) -> tuple[int, ...]:
        first = (learners if has_own else 0) + actor * each
        return tuple((first + i) % num_gpus for i in range(each)) if num_gpus else ()

    learner_places = [
        Place(
            role="learner",
            index=rank,
            gpus=of_learner(rank),
            cores=_share(cores, rank, learners),
            serves=rank,
        )
        for rank in range(learners)
    ]
    actor_places = [
        Place(
            role="actor",
            index=actor,
            gpus=of_actor(actor),
            cores=_share(cores, actor, actors),
            serves=actor % learners,
        )
        for actor in range(actors)
    ]
    return learner_places + actor_places


def actors_of_rank(config: Config, rank: int) -> list[int]:
    """Actor ``i`` serves the learner rank ``i mod ranks``."""
    actors, learners = config.placement.actors, config.placement.learners
    assert actors is not None and learners is not None, "resolved first"
    return list(range(rank, actors, learners))


def all_share_gpus(config: Config) -> bool:
    """Whether every actor is on the GPU of the learner that it serves, and so on no GPU with another learner."""
    all_places = places(config, cores=(0,))
    gpu_of_rank = {place.index: place.gpu for place in all_places if place.role == "learner"}
    return all(place.gpu is not None and place.gpu == gpu_of_rank[place.serves] for place in all_places)


def is_shared(place: Place, all_places: Sequence[Place]) -> bool:
    """Whether there is another process on its GPU."""
    return place.gpu is not None and sum(other.gpu == place.gpu for other in all_places) > 1


def starts_after(place: Place, all_places: Sequence[Place]) -> list[Place]:
    """The processes that must be ready before ``place`` starts: a learner waits for the actors on its GPU.

    An actor takes its part of the GPU by what it finds free before and after; a learner that takes memory meanwhile
    would be counted in.
    """
    if place.role == "actor" or place.gpu is None:
        return []
    return [other for other in all_places if other.role == "actor" and place.gpu in other.gpus]


def _share(cores: Sequence[int], index: int, num_shares: int) -> tuple[int, ...]:
    """The ``index``-th of ``num_shares`` even parts; with fewer cores than parts, one core each, in turn."""
    if num_shares >= len(cores):
        return (cores[index % len(cores)],)
    return tuple(cores[index * len(cores) // num_shares : (index + 1) * len(cores) // num_shares])
