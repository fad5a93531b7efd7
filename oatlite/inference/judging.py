"""An oracle asked about many pairs, block by block, so that progress is seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from oatlite.config.schema import Config
from oatlite.fitting import Report
from oatlite.inference.sampling import device_of
from oatlite.oracle_checks import check_oracle_models
from oatlite.oracles import PreferenceOracle, Verdicts, build_oracle, checked
from oatlite.oracles.best_of import Compare
from oatlite.quiet import quiet

BLOCK = 128


def check_models(config: Config) -> None:
    """As :func:`check_oracle_models`, whose notes are printed on stderr. Raises ConfigError."""
    for note in check_oracle_models(config):
        print(note, file=sys.stderr, flush=True)


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
        return Verdicts.joined(answers)

    return compare
