"""In-memory stand-ins for actor, oracle and trainer, so that an algorithm is tested in seconds and without engines.

They are small but not hollow: :class:`BigramPolicy` is a real language model with exact log-probabilities,
:class:`InMemoryActors` samples from a copy of it that only a sync refreshes, and :class:`InMemoryTrainer` really
descends. So a loss with a wrong sign, a selection that is never used or weights that never arrive show up as a reward
that does not rise. :func:`rehearse` runs the loop of :mod:`oatlite.workers.learner` over them, and
:func:`rehearse_offline` the same on recorded pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from oatlite.algorithms.base import Algorithm, Candidate
from oatlite.config.schema import Config
from oatlite.data import PromptSet
from oatlite.layouts import ForwardBatch
from oatlite.maths.samplers import mixed_logprobs
from oatlite.messages import Float32, Int32, UInt64
from oatlite.metrics.records import Kind, Record, make_record
from oatlite.oracles.base import PreferenceOracle, RewardOracle, Verdicts, checked
from oatlite.preferences import PreferenceSet
from oatlite.samplers import coefficients
from oatlite.sampling import SamplingOptions
from oatlite.trainer import StepResult
from oatlite.workers.active import ActivePreferences
from oatlite.workers.ahead import Ahead
from oatlite.workers.contracts import Share
from oatlite.workers.evaluation import Judge
from oatlite.workers.experience import Experience
from oatlite.workers.explorer import Explorer
from oatlite.workers.learner import Learner
from oatlite.workers.offline import HeldOutPairs, RecordedExperience
from oatlite.workers.policies import behaviour_is_kept
from oatlite.workers.rollout import ParameterSource, Purpose
from oatlite.workers.update import Layout, Updater

EOS = 0
CPU = torch.device("cpu")
LETTERS = "$abcdefghijklmnopqrstuvwxyz"


class BigramPolicy(nn.Module):
    """P(next token | previous token) over the 27 tokens of ``LETTERS``; token 0 is EOS."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(0.1 * torch.randn(len(LETTERS), len(LETTERS), generator=generator))

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """As :class:`oatlite.models.PairModel`: log-probabilities (N,) of ``batch.targets``, and entropies."""
        previous = batch.input_ids[batch.predictor_rows, batch.predictor_columns]
        logprobs = self.logits[previous].log_softmax(-1)
        chosen = logprobs.gather(1, batch.targets[:, None])[:, 0]
        if not batch.wants_entropies:
            return chosen
        return torch.stack([chosen, -(logprobs.exp() * logprobs).sum(-1).detach()])


class FunctionOracle(RewardOracle):
    """Scores with ``score(prompt, response)``."""

    def __init__(self, score: Callable[[str, str], float]) -> None:
        self._score = score

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> npt.NDArray[np.float32]:
        pairs = zip(prompts, responses, strict=True)
        return np.array([self._score(prompt, response) for prompt, response in pairs], np.float32)


