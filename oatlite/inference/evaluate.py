"""``oatlite eval``: how often an oracle prefers a model's responses, and how far the model is from another."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oatlite.config.schema import Config
from oatlite.data import PromptSet
from oatlite.errors import ConfigError
from oatlite.fitting import Report
from oatlite.inference.divergence import Divergence, divergence
from oatlite.inference.inputs import check_model, check_same_vocabulary, read_prompts
from oatlite.inference.job import Sampling
from oatlite.inference.judging import check_models, in_blocks, open_oracle
from oatlite.inference.sampling import Responses, job_for, sample
from oatlite.maths.intervals import wilson_interval
from oatlite.model_checks import check_language_model
from oatlite.oracle_checks import try_oracles
from oatlite.oracles import PreferenceOracle, Verdicts
from oatlite.oracles.base import wins, with_draws
from oatlite.oracles.best_of import best_of
from oatlite.output_file import json_lines, require_writable, write_complete
from oatlite.sampling import SamplingOptions

REFERENCES = "references"
KL_DRAWS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """``config`` is resolved for inference; ``against`` is REFERENCES or a model; ``base`` is what the KL is to."""

    config: Config
    against: str
    is_greedy: bool = True
    base: str | None = None
    output: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``win_rate`` counts a win probability over one half as a win and exactly one half as half a win, over the
    ``num_judged`` prompts with a valid verdict, and is NaN where there is none; ``interval`` is its 95 % one (Wilson).
    Lengths are in tokens of the model's tokenizer; shares are of responses that ended by their length."""

    model: str
    against: str
    num_prompts: int
    num_dropped: int
    num_judged: int
    win_rate: float
    interval: tuple[float, float]
    win_probability: float
    reward: float | None
    opponent_reward: float | None
    response_tokens: float
    opponent_tokens: float
    truncated: float
    opponent_truncated: float | None
    kl: Divergence | None = None


@dataclass(frozen=True, slots=True)
class _Side:
    """One text for each prompt, and what is known about it."""

    texts: list[str]
    num_tokens: list[int]
    is_finished: list[bool] | None


def evaluate(options: EvalOptions, report: Report) -> Evaluation:
    """Sample, judge, measure, and write ``options.output`` if there is one. Raises OatliteError."""
    config, base = options.config, options.base
    if options.output is not None:
        require_writable(options.output, (".jsonl", ".json"), overwrite=options.overwrite)
    path = config.model.path
    assert path is not None
    model, tokenizer = check_model(config, path, "the model")
    other = None if options.against == REFERENCES else check_model(config, options.against, "the other model")
    if base is not None:
        trusted = config.model.trust_remote_code
        found = check_language_model(base, "the base", trust_remote_code=trusted)
        check_same_vocabulary((model, tokenizer), found, base, "the base")
    check_models(config)
    prompts = read_prompts(config, model, tokenizer, needs_references=other is None)
    theirs = None if other is None else read_prompts(config, *other, needs_references=False)
    if theirs is not None:
        prompts, theirs = _in_common(prompts, theirs)
    try_oracles(config, prompts.raw_texts[0], None if prompts.references is None else prompts.references[0])

    samplings = [_sampling(options)]
    if base is not None:
        plain = SamplingOptions(temperature=1.0, max_new_tokens=config.sampling.max_new_tokens)
        samplings.append(Sampling(options=plain, purpose=KL_DRAWS))
    found_responses = sample(job_for(config, path, prompts, samplings), "responses", report)
    if theirs is None:
        assert prompts.references is not None
        lengths = [len(ids) for ids in tokenizer(prompts.references, add_special_tokens=False)["input_ids"]]
        opponents = _Side(prompts.references, lengths, None)
    else:
        single = samplings[0].model_copy(update={"num_samples": 1})
        [their_responses] = sample(job_for(config, options.against, theirs, [single]), "the other's", report)
        opponents = _side(their_responses, [0] * len(prompts))
    oracle = open_oracle(config)
    try:
        ours = _side(found_responses[0], _choose(oracle, prompts, found_responses[0], report))
        verdicts = _judge(oracle, prompts, ours, opponents, report)
    finally:
        oracle.close()
    del oracle  # and its memory, before two models are loaded
    kl = None
    if base is not None:
        pad = int(tokenizer.pad_token_id)
        kl = divergence(config, path, base, prompts, found_responses[1], pad, report)
    result = _summary(options, prompts, ours, opponents, verdicts, kl)
    if options.output is not None:
        _write(options.output, result, _rows(prompts, ours, opponents, verdicts), overwrite=options.overwrite)
    return result


def _sampling(options: EvalOptions) -> Sampling:
    config = options.config
    return Sampling(
        options=SamplingOptions.of(config.sampling, is_greedy=options.is_greedy),
        num_samples=1 if options.is_greedy else config.eval.best_of_n,
    )


