"""The two sets of weights that a rank may have to push: the newest ones, and those that its actors sample with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from oatlite.config.schema import Config
from oatlite.lora import Published
from oatlite.trainer import Trainer
from oatlite.workers.rollout import ParameterSource

MODULE_PREFIX = "model."  # PairModel holds the policy under this name


def behaviour_is_kept(config: Config) -> bool:
    """Whether an actor that restarts needs other weights than the learner's as they are then."""
    lags = (config.rollout.sync_every > 1 or config.rollout.asynchronous) and not config.explore.head_only
    return lags or config.learner.zero_stage == 3


class PolicyWeights:
    """``published`` are the tensors that actors are sent, by their names there.

    ``keeps_behaviour`` makes a copy in host memory at each adoption. It is needed where the behaviour lags behind the
    newest weights (``sync_every`` above 1, or an asynchronous run), and under ZeRO-3, where weights for one restarted
    actor could otherwise be gathered only if all ranks took part.
    """

    def __init__(
        self, trainer: Trainer, published: Mapping[str, Published], dtype: torch.dtype, *, keeps_behaviour: bool
    ) -> None:
        self._trainer = trainer
        self._published = published
        self._dtype = dtype
        self._keeps_behaviour = keeps_behaviour
        self._copy: dict[str, torch.Tensor] | None = None
        self.behaviour: ParameterSource = self._open_newest
        self.adopt()

    @property
    def newest(self) -> ParameterSource:
        """The learner's weights as they are now; a copy where gathering them takes all ranks, since this may be asked
        again for a single actor that restarts."""
        return _opener(self.copy_to_host(self._dtype)) if self._trainer.gathers_weights else self._open_newest

    @property
    def lagging_behaviour(self) -> dict[str, torch.Tensor] | None:
        """The copy of the behaviour's weights by name, where one is kept."""
        return self._copy

    @contextmanager
    def _open_newest(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        with self._open(self._published, names) as parameter:
            yield parameter

    @contextmanager
    def _open(
        self, published: Mapping[str, Published], names: Sequence[str]
    ) -> Iterator[Callable[[str], torch.Tensor]]:
        sources = [MODULE_PREFIX + source for name in names for source in published[name].sources]
        with self._trainer.whole_parameters(sources) as parameter:
            yield lambda name: published[name].value(lambda source: parameter(MODULE_PREFIX + source))

    def adopt(self) -> ParameterSource:
        """Make the newest weights the behaviour, and return it. All ranks together under ZeRO-3."""
        if self._keeps_behaviour:
            self.adopt_copy(self.copy_to_host(self._dtype))
        return self.behaviour

    def adopt_copy(self, copy: dict[str, torch.Tensor]) -> None:
        """Make ``copy``, weights by name in CPU memory, the behaviour."""
        self._copy = copy
        self.behaviour = _opener(copy)

    def copy_to_host(
        self, dtype: torch.dtype, published: Mapping[str, Published] | None = None, *, is_kept: bool = True
    ) -> dict[str, torch.Tensor]:
        """The newest weights by name, in CPU memory: what actors are sent, or the given ones.

        A rank that does not keep them takes part all the same where ranks must gather them together.
        """
        copy: dict[str, torch.Tensor] = {}
        published = self._published if published is None else published
        if not is_kept and not self._trainer.gathers_weights:
            return copy
        for name in published:
            with self._open(published, [name]) as parameter:
                if not is_kept:
                    continue
                copy[name] = parameter(name).detach().to("cpu", dtype, copy=True)
        return copy


def _opener(copy: dict[str, torch.Tensor]) -> ParameterSource:
    @contextmanager
    def open_copy(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield copy.__getitem__

    return open_copy