class InMemoryActors:
    """Samples from the weights of the last sync, from the reference, which are the ``initial`` ones, or from mixtures
    of both, and asks the oracle. ``calls`` notes what was done, in order."""

    def __init__(
        self,
        oracle: PreferenceOracle,
        initial: BigramPolicy,
        eval_oracle: PreferenceOracle | None = None,
        mixture_weight: float = 0.5,
    ) -> None:
        self._oracle = oracle
        self._eval_oracle = eval_oracle or oracle
        self._logits = initial.logits.detach().clone()
        self._reference_logits = self._logits.clone()
        self._mixture_weight = mixture_weight
        self.policy_version = 0
        self.reload_s = self.sleep_s = self.wake_s = 0.0
        self.calls: list[str] = []
        self._awaits_weights = False

    def generate(
        self,
        prompts: Sequence[Int32],
        seeds: UInt64,
        samplers: Sequence[Sequence[str]],
        sampling: SamplingOptions,
        *,
        is_last_of_version: bool = False,
    ) -> tuple[list[list[Candidate]], float]:
        assert len(seeds) == len(samplers) == len(prompts)
        assert not self._awaits_weights, "weights were promised before the next samples"
        self._awaits_weights = is_last_of_version
        self.calls.append(f"generate with {self.policy_version}")
        return [
            [self._sample(prompt, int(seed), sampler, sampling) for seed, sampler in zip(*of_prompt, strict=True)]
            for prompt, *of_prompt in zip(prompts, seeds, samplers, strict=True)
        ], 0.0

    def _sample(self, prompt: Int32, seed: int, sampler: str, sampling: SamplingOptions) -> Candidate:
        rng = np.random.default_rng(seed)
        shares = torch.tensor(coefficients(sampler, self._mixture_weight))
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < sampling.max_new_tokens and (not tokens or tokens[-1] != EOS):
            previous = tokens[-1] if tokens else int(prompt[-1])
            both = self._logits[previous].double(), self._reference_logits[previous].double()
            logits = mixed_logprobs(*both, shares)
            if sampling.is_greedy:
                token = int(logits.argmax())
            else:
                token = int(rng.choice(len(LETTERS), p=(logits / sampling.temperature).softmax(-1).numpy()))
            tokens.append(token)
            logprobs.append(float(logits[token]))
        return Candidate(
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            text="".join(LETTERS[token] for token in tokens if token != EOS),
            is_finished=tokens[-1] == EOS,
            sampler=sampler,
        )

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None,
        *,
        purpose: Purpose = "train",
    ) -> tuple[Verdicts, float]:
        self.calls.append(f"compare {len(prompts)}")
        oracle = self._oracle if purpose == "train" else self._eval_oracle
        failures_before = oracle.num_failures
        verdicts = checked(oracle.compare(prompts, first, second, references), len(prompts))
        return replace(verdicts, num_failures=oracle.num_failures - failures_before), 0.0

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Float32, float]:
        """How often each letter stands in a response, and how long it is: (B, 28)."""
        self.calls.append(f"encode {len(prompts)}")
        rows = [[*(text.count(letter) for letter in LETTERS), len(text)] for text in responses]
        return np.array(rows, np.float32).reshape(len(rows), len(LETTERS) + 1) / np.float32(4), 0.0

    def sync(self, version: int, source: ParameterSource) -> list[str]:
        self.calls.append(f"sync {version}")
        with source(["logits"]) as parameter:
            self._logits = parameter("logits").detach().clone()
        self.policy_version = version
        self._awaits_weights = False
        return [hashlib.blake2b(self._logits.numpy().tobytes(), digest_size=16).hexdigest()]


