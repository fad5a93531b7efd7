"""The learning half of a step: pairs in, gradient steps taken, metrics out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from oatlite.algorithms.base import Algorithm
from oatlite.maths.logprobs import mismatch
from oatlite.maths.pairs import ResponseLogprobs
from oatlite.messages import Float32
from oatlite.metrics.records import Mean
from oatlite.models import ForwardBatch, LayoutName, TokenPair, lay_out
from oatlite.trainer import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPair:
    """``sampler_logprobs`` are those of the chosen response, then of the rejected one; ``is_trainable`` says that
    the verdict can be used."""

    tokens: TokenPair
    sampler_logprobs: Float32
    is_trainable: bool


class TrainerLike(Protocol):
    """What the update needs of a trainer; :class:`oatlite.trainer.Trainer` is the real one."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> StepResult: ...
    def add_up(self, values: Sequence[float]) -> list[float]: ...
    def maximum(self, value: float) -> float: ...


@dataclass(slots=True)
class UpdateStats:
    """Metrics of one step on one rank; Means add up over ranks, ``mismatch_max`` takes their maximum."""

    loss: Mean = field(default_factory=Mean)
    margin: Mean = field(default_factory=Mean)
    accuracy: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)
    mismatch_mean: Mean = field(default_factory=Mean)
    mismatch_outside: Mean = field(default_factory=Mean)
    grad_norm: Mean = field(default_factory=Mean)
    mismatch_max: float = 0.0
    lr: float = 0.0
    num_steps: int = 0

    def means(self) -> dict[str, Mean]:
        names = ("loss", "margin", "accuracy", "kl", "mismatch_mean", "mismatch_outside", "grad_norm")
        return {name: getattr(self, name) for name in names}


class Updater:
    """Turns the pairs of a rank's step into gradient steps of ``batch_size`` pairs over all ranks.

    Each gradient step runs the same number of micro-batches on every rank, whatever a rank has: one without a
    trainable pair runs a placeholder of weight zero, so that no collective waits for it. A gradient step without any
    trainable pair on any rank is skipped by all.
    """

    def __init__(
        self,
        trainer: TrainerLike,
        algorithm: Algorithm,
        reference: Callable[[ForwardBatch], torch.Tensor] | None,
        *,
        layout: LayoutName,
        pad_token_id: int,
        device: torch.device,
        pairs_per_step: int,
        micro_batch_size: int,
        passes: int,
    ) -> None:
        self._trainer = trainer
        self._algorithm = algorithm
        self._reference = reference
        self._layout = layout
        self._pad_token_id = pad_token_id
        self._device = device
        self._pairs_per_step = pairs_per_step
        self._micro_batch_size = micro_batch_size
        self._passes = passes

    def learn(self, pairs: Sequence[TrainingPair], num_steps: int) -> UpdateStats:
        """Take ``num_steps`` gradient steps per pass; ``pairs`` are this rank's, ``num_steps * pairs_per_step`` at
        most."""
        slices = [pairs[i * self._pairs_per_step : (i + 1) * self._pairs_per_step] for i in range(num_steps)]
        trainable = [[pair for pair in part if pair.is_trainable] for part in slices]
        totals = self._trainer.add_up([float(len(part)) for part in trainable])
        stats = UpdateStats()
        for _ in range(self._passes):
            for part, total in zip(trainable, totals, strict=True):
                if total:
                    self._gradient_step(part, total, stats)
        stats.mismatch_max = self._trainer.maximum(stats.mismatch_max)
        return stats

    def _gradient_step(self, pairs: list[TrainingPair], total: float, stats: UpdateStats) -> None:
        # Alike lengths side by side: little padding. The sum does not depend on the order.
        pairs = sorted(pairs, key=lambda pair: pair.tokens.num_tokens)
        for start in range(0, self._pairs_per_step, self._micro_batch_size):
            self._micro_step(pairs[start : start + self._micro_batch_size], total, stats)
        result = self._trainer.step()
        stats.lr = result.lr
        stats.num_steps += 1
        stats.grad_norm.add(result.grad_norm)

    def _micro_step(self, pairs: list[TrainingPair], total: float, stats: UpdateStats) -> None:
        tokens = [pair.tokens for pair in pairs] or [_PLACEHOLDER]
        batch = lay_out(tokens, self._layout, self._pad_token_id, self._device)
        logprobs = self._trainer.forward(batch)
        if not pairs:
            self._trainer.backward(0.0 * logprobs.sum())
            return
        policy = ResponseLogprobs.from_tokens(logprobs, batch.segments, batch.num_pairs)
        reference = self._reference_logprobs(batch)
        result = self._algorithm.loss(policy, reference if self._algorithm.needs.reference else None)
        self._trainer.backward(result.losses.sum() / total)
        with torch.no_grad():
            stats.loss.extend(result.losses.tolist())
            margins = result.chosen_rewards - result.rejected_rewards
            stats.margin.extend(margins.tolist())
            stats.accuracy.extend((margins > 0).double().tolist())
            if reference is not None:
                stats.kl.extend((policy.chosen - reference.chosen).tolist())
                stats.kl.extend((policy.rejected - reference.rejected).tolist())
            sampler = torch.from_numpy(np.concatenate([pair.sampler_logprobs for pair in pairs])).to(logprobs)
            self._note_mismatch(logprobs.detach(), sampler, stats)

    def _reference_logprobs(self, batch: ForwardBatch) -> ResponseLogprobs | None:
        if self._reference is None:
            return None
        with torch.no_grad():
            return ResponseLogprobs.from_tokens(self._reference(batch), batch.segments, batch.num_pairs)

    def _note_mismatch(self, learner: torch.Tensor, sampler: torch.Tensor, stats: UpdateStats) -> None:
        found = mismatch(learner, sampler)
        stats.mismatch_mean += Mean(found["abs_difference_sum"], found["num_tokens"])
        stats.mismatch_outside += Mean(found["num_outside"], found["num_tokens"])
        stats.mismatch_max = max(stats.mismatch_max, found["abs_difference_max"])


_PLACEHOLDER = TokenPair(prompt=np.zeros(1, np.int32), chosen=np.zeros(1, np.int32), rejected=np.zeros(1, np.int32))
