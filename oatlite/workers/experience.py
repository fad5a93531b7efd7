"""The sampling half of a step: prompts in, judged pairs out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from oatlite.algorithms.base import Algorithm, Candidate, CandidateSet
from oatlite.config.schema import Config
from oatlite.config.steps import candidates_of, is_followed_by_sync, prompts_within
from oatlite.data import PromptSet, epoch_order
from oatlite.errors import ConfigError
from oatlite.layouts import TokenPair
from oatlite.messages import Bool, UInt64
from oatlite.metrics.records import Mean
from oatlite.oracles.base import Verdicts, draw_verdicts, flipped, reward_margins, trainable_pairs, wins, with_draws
from oatlite.samplers import sampling_plan
from oatlite.sampling import SamplingOptions
from oatlite.seeds import seed_of
from oatlite.workers.buffer import TrainingPair
from oatlite.workers.contracts import Actors, Explores, Share, Shows
from oatlite.workers.explorer import Choice
from oatlite.workers.gold import GoldScore
from oatlite.workers.reference_scores import ReferenceScores, ScorePairs

TRAIN_SEEDS, EVAL_SEEDS, SELECT_DRAWS, VERDICT_DRAWS, FLIP_DRAWS = range(5)
PLAN_DRAWS = 6


@dataclass(slots=True, kw_only=True)
class Rollouts:
    """One rank's part of a step: the pairs to train on, and what is known about the samples. Times in seconds.

    ``num_queries`` pairs the oracle was asked about, on ``num_without_verdict`` of which it gave none, and
    ``num_failures`` requests to it were made again. Where the pairs were not sampled but read, there is no
    ``policy_version``, and no time was spent.
    """

    policy_version: int | None
    epoch: int
    pairs: list[TrainingPair]
    means: dict[str, Mean]
    rows: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_queries: int = 0
    num_without_verdict: int = 0
    num_failures: int = 0
    generate_s: float | None = None
    score_s: float | None = None
    encode_s: float | None = None
    head_s: float | None = None


class Experience:
    """Collects a rank's rollouts: sample candidates, let the algorithm choose pairs, ask the oracle."""

    def __init__(
        self,
        config: Config,
        share: Share,
        prompts: PromptSet,
        algorithm: Algorithm,
        actors: Actors,
        shows: Shows,
        gold: GoldScore | None,
        explorer: Explores | None = None,
        score_by_reference: ScorePairs | None = None,
    ) -> None:
        """``score_by_reference`` is asked where ``algorithm.needs.reference_scores``."""
        self._config = config
        self._share = share
        self._prompts = prompts
        self._algorithm = algorithm
        self._actors = actors
        self._shows = shows
        self._gold = gold
        self._explorer = explorer
        self._policy_share = config.rollout.policy_share if config.rollout.sampler != "policy" else 0.0
        self._reference_scores = None
        if explorer is None and algorithm.needs.reference_scores:
            assert score_by_reference is not None
            self._reference_scores = ReferenceScores(config, score_by_reference, len(self._plan()))

    def collect(self, step: int, num_queries: int) -> Rollouts:
        """The rollouts of ``step`` (from 1) with the policy that the actors hold.

        Prompts are taken only as far as ``data.max_queries`` reaches, of which ``num_queries`` are spent.
        """
        of_step, epoch = rows_of_step(len(self._prompts), step, self._config)
        if self._config.data.max_queries is not None:
            of_step = of_step[: prompts_within(self._config, self._config.data.max_queries - num_queries, step)]
        indices: list[int] = self._share.of(of_step)
        plan, rows = self._plan(), self._prompts.rows[indices].tolist()
        seeds = sample_seeds(self._config.run.seed, TRAIN_SEEDS, epoch, rows, len(plan))
        is_policys = policys_alone(self._config.run.seed, epoch, rows, self._policy_share)
        samplers = [["policy"] * len(plan) if is_alone else plan for is_alone in is_policys]
        with self._shows.doing("generate", f"step {step}"):
            found, generate_s = self._actors.generate(
                [self._prompts.tokens[i] for i in indices],
                seeds,
                samplers,
                SamplingOptions.of(self._config.sampling),
                is_last_of_version=not self._config.rollout.asynchronous and is_followed_by_sync(self._config, step),
            )
        sets = [
            CandidateSet(
                prompt=self._prompts.raw_texts[i], prompt_tokens=self._prompts.tokens[i], candidates=candidates
            )
            for i, candidates in zip(indices, found, strict=True)
        ]
        choice = None
        if self._explorer is not None:
            with self._shows.doing("score", f"step {step}, {len(plan)} candidates each"):
                choice = self._explorer.choose(sets, step)
            duels = choice.duels
        else:
            scores = {} if self._reference_scores is None else {"reference": self._reference_scores(sets)}
            duels = self._algorithm.select(sets, scores, self._draws(SELECT_DRAWS, step))
        if len(duels) > len(sets):
            raise ConfigError(
                f"{type(self._algorithm).__name__}.select chose {len(duels)} pairs of {len(sets)} prompts",
                "let it choose one pair a prompt at most",
            )
        contests = [sets[duel.prompt] for duel in duels]
        first = [contest.candidates[duel.first] for contest, duel in zip(contests, duels, strict=True)]
        second = [contest.candidates[duel.second] for contest, duel in zip(contests, duels, strict=True)]
        all_references = self._prompts.references
        references = None
        if all_references is not None:
            references = [all_references[indices[duel.prompt]] for duel in duels]
        with self._shows.doing("score", f"step {step}"):
            is_own = np.zeros(len(duels), np.bool_) if choice is None else choice.is_self_labelled
            verdicts, num_asked, score_s = self._ask(contests, first, second, references, is_own)
        rollouts = Rollouts(
            policy_version=self._actors.policy_version,
            epoch=epoch,
            pairs=[],
            means=_sample_means(first, second, verdicts),
            num_tokens=sum(len(candidate.tokens) for candidates in found for candidate in candidates),
            num_queries=num_asked,
            num_without_verdict=num_asked - int((verdicts.is_valid & ~is_own).sum()),
            num_failures=verdicts.num_failures,
            generate_s=generate_s,
            score_s=score_s,
        )
        if self._policy_share:
            rollouts.means["policy_share"] = Mean(float(is_policys.sum()), len(rows))
        first_wins = self._add_pairs(rollouts, step, contests, first, second, verdicts, is_own)
        if choice is not None:
            self._teach(rollouts, choice, first_wins, num_queries)
        if self._config.eval.online and references is not None:
            with self._shows.doing("score", f"step {step} against references"):
                self._judge_online(rollouts, contests, [first, second], references)
        return rollouts

    def _ask(
        self,
        contests: Sequence[CandidateSet],
        first: Sequence[Candidate],
        second: Sequence[Candidate],
        references: Sequence[str] | None,
        is_own: Bool,
    ) -> tuple[Verdicts, int, float]:
        """The verdicts, how many pairs were asked about, and seconds. Of two equal texts neither is better, and the
        head's own pairs (``is_own``) are won by the first: no query is spent on either."""
        asked = [b for b in range(len(contests)) if first[b].text != second[b].text and not is_own[b]]
        verdicts, score_s = self._actors.compare(
            [contests[b].prompt for b in asked],
            [first[b].text for b in asked],
            [second[b].text for b in asked],
            [references[b] for b in asked] if references is not None else None,
        )
        verdicts = spread(verdicts, asked, len(contests))
        if is_own.any():
            verdicts.first_win[is_own], verdicts.is_valid[is_own] = 1.0, True
        return verdicts, len(asked), score_s

    def _teach(self, rollouts: Rollouts, choice: Choice, first_wins: Bool, num_before: int) -> None:
        """Let the head, if there is one, learn from the pairs that the oracle decided; where only it learns, drop
        them all."""
        rollouts.encode_s = choice.seconds
        if self._explorer is None or choice.features is None:
            return
        start = time.perf_counter()
        is_decided = np.array([pair.is_trainable for pair in rollouts.pairs], np.bool_) & ~choice.is_self_labelled
        sides = np.where(first_wins[:, None, None], choice.features, choice.features[:, ::-1])
        figures = self._explorer.learn(sides[is_decided], rollouts.num_queries, num_before)
        for name, value in figures.items():
            rollouts.means[f"head/{name}"] = Mean(value, 1.0)
        if self._config.explore.self_label_ratio:
            rollouts.means["self_labelled"] = Mean(float(choice.is_self_labelled.sum()), len(first_wins))
        rollouts.head_s = choice.head_seconds + time.perf_counter() - start
        if self._config.explore.head_only:
            rollouts.pairs.clear()

    def _plan(self) -> list[str]:
        """The sampler of each candidate of a prompt; of more than two, by turns."""
        plan = sampling_plan(self._algorithm, self._config.rollout.sampler)
        return [plan[n % len(plan)] for n in range(candidates_of(self._config) or len(plan))]

    def _judge_online(
        self,
        rollouts: Rollouts,
        contests: Sequence[CandidateSet],
        sides: Sequence[Sequence[Candidate]],
        references: Sequence[str],
    ) -> None:
        """How often a response of either side beats the dataset's answer, by the oracle of evaluation; one that equals
        it is a draw."""
        answers = list(references) * len(sides)
        prompts = [contest.prompt for _ in sides for contest in contests]
        responses = [candidate.text for side in sides for candidate in side]
        verdicts, seconds = self._actors.compare(prompts, responses, answers, answers, purpose="eval")
        rate = rollouts.means["online_win_rate"] = Mean()
        rate.extend(wins(with_draws(verdicts, responses, answers)))
        rollouts.num_failures += verdicts.num_failures
        rollouts.score_s = (rollouts.score_s or 0.0) + seconds

    def _add_pairs(
        self,
        rollouts: Rollouts,
        step: int,
        contests: Sequence[CandidateSet],
        first: Sequence[Candidate],
        second: Sequence[Candidate],
        verdicts: Verdicts,
        is_own: Bool,
    ) -> Bool:
        """Returns which pairs their first response wins, noise included."""
        feedback = self._config.oracle.feedback
        first_wins = draw_verdicts(verdicts.first_win, verdicts.is_valid, feedback, self._draws(VERDICT_DRAWS, step))
        trainable = trainable_pairs(verdicts, [c.text for c in first], [c.text for c in second], feedback)
        margins = reward_margins(verdicts)
        turned = flipped(len(contests), self._config.oracle.flip_prob, self._draws(FLIP_DRAWS, step))
        turned &= verdicts.is_valid & ~is_own
        first_wins, margins = first_wins ^ turned, np.where(turned, -margins, margins)
        for b, contest in enumerate(contests):
            chosen, rejected = (first[b], second[b]) if first_wins[b] else (second[b], first[b])
            rollouts.pairs.append(
                TrainingPair(
                    tokens=TokenPair(prompt=contest.prompt_tokens, chosen=chosen.tokens, rejected=rejected.tokens),
                    sampler_logprobs=np.concatenate([chosen.logprobs, rejected.logprobs]),
                    is_trainable=bool(trainable[b]),
                    margin=float(margins[b] if first_wins[b] else -margins[b]),
                    samplers=(chosen.sampler, rejected.sampler),
                    policy_version=rollouts.policy_version or 0,
                )
            )
            win = float(verdicts.first_win[b])
            row: dict[str, Any] = {
                "step": step,
                "policy_version": rollouts.policy_version,
                "prompt": contest.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "win_probability": win if first_wins[b] else 1 - win,
                "is_trainable": bool(trainable[b]),
                "samplers": [chosen.sampler, rejected.sampler],
                "is_finished": [chosen.is_finished, rejected.is_finished],
            }
            if turned[b]:
                row["is_flipped"] = True
            if is_own[b]:
                row["is_self_labelled"] = True
            if self._gold is not None:
                row["gold_scores"] = [self._gold(contest.prompt, text) for text in (chosen.text, rejected.text)]
                rollouts.means["gold_score"].extend(row["gold_scores"])
            rollouts.rows.append(row)
        return first_wins

    def _draws(self, purpose: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self._config.run.seed, purpose, step, self._share.rank])