class InMemoryTrainer:
    """One rank, plain Adam; also the collectives of a single rank, and the two sets of weights."""

    def __init__(self, policy: BigramPolicy, lr: float, *, keeps_behaviour: bool) -> None:
        self.policy = policy
        self._optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        self._lr = lr
        self._keeps_behaviour = keeps_behaviour
        self.newest: ParameterSource = self._open_newest
        self.behaviour: ParameterSource = self._open_newest
        self.adopt()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        result: torch.Tensor = self.policy(batch)
        return result

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> StepResult:
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(lr=self._lr, grad_norm=float(norm))

    def add_up(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def maximum(self, value: float) -> float:
        return value

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]

    @contextmanager
    def _open_newest(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: self.policy.get_parameter(name).data

    def adopt(self) -> ParameterSource:
        if self._keeps_behaviour:
            copy = self.policy.logits.detach().clone()

            @contextmanager
            def open_copy(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
                yield lambda name: copy

            self.behaviour = open_copy
        return self.behaviour


@dataclass(slots=True)
class InMemoryJournal:
    """Keeps records, pairs, evaluations and notes as lists."""

    records: list[Record] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, kind: Kind, *, perf: dict[str, Any], **metrics: Any) -> None:
        self.records.append(make_record(kind, perf=perf, **metrics))

    def note(self, line: str) -> None:
        self.notes.append(line)

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        self.pairs.extend(rows)

    def evaluation(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self.evaluations[step] = list(rows)

    def of(self, kind: Kind) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


class _Silent:
    @contextmanager
    def doing(self, stage: str, detail: str = "") -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a rehearsed run leaves: its journal, its final policy and what its actors did."""

    journal: InMemoryJournal
    policy: BigramPolicy
    calls: list[str]


def letter_prompts(num_prompts: int, reference: str = "") -> PromptSet:
    """Prompts of one letter each, all with the same reference."""
    letters = [1 + i % (len(LETTERS) - 1) for i in range(num_prompts)]
    return PromptSet(
        texts=[LETTERS[letter] for letter in letters],
        raw_texts=[LETTERS[letter] for letter in letters],
        tokens=[np.array([letter], np.int32) for letter in letters],
        references=[reference] * num_prompts,
        rows=np.arange(num_prompts),
        num_dropped=0,
    )


def rehearse(
    algorithm: Algorithm,
    score: Callable[[str, str], float],
    *,
    steps: int = 20,
    prompts_per_step: int = 32,
    lr: float = 0.1,
    seed: int = 0,
    sync_every: int = 1,
    reference: str = "abc",
    training_reference: str = "",
    oracle: PreferenceOracle | None = None,
    eval_oracle: PreferenceOracle | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Rehearsal:
    """Run the learner's real loop over the stand-ins; ``score(prompt, response)`` is the oracle's reward.

    ``reference`` is the answer to each held-out prompt, ``training_reference`` to each other. ``eval_oracle`` judges
    evaluations instead, if it is given. ``settings`` are configuration sections on top of the arguments.
    """
    config = _config(steps, prompts_per_step, lr, seed, {"rollout": {"sync_every": sync_every}}, settings or {})
    policy, trainer, updater = _learning_half(config, algorithm, keeps_behaviour=behaviour_is_kept(config))
    actors = InMemoryActors(oracle or FunctionOracle(score), policy, eval_oracle, config.sampling.mixture_weight)
    share, silent, journal = Share(rank=0, count=1), _Silent(), InMemoryJournal()
    prompts = letter_prompts(4 * prompts_per_step, training_reference)
    head = Explorer(config, share, actors, trainer, CPU) if config.explore.rule not in ("none", "apl") else None
    explorer = ActivePreferences(config, updater.score_by_reference) if config.explore.rule == "apl" else head
    experience = Experience(
        config, share, prompts, algorithm, actors, silent, score, explorer, updater.score_by_reference
    )
    Learner(
        config=config,
        num_steps=steps,
        experience=experience,
        judge=Judge(config, share, letter_prompts(26, reference), actors, score, head),
        actors=actors,
        updater=updater,
        ranks=trainer,
        policies=trainer,
        journal=journal,
        shows=silent,
        measure=dict,
        ahead=Ahead(config, experience, steps, 1) if config.rollout.asynchronous else None,
    ).run()
    return Rehearsal(journal=journal, policy=policy, calls=actors.calls)


def rehearse_offline(
    algorithm: Algorithm,
    preferences: PreferenceSet,
    held_out: PreferenceSet,
    *,
    steps: int = 20,
    pairs_per_step: int = 32,
    lr: float = 0.1,
    seed: int = 0,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Rehearsal:
    """Run the learner's real loop on recorded pairs, whose tokens are indices into ``LETTERS``, without actors."""
    config = _config(steps, pairs_per_step, lr, seed, {"rollout": {"offline": True}}, settings or {})
    policy, trainer, updater = _learning_half(config, algorithm, keeps_behaviour=False)
    share, journal = Share(rank=0, count=1), InMemoryJournal()
    Learner(
        config=config,
        num_steps=steps,
        experience=RecordedExperience(config, share, preferences),
        judge=HeldOutPairs(share, held_out, updater),
        actors=None,
        updater=updater,
        ranks=trainer,
        policies=trainer,
        journal=journal,
        shows=_Silent(),
        measure=dict,
    ).run()
    return Rehearsal(journal=journal, policy=policy, calls=[])


def _config(
    steps: int,
    per_step: int,
    lr: float,
    seed: int,
    more: dict[str, dict[str, Any]],
    settings: dict[str, dict[str, Any]],
) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "run": {"seed": seed},
        "rollout": {"prompts_per_step": per_step},
        "learner": {"micro_batch_size": per_step, "lr": lr},
        "sampling": {"max_new_tokens": 8, "temperature": 1.0},
        "eval": {"every": max(1, steps // 2)},
    }
    for given in (more, settings):
        for section, values in given.items():
            sections[section] = sections.get(section, {}) | values
    learner = sections["learner"]
    learner.setdefault("batch_size", sections["rollout"]["prompts_per_step"])
    learner.setdefault("buffer_size", sections["rollout"]["prompts_per_step"])
    return Config.model_validate(sections)


def _learning_half(
    config: Config, algorithm: Algorithm, *, keeps_behaviour: bool
) -> tuple[BigramPolicy, InMemoryTrainer, Updater]:
    seed = config.run.seed
    policy, initial = BigramPolicy(seed), BigramPolicy(seed).requires_grad_(False)
    trainer = InMemoryTrainer(policy, config.learner.lr, keeps_behaviour=keeps_behaviour)
    needs = algorithm.needs
    is_asked = needs.reference or needs.reference_scores or config.learner.log_kl or config.explore.rule == "apl"
    scores = initial if is_asked else None
    layout = Layout(name="shared", pad_token_id=EOS, device=CPU)
    return policy, trainer, Updater(config, trainer, algorithm, scores, layout)
