"""``oatlite eval`` as a process: whose responses it compares, what it measures, and how far two models are apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import CPU, NEW_TOKENS, done, greedy, load, logprob, oatlite, whole
from runs import Inputs, read_lines
from small_folders import save_model
from transformers import AutoModelForCausalLM

from oatlite.oracles.reward_model import RewardModelOracle


def test_eval_against_references_and_the_kl_to_a_base(llama: Inputs, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    base = save_model(tmp_path / "base", "llama", seed=5, **sizes)
    output = tmp_path / "eval.jsonl"
    out = done(
        *("eval", "--model", llama.policy, "--prompts", llama.prompts, "--max-prompts", "16", *CPU),
        *("--oracle", llama.reward_model, "--max-new-tokens", str(NEW_TOKENS), "--kl-to", base, "--output", output),
    )
    assert "win rate" in out and "95 %" in out and "KL per token" in out and f"{output}: the summary and 16 rows" in out
    summary, *rows = read_lines(output)
    assert [summary["kind"], *(row["kind"] for row in rows)] == ["summary", *["row"] * 16]
    model, tokenizer = load(llama.policy)
    prompts = [row["prompt"] for row in rows]
    for row in rows:
        assert whole(row["response"]) == whole(greedy(model, tokenizer, row["prompt"])[0])
    oracle = RewardModelOracle(str(llama.reward_model))
    verdicts = oracle.compare(prompts, [row["response"] for row in rows], [row["opponent"] for row in rows])
    assert [row["opponent"] for row in rows] == [f" it is {row['row']}" for row in rows]
    np.testing.assert_allclose([row["win_probability"] for row in rows], verdicts.first_win, atol=1e-5)
    assert summary["win_rate"] == np.mean(verdicts.first_win > 0.5)
    assert summary["interval"][0] < summary["win_rate"] < summary["interval"][1]
    assert summary["kl"]["per_response"] > 0 and summary["kl"]["num_responses"] == 16
    total = summary["kl"]["per_token"] * summary["kl"]["num_tokens"]
    assert summary["kl"]["per_response"] == pytest.approx(total / 16)


def test_eval_against_another_model_compares_the_greedy_responses_of_both(llama: Inputs, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    other, output = save_model(tmp_path / "other", "llama", seed=7, **sizes), tmp_path / "eval.jsonl"
    done(
        *("eval", "--model", llama.policy, "--against", other, "--prompts", llama.prompts, "--max-prompts", "16"),
        *("--oracle", llama.reward_model, "--max-new-tokens", str(NEW_TOKENS), "--output", output, *CPU),
    )
    summary, *rows = read_lines(output)
    assert (summary["model"], summary["against"]) == (str(llama.policy), other)
    for name, folder in (("response", llama.policy), ("opponent", Path(other))):
        model, tokenizer = load(folder)
        for row in rows:
            assert whole(row[name]) == whole(greedy(model, tokenizer, row["prompt"])[0])
    texts = [[row[name] for row in rows] for name in ("prompt", "response", "opponent")]
    first_win = RewardModelOracle(str(llama.reward_model)).compare(*texts).first_win
    np.testing.assert_allclose([row["win_probability"] for row in rows], first_win, atol=1e-5)
    assert summary["win_rate"] == np.mean(first_win > 0.5)


def test_eval_takes_the_best_of_the_samples_that_generate_writes(llama: Inputs, tmp_path: Path) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "eval.jsonl"
    given = ("--model", llama.policy, "--prompts", llama.prompts, "--max-prompts", "16")
    sizes = ("--max-new-tokens", str(NEW_TOKENS), *CPU)
    done("generate", *given, *sizes, "--num-samples", "4", "--output", samples)
    done("eval", *given, *sizes, "--oracle", llama.reward_model, "--best-of-n", "4", "--output", output)
    sampled, (_, *rows) = read_lines(samples), read_lines(output)
    oracle = RewardModelOracle(str(llama.reward_model))
    scores = oracle.score([row["prompt"] for row in sampled], [row["response"] for row in sampled]).reshape(-1, 4)
    best = [sampled[4 * i + int(n)] for i, n in enumerate(scores.argmax(axis=1))]
    assert [(row["row"], row["response"]) for row in rows] == [(row["row"], row["response"]) for row in best]
    assert len({row["sample"] for row in best}) > 1


def test_eval_of_a_model_against_itself(llama: Inputs) -> None:
    finished = oatlite(
        *("eval", "--model", llama.policy, "--prompts", llama.prompts, "--max-prompts", "16", *CPU, "--json"),
        *("--oracle", llama.reward_model, "--max-new-tokens", str(NEW_TOKENS), "--temperature", "1.0"),
        *("--against", llama.policy, "--kl-to", llama.policy),
    )
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert summary["win_rate"] == 0.5 == summary["win_probability"]
    assert summary["reward"] == summary["opponent_reward"]
    kl = summary["kl"]
    assert (kl["per_response"], kl["per_token"], kl["per_response_error"]) == (0, 0, 0) and kl["num_tokens"] > 16


def test_the_kl_is_what_transformers_gives(llama: Inputs, tmp_path: Path) -> None:
    """The same estimate on given responses, computed one by one."""
    from oatlite.config.schema import Config, ModelConfig
    from oatlite.data import PromptSet
    from oatlite.inference.divergence import divergence
    from oatlite.inference.job import Response

    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    base = save_model(tmp_path / "base", "llama", seed=5, **sizes)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, 250, rng.integers(2, 30)).astype(np.int32) for _ in range(9)]
    answers = [[rng.integers(0, 250, rng.integers(1, 40)).tolist() for _ in range(2)] for _ in tokens]
    prompts = PromptSet(
        texts=[""] * 9, raw_texts=[""] * 9, tokens=tokens, references=None, rows=np.arange(9), num_dropped=0
    )
    responses = [
        [
            Response(sampling=0, prompt=i, sample=n, text="", tokens=answer, logprob=0.0, is_finished=True)
            for n, answer in enumerate(some)
        ]
        for i, some in enumerate(answers)
    ]
    config = Config(model=ModelConfig(dtype="float32"))
    found = divergence(config, str(llama.policy), base, prompts, responses, 2, lambda *_: None)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (llama.policy, base))
    differences, lengths = [], []
    for prompt, some in zip(tokens, answers, strict=True):
        for answer in some:
            one, other = (logprob(model, prompt.tolist(), answer) for model in (ours, theirs))
            differences.append(one - other)
            lengths.append(len(answer))
    assert found.per_response == pytest.approx(np.mean(differences), abs=1e-4)
    assert found.per_response_error == pytest.approx(np.std(differences, ddof=1) / np.sqrt(18), rel=1e-4)
    assert found.per_token == pytest.approx(sum(differences) / sum(lengths), abs=1e-4)
    assert (found.num_responses, found.num_tokens) == (18, sum(lengths))
    own = divergence(config, base, base, prompts, responses, 2, lambda *_: None)
    assert (own.per_response, own.per_token) == (0, 0)
