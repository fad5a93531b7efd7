"""The learning half of a step: pairs in, gradient steps taken, metrics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from oatlite.algorithms.base import Algorithm
from oatlite.config.schema import Config
from oatlite.config.steps import gradient_steps
from oatlite.layouts import ForwardBatch, LayoutName, TokenPair, lay_out
from oatlite.maths.logprobs import mismatch, truncated_importance
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs, pair_tokens
from oatlite.messages import Float32
from oatlite.metrics.records import Mean
from oatlite.trainer import StepResult
from oatlite.workers.buffer import Entry, PairBuffer, TrainingPair

Item = TypeVar("Item")
ORDER_DRAWS = 5  # beside the purposes that the rollouts draw for


class TrainerLike(Protocol):
    """What the update needs of a trainer; :class:`oatlite.trainer.Trainer` is the real one."""

    def forward(self, batch: ForwardBatch) -> Any: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> StepResult: ...
    def add_up(self, values: Sequence[float]) -> list[float]: ...
    def maximum(self, value: float) -> float: ...
    def gather_bytes(self, data: bytes) -> list[bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How pairs become rows of tokens on a device."""

    name: LayoutName
    pad_token_id: int
    device: torch.device

    def rows(self, tokens: Sequence[TokenPair], **wants: bool) -> ForwardBatch:
        """As :func:`oatlite.layouts.lay_out`, which knows what can be wanted."""
        return lay_out(tokens, self.name, self.pad_token_id, self.device, **wants)


@dataclass(slots=True)
class UpdateStats:
    """Metrics of one step on one rank; Means add up over ranks, ``mismatch_max`` takes their maximum.

    The mismatch is that of the responses that the newest policy itself has sampled for the step, if there are any, at
    its first gradient step: later ones would show how far the policy has moved since, and not how well sampler and
    learner agree. ``drift`` shows just that, at the same gradient step, of the responses of any version: the sampler's
    log-probability of a response minus the learner's, whose mean estimates KL(sampler || learner).
    ``reference_s`` is the time of the reference's pass.
    """

    loss: Mean = field(default_factory=Mean)
    margin: Mean = field(default_factory=Mean)
    accuracy: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)
    balance: Mean = field(default_factory=Mean)
    mismatch_mean: Mean = field(default_factory=Mean)
    mismatch_outside: Mean = field(default_factory=Mean)
    drift: Mean = field(default_factory=Mean)
    importance: Mean = field(default_factory=Mean)
    importance_capped: Mean = field(default_factory=Mean)
    grad_norm: Mean = field(default_factory=Mean)
    mismatch_max: float = 0.0
    lr: float = 0.0
    num_steps: int = 0
    reference_s: float = 0.0

    def means(self) -> dict[str, Mean]:
        means = (field.name for field in fields(self) if isinstance(getattr(self, field.name), Mean))
        return {name: getattr(self, name) for name in means}


