"""The three hooks and the declaration that make an algorithm. None of them sees a process, a socket or a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs
from oatlite.messages import Float32, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the loop must provide beyond the policy's log-probabilities of both responses.

    ``reference``: those of the reference policy. ``tokens``: those of single tokens, and the policy's entropies there.
    ``kl``: both policies' log-probabilities of responses to other prompts, at the price of one more forward pass each.
    ``margins``: rewards, or of an oracle that only compares its log-odds; a run without an oracle must bring them.
    ``reference_scores``: those of the reference policy of every candidate, for ``select``.
    """

    reference: bool = False
    reference_scores: bool = False
    tokens: bool = False
    kl: bool = False
    margins: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sampled response: tokens (T,) and the log-probability of each (T,) under the distribution of ``sampler``, at
    temperature 1."""

    tokens: Int32
    logprobs: Float32
    text: str
    is_finished: bool
    sampler: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSet:
    """The candidates of one prompt, in the order of the sampling plan."""

    prompt: str
    prompt_tokens: Int32
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Duel:
    """Candidates ``first`` and ``second`` of ``prompt`` (indices) go to the oracle. A prompt without one is dropped."""

    prompt: int
    first: int
    second: int


class Options(BaseModel):
    """Base of an algorithm's own options; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Algorithm(ABC):
    """Subclass it, declare ``needs`` and ``Options``, and write ``loss``; the other hooks have the usual defaults.

    ``--algo file.py:Class`` runs it; ``--set algorithm.options.key=value`` fills its ``Options``.
    """

    needs: ClassVar[Needs] = Needs()
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    def sampling_plan(self) -> Sequence[str]:
        """The sampler of each candidate of a prompt, of ``oatlite.samplers.SAMPLERS``; its length is the number of
        candidates. Overriding it rules out ``--sampler``."""
        return ("policy", "policy")

    def select(
        self,
        candidates: Sequence[CandidateSet],
        scores: Mapping[str, npt.NDArray[np.float64]],
        rng: np.random.Generator,
    ) -> list[Duel]:
        """Choose which two candidates of which prompts the oracle compares; sees all prompts of a rank's step.

        ``scores["reference"]`` (M, N), where ``needs.reference_scores``, holds log pi_ref of each candidate, summed
        over its tokens; the log-probabilities of what sampled it are in the candidate. Default: the first two
        candidates of every prompt. ``--explore`` chooses in the place of this default.
        """
        return [Duel(m, 0, 1) for m in range(len(candidates))]

    @abstractmethod
    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        """Per-pair losses (B,), not averaged, and implicit rewards (B,) of both sides.

        ``reference`` is None unless ``needs.reference``; ``batch`` holds what else is known of the pairs. Pairs
        without a usable verdict never come here.
        """


FourTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def sums(policy: ResponseLogprobs, reference: ResponseLogprobs | None) -> FourTensors:
    """What a loss with a reference takes first: summed log-probabilities (B,) of both models for both responses."""
    assert reference is not None
    return policy.chosen, policy.rejected, reference.chosen, reference.rejected


def averages(policy: ResponseLogprobs, reference: ResponseLogprobs | None) -> FourTensors:
    """The same, averaged over a response's tokens."""
    assert reference is not None
    return (
        policy.chosen / policy.chosen_lengths,
        policy.rejected / policy.rejected_lengths,
        reference.chosen / reference.chosen_lengths,
        reference.rejected / reference.rejected_lengths,
    )
