"""Evaluation: the newest policy, greedy or by the best of several samples, against the dataset's answers to held-out
prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from oatlite.algorithms.base import Candidate, CandidateSet
from oatlite.config.schema import Config
from oatlite.data import PromptSet
from oatlite.metrics.records import Mean
from oatlite.oracles.base import Verdicts, wins, with_draws
from oatlite.oracles.best_of import best_of
from oatlite.sampling import SamplingOptions
from oatlite.workers.ahead import Unseen
from oatlite.workers.contracts import Actors, Favours, Judged, Share, Shows
from oatlite.workers.experience import EVAL_SEEDS, sample_seeds
from oatlite.workers.gold import GoldScore
from oatlite.workers.rollout import Purpose


@dataclass(slots=True)
class _Asked:
    """Of one evaluation: pairs that an oracle was asked about, requests that failed on the way, and seconds."""

    actors: Actors
    shows: Shows
    num_queries: int = 0
    num_failures: int = 0
    seconds: float = 0.0

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None,
        *,
        purpose: Purpose = "train",
    ) -> Verdicts:
        with self.shows.doing("score", f"{len(prompts)} pairs of the evaluation"):
            verdicts, seconds = self.actors.compare(prompts, first, second, references, purpose=purpose)
        self.num_queries += len(prompts)
        self.num_failures += verdicts.num_failures
        self.seconds += seconds
        return verdicts


class Judge:
    """Asks the oracle how often the policy that the actors hold beats the references, on a rank's share of them."""

    def __init__(
        self,
        config: Config,
        share: Share,
        held_out: PromptSet,
        actors: Actors,
        gold: GoldScore | None,
        head: Favours | None = None,
        shows: Shows | None = None,
    ) -> None:
        """``shows`` is told when actors are waited for, which has a deadline of its own."""
        self._config = config
        self._share = share
        self._held_out = held_out
        self._actors = actors
        self._gold = gold
        self._head = head
        self._shows = shows or Unseen()

    @property
    def num_prompts(self) -> int:
        return len(self._held_out)

    def judge(self) -> Judged:
        """Metrics that add up over ranks, and a row per prompt with the response and the verdict.

        ``win_rate`` counts a probability over 0.5 as a win and exactly 0.5 as half a win; ``win_probability`` is the
        mean of the probabilities. Prompts without a valid verdict count in neither; ``judged`` is the share of
        the others. A response that equals its reference is a draw.
        """
        held_out = self._held_out
        assert held_out.references is not None
        mine: Sequence[int] = self._share.of(range(len(held_out)))
        prompts = [held_out.raw_texts[i] for i in mine]
        references = [held_out.references[i] for i in mine]
        asked = _Asked(self._actors, self._shows)
        answers = self._answer(mine, prompts, references, asked)
        responses = [answer.text for answer in answers]
        verdicts = asked.compare(prompts, responses, references, references, purpose="eval")
        verdicts = with_draws(verdicts, responses, references)
        means = _oracle_means(verdicts)
        means["response_tokens"], means["truncated"] = Mean(), Mean()
        for answer in answers:
            means["response_tokens"].add(len(answer.tokens))
            means["truncated"].add(float(not answer.is_finished))
        rows = [
            {"prompt": prompt, "response": response, "reference": reference, **_verdict(verdicts, i)}
            for i, (prompt, response, reference) in enumerate(zip(prompts, responses, references, strict=True))
        ]
        if self._gold is not None:
            for name, texts in (("gold_score", responses), ("reference_gold_score", references)):
                means[name] = Mean()
                for row, prompt, text in zip(rows, prompts, texts, strict=True):
                    row[name] = self._gold(prompt, text)
                    means[name].add(row[name])
        return Judged(
            means,
            rows,
            num_queries=asked.num_queries,
            num_failures=asked.num_failures,
            score_s=asked.seconds,
        )

    def _answer(
        self, mine: Sequence[int], prompts: Sequence[str], references: Sequence[str], asked: _Asked
    ) -> list[Candidate]:
        """The greedy response to each prompt, or the sample that the epistemic head likes best, and without a head the
        oracle of training."""
        config = self._config.eval
        sampling = SamplingOptions.of(self._config.sampling, is_greedy=config.best_of_n == 1)
        if config.best_of_n > 1:
            sampling = replace(sampling, temperature=config.best_of_n_temperature)
        rows = self._held_out.rows[list(mine)].tolist()
        seeds = sample_seeds(self._config.run.seed, EVAL_SEEDS, 0, rows, config.best_of_n)
        tokens = [self._held_out.tokens[i] for i in mine]
        with self._shows.doing("generate", f"{seeds.size} samples for the evaluation"):
            samplers = [["policy"] * config.best_of_n] * len(tokens)
            candidates, _ = self._actors.generate(tokens, seeds, samplers, sampling)
        if self._head is not None and config.best_of_n > 1:
            sets = [
                CandidateSet(prompt=prompt, prompt_tokens=self._held_out.tokens[i], candidates=found)
                for prompt, i, found in zip(prompts, mine, candidates, strict=True)
            ]
            with self._shows.doing("score", f"{seeds.size} samples for the evaluation"):
                favourites = self._head.best(sets)
            return [found[n] for found, n in zip(candidates, favourites, strict=True)]
        best = best_of(
            asked.compare,
            prompts,
            [[candidate.text for candidate in found] for found in candidates],
            references,
        )
        return [found[n] for found, n in zip(candidates, best, strict=True)]


def _oracle_means(verdicts: Verdicts) -> dict[str, Mean]:
    means = {name: Mean() for name in ("win_rate", "win_probability", "reward", "reference_reward")}
    means["judged"] = Mean()
    means["judged"].extend(verdicts.is_valid.astype(float).tolist())
    means["win_probability"].extend(verdicts.first_win[verdicts.is_valid].tolist())
    means["win_rate"].extend(wins(verdicts))
    for name, scores in (("reward", verdicts.first_scores), ("reference_reward", verdicts.second_scores)):
        if scores is not None:
            means[name].extend(scores[verdicts.is_valid].tolist())
    return means


def _verdict(verdicts: Verdicts, i: int) -> dict[str, Any]:
    if not verdicts.is_valid[i]:
        return {"is_valid": False}
    row: dict[str, Any] = {"is_valid": True, "win_probability": float(verdicts.first_win[i])}
    for name, scores in (("reward", verdicts.first_scores), ("reference_reward", verdicts.second_scores)):
        if scores is not None:
            row[name] = float(scores[i])
    return row