class Updater:
    """Turns the pairs of a rank's steps into gradient steps of ``learner.batch_size`` pairs over all ranks.

    Each gradient step runs the same number of micro-batches on every rank, whatever a rank has: one without a
    trainable pair runs a placeholder of weight zero, so that no collective waits for it. A gradient step without any
    trainable pair on any rank is skipped by all. The reference scores each pair once, when it is new.
    """

    def __init__(
        self,
        config: Config,
        trainer: TrainerLike,
        algorithm: Algorithm,
        reference: Callable[[ForwardBatch], torch.Tensor] | None,
        layout: Layout,
        reference_at_hand: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``reference`` is asked only while ``reference_at_hand()`` is open."""
        learner = config.learner
        assert learner.batch_size is not None and learner.buffer_size is not None, "resolved first"
        self._config = config
        self._trainer = trainer
        self._algorithm = algorithm
        self._reference = reference
        self._reference_at_hand = reference_at_hand
        self._layout = layout
        ranks = int(config.placement.learners or 1)
        self._pairs_per_step = learner.batch_size // ranks
        self._new_pairs = config.rollout.prompts_per_step // ranks
        self._micro_batch_size = learner.micro_batch_size
        self.buffer = PairBuffer(learner.buffer_size // config.rollout.prompts_per_step, learner.buffer_clear_every)

    def learn(self, pairs: Sequence[TrainingPair], step: int) -> UpdateStats:
        """Take in this rank's ``pairs`` of ``step`` (from 1), and all gradient steps that are due on the buffer."""
        stats = UpdateStats()
        self.buffer.add(pairs, step)
        start = time.perf_counter()
        new = [entry for entry in self.buffer if entry.pair.is_trainable and entry.reference_logprobs is None]
        self._score_by_reference(new, self._new_pairs)
        stats.reference_s = time.perf_counter() - start
        entries = list(self.buffer)
        num_left = gradient_steps(self._config, step)
        per_pass = min(num_left, gradient_steps(self._config, step, passes=1))
        for number in range(self._config.learner.passes):
            order = np.random.default_rng([self._config.run.seed, ORDER_DRAWS, step, number]).permutation(len(entries))
            self._pass(entries, order.tolist(), min(per_pass, num_left), step, stats)
            num_left -= per_pass
            if num_left <= 0:
                break
        stats.mismatch_max = self._trainer.maximum(stats.mismatch_max)
        return stats

    def measure(self, entries: Sequence[Entry], at_most: int) -> tuple[UpdateStats, list[tuple[float, float]]]:
        """What the newest policy makes of ``entries``, without learning from them: metrics, and the implicit rewards
        of both responses of each.

        All ranks together, none of which has more than ``at_most``.
        """
        stats = UpdateStats()
        rewards: dict[int, tuple[float, float]] = {}
        with torch.no_grad():
            self._score_by_reference([e for e in entries if e.reference_logprobs is None], at_most)
            crossed = self._crossed(entries, at_most) if self._algorithm.needs.kl else (None, None)
            order = sorted(range(len(entries)), key=lambda i: entries[i].pair.tokens.num_tokens)
            for part in self._micro_batches(order, at_most):
                _, result = self._losses([entries[i] for i in part], crossed, stats)
                if result is not None:
                    both = zip(result.chosen_rewards.tolist(), result.rejected_rewards.tolist(), strict=True)
                    rewards |= dict(zip(part, both, strict=True))
        return stats, [rewards[i] for i in range(len(entries))]

    def _pass(self, entries: list[Entry], order: list[int], count: int, step: int, stats: UpdateStats) -> None:
        size = self._pairs_per_step
        # Which pairs meet in a gradient step is drawn; among themselves they stand as they came.
        parts = [[entries[i] for i in sorted(order[n * size : (n + 1) * size])] for n in range(count)]
        parts = [[entry for entry in part if entry.pair.is_trainable] for part in parts]
        totals = self._trainer.add_up([float(len(part)) for part in parts])
        for part, total in zip(parts, totals, strict=True):
            if total:
                self._gradient_step(part, total, step, stats)

    def _gradient_step(self, entries: list[Entry], total: float, step: int, stats: UpdateStats) -> None:
        crossed = self._crossed(entries, self._pairs_per_step) if self._algorithm.needs.kl else (None, None)
        # Alike lengths side by side: little padding. The sum does not depend on the order.
        entries = sorted(entries, key=lambda entry: entry.pair.tokens.num_tokens)
        for part in self._micro_batches(entries, self._pairs_per_step):
            self._micro_step(part, total, crossed, step, stats)
        result = self._trainer.step()
        stats.lr = result.lr
        stats.num_steps += 1
        stats.grad_norm.add(result.grad_norm)

    def _micro_batches(self, items: Sequence[Item], at_most: int) -> list[Sequence[Item]]:
        """As many on every rank, where no rank has more than ``at_most``; the last ones empty where it has fewer."""
        size = self._micro_batch_size
        return [items[start : start + size] for start in range(0, at_most, size)]

    def _micro_step(
        self,
        entries: Sequence[Entry],
        total: float,
        crossed: tuple[torch.Tensor | None, torch.Tensor | None],
        step: int,
        stats: UpdateStats,
    ) -> None:
        logprobs, result = self._losses(entries, crossed, stats)
        if result is None:
            self._trainer.backward(0.0 * logprobs.sum())
            return
        self._trainer.backward(result.losses.sum() / total)
        if stats.num_steps == 0:
            self._note_mismatch(logprobs.detach(), entries, step, stats)

    def _losses(
        self,
        entries: Sequence[Entry],
        crossed: tuple[torch.Tensor | None, torch.Tensor | None],
        stats: UpdateStats,
    ) -> tuple[torch.Tensor, PairLosses | None]:
        """The policy's log-probabilities (N,) of a micro-batch and its losses, which go into ``stats``; no losses for
        one without entries, whose placeholder goes through the network all the same."""
        needs, coefficient = self._algorithm.needs, self._config.learner.aux_loss_coef
        batch = self._layout.rows(
            [entry.pair.tokens for entry in entries] or [_PLACEHOLDER],
            wants_entropies=needs.tokens,
            wants_balance=coefficient > 0,
        )
        output = self._trainer.forward(batch)
        output, balance = output if coefficient else (output, None)
        logprobs, entropies = (output[0], output[1].detach()) if needs.tokens else (output, None)
        if not entries:
            return logprobs, None
        policy = self._responses(logprobs, entropies, batch)
        reference = self._reference_of(entries, batch, logprobs)
        facts = PairBatch(
            margins=torch.tensor([entry.pair.margin for entry in entries]).to(logprobs),
            policy_kl=crossed[0],
            reference_kl=crossed[1],
            chosen_is_reference=self._is_sampled_by("reference", entries, 0),
            rejected_is_reference=self._is_sampled_by("reference", entries, 1),
        )
        result = self._algorithm.loss(policy, reference if needs.reference else None, facts)
        result = self._weighted(result, entries, policy, batch, stats)
        if balance is not None:
            result = result._replace(losses=result.losses + coefficient * balance)
            stats.balance.add(balance.item(), len(entries))
        stats.loss.extend(result.losses.tolist())
        margins = result.chosen_rewards - result.rejected_rewards
        stats.margin.extend(margins.tolist())
        stats.accuracy.extend((0.5 * (1 + margins.sign())).tolist())  # half where the policy is of no opinion
        if reference is not None:
            stats.kl.extend((policy.chosen - reference.chosen).tolist())
            stats.kl.extend((policy.rejected - reference.rejected).tolist())
        return logprobs, result

    def _weighted(
        self,
        result: PairLosses,
        entries: Sequence[Entry],
        policy: ResponseLogprobs,
        batch: ForwardBatch,
        stats: UpdateStats,
    ) -> PairLosses:
        """Losses by importance, where that is asked for; and note how far the policy is from what sampled its pairs.

        Only what the policy itself sampled counts: a response of the reference or of a mixture was meant to be theirs.
        """
        sampled = [entry.pair.sampler_logprobs for entry in entries if entry.pair.sampler_logprobs is not None]
        if not sampled:
            return result
        newest = policy.chosen.detach(), policy.rejected.detach()
        flat = torch.from_numpy(np.concatenate(sampled)).to(newest[0])
        sampler = ResponseLogprobs.from_tokens(flat, batch.segments, batch.num_pairs)
        is_own = [self._is_sampled_by("policy", entries, side) for side in (0, 1)]
        chosen, rejected = newest[0] - sampler.chosen, newest[1] - sampler.rejected
        if stats.num_steps == 0:
            stats.drift.extend((-chosen[is_own[0]]).tolist())
            stats.drift.extend((-rejected[is_own[1]]).tolist())
        cap = self._config.learner.importance_cap
        if cap is None:
            return result
        weights = truncated_importance(chosen * is_own[0] + rejected * is_own[1], cap)
        stats.importance.extend(weights.tolist())
        stats.importance_capped.extend((weights >= cap).float().tolist())
        return result._replace(losses=weights * result.losses)

    def _is_sampled_by(self, name: str, entries: Sequence[Entry], side: int) -> torch.Tensor:
        """(B,), bool"""
        found = [entry.pair.samplers[side] == name for entry in entries]
        return torch.tensor(found, device=self._layout.device)

    def _responses(
        self, logprobs: torch.Tensor, entropies: torch.Tensor | None, batch: ForwardBatch
    ) -> ResponseLogprobs:
        tokens = None
        if self._algorithm.needs.tokens:
            tokens = pair_tokens(logprobs, entropies, batch.segments, batch.num_pairs)
        return ResponseLogprobs.from_tokens(logprobs, batch.segments, batch.num_pairs, tokens=tokens)

    # ------------------------------------------------------------------ what the reference and other prompts say

    def score_by_reference(self, pairs: Sequence[TokenPair], at_most: int) -> list[Float32]:
        """The reference's log-probabilities of the tokens of both responses of each pair, the chosen one's first.

        All ranks together, none of which has more than ``at_most`` pairs.
        """
        entries = [Entry(TrainingPair(tokens=pair, sampler_logprobs=None, is_trainable=True), 0) for pair in pairs]
        with torch.no_grad():
            self._score_by_reference(entries, at_most)
        scored = [entry.reference_logprobs for entry in entries if entry.reference_logprobs is not None]
        assert len(scored) == len(pairs), "there is a reference"
        return scored

    def _score_by_reference(self, new: Sequence[Entry], at_most: int) -> None:
        """Ask the reference for pairs that it has not seen yet; no rank has more than ``at_most``."""
        if self._reference is None or not at_most:
            return
        with self._reference_at_hand():
            self._ask_reference(self._reference, new, at_most)

    def _ask_reference(
        self, reference: Callable[[ForwardBatch], torch.Tensor], new: Sequence[Entry], at_most: int
    ) -> None:
        new = sorted(new, key=lambda entry: entry.pair.tokens.num_tokens)
        # As many passes on every rank, since the reference may be the policy's own base, in pieces on all of them.
        for part in self._micro_batches(new, at_most):
            rows = self._layout.rows([e.pair.tokens for e in part] or [_PLACEHOLDER])
            with torch.no_grad():
                flat = reference(rows).float().cpu().numpy()
            ends = np.cumsum([e.pair.tokens.num_response_tokens for e in part])
            for entry, values in zip(part, np.split(flat, ends[:-1]) if part else (), strict=True):
                entry.reference_logprobs = values

    def _reference_of(
        self, entries: Sequence[Entry], batch: ForwardBatch, like: torch.Tensor
    ) -> ResponseLogprobs | None:
        found = [entry.reference_logprobs for entry in entries if entry.reference_logprobs is not None]
        if not found:
            return None
        return self._responses(torch.from_numpy(np.concatenate(found)).to(like), None, batch)

    def _crossed(self, entries: Sequence[Entry], at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both policies' log-probabilities (K,) of the gradient step's responses under prompts of other pairs.

        Two pairs side by side swap their responses, which takes no exchange between ranks. Where no rank has two
        pairs there is nothing to swap, and the reference point of such a step is zero.
        """
        assert self._reference is not None
        mine = [entry.pair.tokens for entry in entries]
        swapped = [other for pair in zip(mine[1::2], mine[0::2], strict=False) for other in pair]
        crossed = [
            TokenPair(prompt=pair.prompt, chosen=other.chosen, rejected=other.rejected)
            for pair, other in zip(mine, swapped, strict=False)
        ]
        policy: list[torch.Tensor] = []
        reference: list[torch.Tensor] = []
        with torch.no_grad(), self._reference_at_hand():
            for part in self._micro_batches(crossed, at_most):
                batch = self._layout.rows(part or [_PLACEHOLDER])
                both = self._trainer.forward(batch), self._reference(batch)
                if part:
                    for values, found in zip(both, (policy, reference), strict=True):
                        sums = ResponseLogprobs.from_tokens(values, batch.segments, batch.num_pairs)
                        found += [sums.chosen, sums.rejected]
        return self._gathered(policy), self._gathered(reference)

    def _gathered(self, values: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat(values).float().cpu().numpy() if values else np.zeros(0, np.float32)
        parts = [np.frombuffer(part, np.float32) for part in self._trainer.gather_bytes(flat.tobytes())]
        everything = np.concatenate(parts) if sum(map(len, parts)) else np.zeros(1, np.float32)
        return torch.from_numpy(everything).to(self._layout.device)

    def _note_mismatch(self, learner: torch.Tensor, entries: Sequence[Entry], step: int, stats: UpdateStats) -> None:
        sampled = [entry.pair.sampler_logprobs for entry in entries if entry.pair.sampler_logprobs is not None]
        if not sampled:
            return
        counts = np.repeat(
            [
                entry.pair.policy_version == step - 1 and name == "policy"
                for entry in entries
                for name in entry.pair.samplers
            ],
            [len(tokens) for e in entries for tokens in (e.pair.tokens.chosen, e.pair.tokens.rejected)],
        )
        sampler = np.concatenate(sampled)
        mask = torch.from_numpy(counts).to(learner.device)
        found = mismatch(learner[mask], torch.from_numpy(sampler[counts]).to(learner))
        stats.mismatch_mean += Mean(found["abs_difference_sum"], found["num_tokens"])
        stats.mismatch_outside += Mean(found["num_outside"], found["num_tokens"])
        stats.mismatch_max = max(stats.mismatch_max, found["abs_difference_max"])


_PLACEHOLDER = TokenPair(prompt=np.zeros(1, np.int32), chosen=np.zeros(1, np.int32), rejected=np.zeros(1, np.int32))
