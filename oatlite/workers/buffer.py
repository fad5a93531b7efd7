"""The pairs that a rank trains on: those of the newest step and, on request, those of some steps before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oatlite.layouts import TokenPair
from oatlite.messages import Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPair:
    """A judged pair. ``sampler_logprobs`` are those of the chosen response, then of the rejected one, where this run
    has sampled them, ``samplers`` the names of the distributions that they are of, and ``policy_version`` the version
    of the policy in them; ``margin`` is the oracle's reward of the one minus that of the other; ``is_trainable`` says
    that the verdict can be used."""

    tokens: TokenPair
    sampler_logprobs: Float32 | None
    is_trainable: bool
    margin: float = 0.0
    samplers: tuple[str, str] = ("policy", "policy")
    policy_version: int = 0


@dataclass(slots=True)
class Entry:
    """A pair of step ``step``; ``reference_logprobs`` are those of the chosen response, then of the rejected one, once
    known."""

    pair: TrainingPair
    step: int
    reference_logprobs: Float32 | None = None


class PairBuffer:
    """First in, first out, by whole steps: so all ranks hold the same number of steps, whatever their pairs."""

    def __init__(self, num_steps: int, clear_every: int | None = None) -> None:
        self._held: deque[tuple[int, list[Entry]]] = deque(maxlen=num_steps)
        self._clear_every = clear_every

    def add(self, pairs: Sequence[TrainingPair], step: int) -> None:
        """The pairs of ``step``; the oldest step goes where there is no room, and all of them when a clearing is due
        (after every ``clear_every``-th step)."""
        if self._clear_every is not None and (step - 1) % self._clear_every == 0:
            self._held.clear()
        self._held.append((step, [Entry(pair, step) for pair in pairs]))

    @property
    def steps(self) -> list[int]:
        """The steps that are held, those without a pair too."""
        return [step for step, _ in self._held]

    def restore(self, steps: Sequence[int], entries: Sequence[Entry]) -> None:
        """Hold ``entries`` of ``steps`` instead of what is held."""
        self._held.clear()
        self._held.extend((step, [entry for entry in entries if entry.step == step]) for step in steps)

    def __iter__(self) -> Iterator[Entry]:
        for _, entries in self._held:
            yield from entries