def _in_common(ours: PromptSet, theirs: PromptSet) -> tuple[PromptSet, PromptSet]:
    """The rows that both models have room for: each writes and counts prompts by its own tokenizer."""
    common = set(ours.rows.tolist()) & set(theirs.rows.tolist())
    if not common:
        raise ConfigError("no prompt fits both models", "raise --max-prompt-tokens")
    num_dropped = max(ours.num_dropped, theirs.num_dropped)
    both = [each.select([i for i, row in enumerate(each.rows.tolist()) if row in common]) for each in (ours, theirs)]
    return dataclasses.replace(both[0], num_dropped=num_dropped), both[1]


def _choose(oracle: PreferenceOracle, prompts: PromptSet, responses: Responses, report: Report) -> list[int]:
    num_comparisons = sum(len(some) - 1 for some in responses)
    if not num_comparisons:
        return [0] * len(responses)
    compare = in_blocks(oracle, num_comparisons, "the best of them", report)
    texts = [[response.text for response in some] for some in responses]
    return best_of(compare, prompts.raw_texts, texts, prompts.references)


def _side(responses: Responses, chosen: list[int]) -> _Side:
    picked = [some[n] for some, n in zip(responses, chosen, strict=True)]
    return _Side(
        [response.text for response in picked],
        [len(response.tokens) for response in picked],
        [response.is_finished for response in picked],
    )


def _judge(oracle: PreferenceOracle, prompts: PromptSet, ours: _Side, opponents: _Side, report: Report) -> Verdicts:
    """Two equal texts are a tie, whatever an oracle with a preference for a place says."""
    compare = in_blocks(oracle, len(prompts), "judge", report)
    verdicts = compare(prompts.raw_texts, ours.texts, opponents.texts, prompts.references)
    return with_draws(verdicts, ours.texts, opponents.texts)


def _summary(
    options: EvalOptions,
    prompts: PromptSet,
    ours: _Side,
    opponents: _Side,
    verdicts: Verdicts,
    kl: Divergence | None,
) -> Evaluation:
    num_judged = int(verdicts.is_valid.sum())
    num_wins = sum(wins(verdicts))
    assert options.config.model.path is not None

    def mean(values: Any) -> float:
        return float(np.mean(values)) if len(values) else float("nan")

    def reward(scores: Any) -> float | None:
        return None if scores is None else mean(scores[verdicts.is_valid].astype(np.float64))

    def truncated(side: _Side) -> float | None:
        return None if side.is_finished is None else 1 - mean(side.is_finished)

    share = truncated(ours)
    assert share is not None
    return Evaluation(
        model=options.config.model.path,
        against=options.against,
        num_prompts=len(prompts),
        num_dropped=prompts.num_dropped,
        num_judged=num_judged,
        win_rate=num_wins / num_judged if num_judged else float("nan"),
        interval=wilson_interval(num_wins, num_judged),
        win_probability=mean(verdicts.first_win[verdicts.is_valid].astype(np.float64)),
        reward=reward(verdicts.first_scores),
        opponent_reward=reward(verdicts.second_scores),
        response_tokens=mean(ours.num_tokens),
        opponent_tokens=mean(opponents.num_tokens),
        truncated=share,
        opponent_truncated=truncated(opponents),
        kl=kl,
    )


def _rows(prompts: PromptSet, ours: _Side, opponents: _Side, verdicts: Verdicts) -> list[dict[str, Any]]:
    found = []
    for i, prompt in enumerate(prompts.raw_texts):
        row: dict[str, Any] = {
            "row": int(prompts.rows[i]),
            "prompt": prompt,
            "response": ours.texts[i],
            "opponent": opponents.texts[i],
            "is_valid": bool(verdicts.is_valid[i]),
        }
        if verdicts.is_valid[i]:
            row["win_probability"] = float(verdicts.first_win[i])
            for name, scores in (("reward", verdicts.first_scores), ("opponent_reward", verdicts.second_scores)):
                if scores is not None:
                    row[name] = float(scores[i])
        found.append(row)
    return found


def as_json(result: Evaluation) -> dict[str, Any]:
    """The summary as JSON, in which what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    found: dict[str, Any] = plain(dataclasses.asdict(result))
    return found


def _write(path: Path, result: Evaluation, rows: list[dict[str, Any]], *, overwrite: bool) -> None:
    if path.suffix == ".json":
        text = [json.dumps({"summary": as_json(result), "rows": rows}, ensure_ascii=False, indent=1), "\n"]
        write_complete(path, text, overwrite=overwrite)
        return
    lines = [{"kind": "summary", **as_json(result)}, *({"kind": "row", **row} for row in rows)]
    write_complete(path, json_lines(lines), overwrite=overwrite)
