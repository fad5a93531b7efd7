"""What the loop needs of its parts, so that each can be one of the fakes in :mod:`oatlite.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from oatlite.algorithms.base import Candidate, CandidateSet
from oatlite.messages import Float32, Int32, UInt64
from oatlite.metrics.records import Kind, Mean
from oatlite.oracles.base import Verdicts
from oatlite.sampling import SamplingOptions
from oatlite.workers.buffer import TrainingPair
from oatlite.workers.rollout import ParameterSource, Purpose
from oatlite.workers.update import UpdateStats

if TYPE_CHECKING:
    from oatlite.workers.experience import Rollouts
    from oatlite.workers.explorer import Choice


class Actors(Protocol):
    """``policy_version`` is the one that samples now; ``reload_s`` is what the last sync spent inside the engine, and
    ``sleep_s`` and ``wake_s`` what engines that sleep have spent in that since they were last set to 0."""

    policy_version: int
    reload_s: float
    sleep_s: float
    wake_s: float

    def generate(
        self,
        prompts: Sequence[Int32],
        seeds: UInt64,
        samplers: Sequence[Sequence[str]],
        sampling: SamplingOptions,
        *,
        is_last_of_version: bool = False,
    ) -> tuple[list[list[Candidate]], float]: ...
    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None,
        *,
        purpose: Purpose = "train",
    ) -> tuple[Verdicts, float]: ...
    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Float32, float]: ...
    def sync(self, version: int, source: ParameterSource) -> list[str]: ...


class Updates(Protocol):
    def learn(self, pairs: Sequence[TrainingPair], step: int) -> UpdateStats: ...


class Collects(Protocol):
    """The sampling half of a step, or what stands for it."""

    def collect(self, step: int, num_queries: int) -> Rollouts:
        """The pairs of ``step`` (from 1), ``num_queries`` oracle queries having been made before."""
        ...


class Explores(Protocol):
    """See :class:`oatlite.workers.explorer.Explorer`."""

    def choose(self, sets: Sequence[CandidateSet], step: int) -> Choice: ...
    def learn(self, comparisons: Float32, num_asked: int, num_before: int) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Judged:
    """Metrics that add up over ranks, and a row per prompt of this rank; pairs that an oracle was asked about, requests
    to it that failed and were made again, and seconds that it took, where there is one."""

    means: dict[str, Mean]
    rows: list[dict[str, Any]]
    num_queries: int = 0
    num_failures: int = 0
    score_s: float | None = None


class Favours(Protocol):
    def best(self, sets: Sequence[CandidateSet]) -> list[int]:
        """The best candidate of each prompt."""
        ...


class Judges(Protocol):
    """An evaluation on ``num_prompts`` held-out prompts over all ranks; without any there is none."""

    @property
    def num_prompts(self) -> int: ...
    def judge(self) -> Judged: ...


class Ranks(Protocol):
    """The learner's ranks as one of them sees them."""

    def add_up(self, values: Sequence[float]) -> list[float]: ...
    def maximum(self, value: float) -> float: ...
    def gather_bytes(self, data: bytes) -> list[bytes]: ...


class Policies(Protocol):
    """``newest``: the learner's weights. ``behaviour``: those that the actors sample with between two syncs."""

    @property
    def newest(self) -> ParameterSource: ...
    @property
    def behaviour(self) -> ParameterSource: ...
    def adopt(self) -> ParameterSource:
        """Make the newest weights the behaviour, and return it."""
        ...


class Keeps(Protocol):
    def record(self, kind: Kind, *, perf: dict[str, Any], **metrics: Any) -> None: ...
    def note(self, line: str) -> None: ...
    def samples(self, rows: Sequence[dict[str, Any]]) -> None: ...
    def evaluation(self, step: int, rows: Sequence[dict[str, Any]]) -> None: ...


class Shows(Protocol):
    def doing(self, stage: str, detail: str = "") -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of each step is this rank's."""

    rank: int
    count: int

    def of(self, items: Sequence[Any]) -> Any:
        """A contiguous part of ``items``, the same on every call."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]