def rows_of_step(num_rows: int, step: int, config: Config) -> tuple[list[int], int]:
    """Which of ``num_rows`` rows the ranks together take in ``step`` (from 1), and the epoch that it is in."""
    per_step = config.rollout.prompts_per_step
    epoch, position = divmod(step - 1, num_rows // per_step)
    of_step = epoch_order(num_rows, epoch, config.run.seed)[position * per_step : (position + 1) * per_step]
    return of_step.tolist(), epoch


def sample_seeds(run_seed: int, purpose: int, epoch: int, rows: Sequence[int], num_samples: int) -> UInt64:
    """One seed per sample (M, N): a hash of the run's seed, the epoch, the prompt's row and the sample's index.

    So a sample does not depend on how many actors there are, on a restart, or on what was drawn before.
    """
    seeds = [seed_of(run_seed, purpose, epoch, row, sample) for row in rows for sample in range(num_samples)]
    return np.array(seeds, np.uint64).reshape(len(rows), num_samples)


def policys_alone(run_seed: int, epoch: int, rows: Sequence[int], share: float) -> Bool:
    """Which prompts (M,) the policy alone answers, whatever else is sampled from: each with probability ``share``.

    A hash of the run's seed, the epoch and the prompt's row decides, so that it is the same wherever and whenever it
    is asked; a larger share takes more prompts beside the same ones.
    """
    return np.array([seed_of(run_seed, PLAN_DRAWS, epoch, row) < share * 2**63 for row in rows], np.bool_)


def spread(verdicts: Verdicts, asked: Sequence[int], count: int) -> Verdicts:
    """``verdicts`` on the pairs ``asked``, as verdicts on all ``count`` pairs, the others being not valid."""
    if len(asked) == count:
        return verdicts

    def wide(values: npt.NDArray[Any] | None, fill: float | bool) -> Any:
        if values is None:
            return None
        out = np.full(count, fill, values.dtype)
        out[list(asked)] = values
        return out

    return Verdicts(
        first_win=wide(verdicts.first_win, 0.5),
        is_valid=wide(verdicts.is_valid, False),
        first_scores=wide(verdicts.first_scores, np.nan),
        second_scores=wide(verdicts.second_scores, np.nan),
        num_failures=verdicts.num_failures,
    )


def _sample_means(first: Sequence[Candidate], second: Sequence[Candidate], verdicts: Verdicts) -> dict[str, Mean]:
    means = {name: Mean() for name in ("reward", "response_tokens", "truncated", "gold_score")}
    for candidate in (*first, *second):
        means["response_tokens"].add(len(candidate.tokens))
        means["truncated"].add(float(not candidate.is_finished))
    for scores in (verdicts.first_scores, verdicts.second_scores):
        if scores is not None:
            means["reward"].extend(scores[verdicts.is_valid].tolist())
    return means
