"""The learner's loop without actors: pairs that are read, over the stand-ins of oatlite.testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oatlite.algorithms import build_algorithm
from oatlite.config.algorithms import ALGORITHM_CONFIGS, AlgorithmConfig, DPOConfig
from oatlite.config.schema import Config
from oatlite.preferences import PreferenceSet
from oatlite.testing import EOS, LETTERS, Rehearsal, rehearse_offline
from oatlite.workers.buffer import PairBuffer
from oatlite.workers.contracts import Share
from oatlite.workers.offline import RecordedExperience, training_pair
from oatlite.workers.saving import pack, unpack


def letter_pairs(num: int, *, is_swapped: bool = False, seed: int = 0) -> PreferenceSet:
    """Answers of random letters; the better one has its second letter replaced by e, the worse one by x."""
    rng = np.random.default_rng(seed)
    texts: list[list[str]] = []
    for i in range(num):
        letters = ["".join(LETTERS[k] for k in rng.integers(1, 27, 4)) for _ in range(2)]
        good, bad = (text[0] + letter + text[2:] for text, letter in zip(letters, "ex", strict=True))
        texts.append([LETTERS[1 + i % 26], *((bad, good) if is_swapped else (good, bad))])
    tokens = [[np.array([LETTERS.index(c) for c in text], np.int32) for text in row] for row in texts]
    return PreferenceSet(
        prompts=[row[0] for row in texts],
        chosen=[row[1] for row in texts],
        rejected=[row[2] for row in texts],
        prompt_tokens=[row[0] for row in tokens],
        chosen_tokens=[np.append(row[1], np.int32(EOS)) for row in tokens],
        rejected_tokens=[np.append(row[2], np.int32(EOS)) for row in tokens],
        margins=np.full(num, 2.0),
        num_dropped=0,
    )


def run(config: AlgorithmConfig, *, is_swapped: bool = False, **options: Any) -> Rehearsal:
    held_out = letter_pairs(32, is_swapped=is_swapped, seed=1)
    return rehearse_offline(build_algorithm(config), letter_pairs(128, is_swapped=is_swapped), held_out, **options)


@pytest.mark.parametrize("config", [cls() for cls in ALGORITHM_CONFIGS.values()], ids=lambda config: config.name)
def test_every_algorithm_learns_from_recorded_pairs(config: AlgorithmConfig) -> None:
    evals = run(config, steps=30).journal.of("eval")
    assert [record["step"] for record in evals] == [0, 15, 30]
    assert evals[-1]["accuracy"] > 0.9
    assert evals[-1]["margin"] > evals[0]["margin"]
    # The loss of dpo_positive may rise on held-out pairs, where it punishes each better answer that became less likely.
    assert evals[-1]["loss"] < evals[0]["loss"] or config.name == "dpo_positive"


def test_the_preference_is_the_datas() -> None:
    straight, swapped = (run(DPOConfig(), steps=10, is_swapped=swapped) for swapped in (False, True))
    e = LETTERS.index("e")
    assert straight.policy.logits[:, e].mean() > swapped.policy.logits[:, e].mean() + 0.5


def test_records_say_what_was_measured_and_nothing_else() -> None:
    result = run(DPOConfig(), steps=4)
    record = result.journal.of("step")[0]
    for key in ("policy_version", "queries", "staleness", "mismatch_mean", "mismatch_max", "reward"):
        assert key not in record
    assert record["loss"] == pytest.approx(np.log(2), abs=1e-6), "policy and reference are the same yet"
    assert record["accuracy"] == 0.5, "which is no opinion"
    assert record["trained_pairs"] == 32 and record["response_tokens"] > 1
    assert "generate_s" not in record["perf"] and "tokens_per_s" not in record["perf"]
    rows = result.journal.evaluations[4]
    assert len(rows) == 32
    better = np.mean([row["chosen_reward"] > row["rejected_reward"] for row in rows])
    assert better == pytest.approx(result.journal.of("eval")[-1]["accuracy"])


def test_an_epoch_takes_each_pair_once_in_an_order_of_its_own() -> None:
    config = Config.model_validate({"rollout": {"prompts_per_step": 32, "offline": True}})
    ranks = [RecordedExperience(config, Share(rank=rank, count=2), letter_pairs(128)) for rank in range(2)]
    steps = [[pair.tokens.chosen.tobytes() for rank in ranks for pair in rank.collect(s, 0).pairs] for s in range(1, 9)]
    epochs = [[pair for step in steps[start : start + 4] for pair in step] for start in (0, 4)]
    everything = sorted(tokens.tobytes() for tokens in letter_pairs(128).chosen_tokens)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything and epochs[0] != epochs[1]


def test_judging_changes_nothing() -> None:
    often = run(DPOConfig(), steps=6, settings={"eval": {"every": 1}})
    never = run(DPOConfig(), steps=6, settings={"eval": {"every": 100}})
    assert often.policy.logits.equal(never.policy.logits)


def test_pairs_that_nobody_sampled_survive_a_checkpoint(tmp_path: Path) -> None:
    preferences = letter_pairs(4)
    buffer = PairBuffer(1)
    buffer.add([training_pair(preferences, i) for i in range(4)], 3)
    (tmp_path / "pairs").write_bytes(pack(buffer))
    steps, entries = unpack(tmp_path / "pairs")
    assert steps == [3] and len(entries) == 4
    for entry, held in zip(entries, buffer, strict=True):
        assert entry.pair.sampler_logprobs is None
        assert np.array_equal(entry.pair.tokens.chosen, held.pair.tokens.chosen)
