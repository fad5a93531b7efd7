"""An oracle asked about many pairs, block by block, so that progress is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from oatlite.config.schema import Config
from oatlite.finetuning.quiet import quiet
from oatlite.fitting import Report
from oatlite.inference.sampling import device_of
from oatlite.oracles import PreferenceOracle, Verdicts, build_oracle, checked
from oatlite.oracles.best_of import Compare

BLOCK = 128


def open_oracle(config: Config) -> PreferenceOracle:
    with quiet():
        return build_oracle(config.oracle.path, config, device=device_of(config))


def in_blocks(oracle: PreferenceOracle, total: int, what: str, report: Report, size: int = BLOCK) -> Compare:
    """The oracle's ``compare`` with ``size`` pairs at a time, of ``total`` over all calls. Answers are checked."""
    done = 0

    def compare(
        prompts: Sequence[str], first: Sequence[str], second: Sequence[str], references: Sequence[str] | None
    ) -> Verdicts:
        nonlocal done
        answers: list[Verdicts] = []
        for start in range(0, len(prompts), size):
            block = slice(start, start + size)
            answer = oracle.compare(
                prompts[block], first[block], second[block], None if references is None else references[block]
            )
            answers.append(checked(answer, len(prompts[block])))
            done += len(prompts[block])
            report(what, done, total, f"{oracle.num_failures} retries" if oracle.num_failures else "")
        return joined(answers)

    return compare


def joined(answers: Sequence[Verdicts]) -> Verdicts:
    """The verdicts on all pairs, in order; without rewards unless all have them."""

    def scores(get: Callable[[Verdicts], npt.NDArray[np.float32] | None]) -> npt.NDArray[np.float32] | None:
        parts = [part for part in map(get, answers) if part is not None]
        return np.concatenate(parts) if len(parts) == len(answers) else None

    return Verdicts(
        first_win=np.concatenate([answer.first_win for answer in answers]),
        is_valid=np.concatenate([answer.is_valid for answer in answers]),
        first_scores=scores(lambda answer: answer.first_scores),
        second_scores=scores(lambda answer: answer.second_scores),
    )
