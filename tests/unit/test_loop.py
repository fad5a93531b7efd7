"""The learner's loop, its hooks and its algorithms, over the stand-ins of oatlite.testing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oatlite.algorithms import ALGORITHMS, build_algorithm
from oatlite.algorithms.base import Algorithm, Duel, Needs
from oatlite.config.algorithms import ALGORITHM_CONFIGS, AlgorithmConfig, CustomAlgorithmConfig, DPOConfig, SimPOConfig
from oatlite.config.schema import Config
from oatlite.errors import ConfigError, OracleError, WorkerDied
from oatlite.layouts import ForwardBatch, TokenPair
from oatlite.oracles.base import PreferenceOracle, Verdicts
from oatlite.testing import BigramPolicy, FunctionOracle, InMemoryActors, InMemoryTrainer, rehearse
from oatlite.workers.buffer import TrainingPair
from oatlite.workers.update import Layout, Updater

EXAMPLE = Path(__file__).parent / "example_algorithm.py"
SIMPO, DPO = SimPOConfig(), DPOConfig(beta=1.0)
CUSTOM = CustomAlgorithmConfig(name=f"{EXAMPLE}:FarApart")


def share_of_e(prompt: str, response: str) -> float:
    """More for an answer with more of the letter e, and for one that ends by itself."""
    return 4.0 * response.count("e") / 8


def algorithm(config: AlgorithmConfig = SIMPO) -> Algorithm:
    return build_algorithm(config)


def all_algorithms() -> list[AlgorithmConfig]:
    return [*(cls() for cls in ALGORITHM_CONFIGS.values()), CUSTOM]


def test_every_algorithm_of_the_configuration_can_be_built_and_the_other_way_round() -> None:
    assert list(ALGORITHMS) == list(ALGORITHM_CONFIGS)
    for name, cls in ALGORITHM_CONFIGS.items():
        assert cls().name == name and isinstance(build_algorithm(cls()), ALGORITHMS[name])


@pytest.mark.parametrize("config", all_algorithms(), ids=lambda config: config.name.rpartition(":")[2])
def test_every_algorithm_raises_reward_and_win_rate(config: AlgorithmConfig) -> None:
    run = rehearse(algorithm(config), share_of_e, steps=40)
    first, last = run.journal.of("eval")[0], run.journal.of("eval")[-1]
    steps = run.journal.of("step")
    assert last["win_rate"] > first["win_rate"] + 0.25
    assert np.mean([s["reward"] for s in steps[-5:]]) > np.mean([s["reward"] for s in steps[:5]]) + 0.25
    assert last["step"] == 40


def test_a_loss_with_the_wrong_sign_is_noticed() -> None:
    class Backwards(type(algorithm())):  # type: ignore[misc]
        def loss(self, policy, reference, batch):  # type: ignore[no-untyped-def]
            result = super().loss(policy, reference, batch)
            return result._replace(losses=-result.losses)

    run = rehearse(Backwards(SIMPO), share_of_e, steps=40)
    steps = run.journal.of("step")
    assert np.mean([s["reward"] for s in steps[-5:]]) <= np.mean([s["reward"] for s in steps[:5]])


def test_offline_is_judged_by_its_newest_policy_and_samples_from_the_initial_one() -> None:
    run = rehearse(algorithm(), share_of_e, steps=20, sync_every=1000)
    evals = run.journal.of("eval")
    assert [record["policy_version"] for record in run.journal.of("step")] == [0] * 20
    assert evals[-1]["reward"] > evals[0]["reward"]
    generated = [call for call in run.calls if call.startswith("generate")]
    assert generated.count("generate with 20") == 1
    at = run.calls.index("sync 10")
    assert run.calls[at : at + 4] == ["sync 10", "generate with 10", "compare 26", "sync 0"]


def test_restored_behaviour_is_what_was_there_before_the_evaluation() -> None:
    often = rehearse(algorithm(), share_of_e, steps=8, sync_every=4, settings={"eval": {"every": 1}})
    never = rehearse(algorithm(), share_of_e, steps=8, sync_every=4, settings={"eval": {"every": 100}})
    assert _without_perf(often.journal.of("step")) == _without_perf(never.journal.of("step"))
    assert [record["policy_version"] for record in often.journal.of("step")] == [0] * 4 + [4] * 4
    assert [record["staleness"] for record in often.journal.of("step")] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_last_samples_before_a_sync_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, bool]] = []
    generate = InMemoryActors.generate

    def noted(self: InMemoryActors, *arguments: Any, is_last_of_version: bool = False) -> Any:
        told.append((self.policy_version, is_last_of_version))
        self.sleep_s, self.wake_s = self.sleep_s + 1.5, self.wake_s + 0.5
        return generate(self, *arguments, is_last_of_version=is_last_of_version)

    monkeypatch.setattr(InMemoryActors, "generate", noted)
    run = rehearse(algorithm(), share_of_e, steps=4, sync_every=2, settings={"eval": {"every": 100}})
    evaluated, steps = [(0, False), (4, False)], [(0, False), (0, True), (2, False), (2, True)]
    assert told == [evaluated[0], *steps, evaluated[1]]
    spent = [(record["perf"]["sleep_s"], record["perf"]["wake_s"]) for record in run.journal.of("step")]
    assert spent == [(3.0, 1.0)] + [(1.5, 0.5)] * 3, "the first with that of the evaluation before it"


@pytest.mark.parametrize("other_lr", [0.1, 0.1001])
def test_ranks_whose_policies_are_no_longer_the_same_end_the_run(
    other_lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that are threads; the second one may have learned with another rate."""
    met, values = threading.Barrier(2, timeout=30), dict[int, float]()

    def maximum(trainer: InMemoryTrainer, value: float) -> float:
        values[threading.get_ident()] = value
        met.wait()
        largest = max(values.values())
        met.wait()
        return largest

    monkeypatch.setattr(InMemoryTrainer, "maximum", maximum)
    with ThreadPoolExecutor(2) as ranks:
        ends = [
            ranks.submit(
                rehearse, algorithm(), share_of_e, steps=3, lr=lr, sync_every=2, settings={"eval": {"every": 3}}
            )
            for lr in (0.1, other_lr)
        ]
    for end in ends:
        if other_lr == 0.1:
            assert len(end.result().journal.of("step")) == 3
        else:
            with pytest.raises(WorkerDied, match="the learner's ranks hold weights 2 that are not the same"):
                end.result()


def test_the_same_seed_repeats_and_another_does_not() -> None:
    one, same, other = (rehearse(algorithm(), share_of_e, steps=5, seed=seed) for seed in (3, 3, 4))
    assert _without_perf(one.journal.records) == _without_perf(same.journal.records)
    assert one.journal.pairs == same.journal.pairs
    assert one.journal.pairs != other.journal.pairs


def test_samples_are_on_policy_to_the_letter() -> None:
    run = rehearse(algorithm(), share_of_e, steps=5)
    assert all(record["mismatch_max"] < 1e-5 for record in run.journal.of("step"))


def test_micro_batches_and_gradient_steps_make_no_difference_where_they_should_not() -> None:
    whole = rehearse(algorithm(), share_of_e, steps=5)
    cut = rehearse(algorithm(), share_of_e, steps=5, settings={"learner": {"micro_batch_size": 4}})
    for one, other in zip(whole.journal.of("step"), cut.journal.of("step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    halves = rehearse(
        algorithm(), share_of_e, steps=5, settings={"learner": {"batch_size": 16, "micro_batch_size": 16}}
    )
    assert halves.journal.of("step")[1]["loss"] != pytest.approx(whole.journal.of("step")[1]["loss"], rel=1e-5)


def test_replay_trains_on_the_pairs_of_earlier_steps_too() -> None:
    fresh = rehearse(algorithm(), share_of_e, steps=6)
    replayed = rehearse(algorithm(), share_of_e, steps=6, settings={"learner": {"buffer_size": 96}})
    assert [s["gradient_steps"] for s in fresh.journal.of("step")] == [1] * 6
    assert [s["gradient_steps"] for s in replayed.journal.of("step")] == [1, 2, 3, 3, 3, 3]
    cleared = {"learner": {"buffer_size": 96, "buffer_clear_every": 2}}
    run = rehearse(algorithm(), share_of_e, steps=6, settings=cleared)
    assert [s["gradient_steps"] for s in run.journal.of("step")] == [1, 2] * 3
    # what is measured of sampler and learner is still measured before the policy has moved
    assert all(record["mismatch_max"] < 1e-5 for record in replayed.journal.of("step"))


def test_passes_and_batches_make_gradient_steps_up_to_the_bound() -> None:
    learner = {"batch_size": 8, "micro_batch_size": 8, "passes": 3}
    run = rehearse(algorithm(), share_of_e, steps=2, settings={"learner": learner})
    assert [s["gradient_steps"] for s in run.journal.of("step")] == [12, 12]
    run = rehearse(algorithm(), share_of_e, steps=2, settings={"learner": learner | {"max_gradient_steps": 7}})
    assert [s["gradient_steps"] for s in run.journal.of("step")] == [7, 7]


def test_the_reference_scores_a_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = 0
    forward = BigramPolicy.forward

    def counting(policy: BigramPolicy, batch: ForwardBatch) -> torch.Tensor:
        nonlocal scored
        if not policy.logits.requires_grad:
            scored += batch.num_pairs
        return forward(policy, batch)

    monkeypatch.setattr(BigramPolicy, "forward", counting)
    run = rehearse(algorithm(DPO), share_of_e, steps=4, settings={"learner": {"passes": 3, "buffer_size": 64}})
    assert scored == sum(record["trained_pairs"] for record in run.journal.of("step"))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_asked_only_while_it_is_at_hand(name: str) -> None:
    config = Config.model_validate(
        {
            "rollout": {"prompts_per_step": 8},
            "learner": {"micro_batch_size": 4, "batch_size": 8, "buffer_size": 8},
        }
    )
    opened: list[bool] = []

    @contextmanager
    def at_hand() -> Iterator[None]:
        opened.append(True)
        yield
        opened.pop()

    def reference(batch: ForwardBatch) -> torch.Tensor:
        assert opened, "asked while it was away"
        return BigramPolicy(1)(batch).detach()

    trainer = InMemoryTrainer(BigramPolicy(0), 0.1, keeps_behaviour=False)
    layout = Layout(name="shared", pad_token_id=0, device=torch.device("cpu"))
    updater = Updater(config, trainer, algorithm(ALGORITHM_CONFIGS[name]()), reference, layout, at_hand)
    tokens = [np.array(ids, np.int32) for ids in ([1], [2, 0], [3, 0])]
    pair = TrainingPair(
        tokens=TokenPair(prompt=tokens[0], chosen=tokens[1], rejected=tokens[2]),
        sampler_logprobs=None,
        is_trainable=True,
    )
    assert updater.learn([pair] * 8, 1).loss.count == 8
    assert not opened


def test_a_selection_of_more_pairs_than_prompts_is_refused() -> None:
    class Greedy(type(algorithm())):  # type: ignore[misc]
        def select(self, candidates, scores, rng):  # type: ignore[no-untyped-def]
            return 2 * super().select(candidates, scores, rng)

    with pytest.raises(ConfigError, match="64 pairs of 32 prompts"):
        rehearse(Greedy(SIMPO), share_of_e, steps=1)


def test_a_selection_sees_what_the_reference_makes_of_every_candidate() -> None:
    """By hand: the initial policy's log-probabilities, letter by letter; three candidates, whose last has no pair."""
    initial = BigramPolicy(seed=0).logits.detach().log_softmax(-1).double().numpy()
    seen: list[float] = []

    class Implicit(type(algorithm())):  # type: ignore[misc]
        needs = Needs(reference_scores=True)

        def sampling_plan(self):  # type: ignore[no-untyped-def]
            return ("policy",) * 3

        def select(self, candidates, scores, rng):  # type: ignore[no-untyped-def]
            assert list(scores) == ["reference"] and scores["reference"].shape == (len(candidates), 3)
            for m, one in enumerate(candidates):
                for n, found in enumerate(one.candidates):
                    before = [int(one.prompt_tokens[-1]), *found.tokens[:-1].tolist()]
                    expected = sum(initial[b, a] for b, a in zip(before, found.tokens.tolist(), strict=True))
                    assert scores["reference"][m, n] == pytest.approx(expected, abs=1e-4)
                    seen.append(float(found.logprobs.sum()) - expected)
            return [Duel(m, 1, 2) for m in range(len(candidates))]

    run = rehearse(Implicit(SIMPO), share_of_e, steps=3)
    assert len(run.journal.pairs) == 3 * 32 and np.abs(seen[: 32 * 3]).max() < 1e-4 < 1e-2 < np.abs(seen).max()


def test_a_step_without_a_usable_verdict_trains_on_nothing() -> None:
    run = rehearse(algorithm(), lambda prompt, response: 0.0, steps=3)
    for record in run.journal.of("step"):
        assert (record["trained_pairs"], record["unusable_pairs"]) == (0, 32)
        assert "loss" not in record
    assert [note.partition(":")[0] for note in run.journal.notes] == [f"step {n} trains on nothing" for n in (1, 2, 3)]


class HalfBlind(PreferenceOracle):
    """No verdict on prompts from n to z."""

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        known = FunctionOracle(share_of_e).compare(prompts, first, second)
        is_valid = np.array([prompt < "n" for prompt in prompts])
        return Verdicts(first_win=np.where(is_valid, known.first_win, np.float32(np.nan)), is_valid=is_valid)


def test_pairs_without_a_verdict_carry_no_weight() -> None:
    run = rehearse(algorithm(), share_of_e, steps=3, oracle=HalfBlind())
    for pair in run.journal.pairs:
        assert not pair["is_trainable"] or pair["prompt"] < "n"
    for record in run.journal.of("step"):
        assert 0 < record["trained_pairs"] < 32
        assert record["trained_pairs"] + record["unusable_pairs"] == 32
        pairs = [pair for pair in run.journal.pairs if pair["step"] == record["step"]]
        blind = [pair for pair in pairs if pair["prompt"] >= "n" and pair["chosen"] != pair["rejected"]]
        assert record["without_verdict"] == len(blind) > 0


def test_requests_that_failed_and_were_made_again_are_counted_of_steps_and_of_evaluations() -> None:
    class FailsThrice(FunctionOracle):
        num_failures = 0

        def compare(self, *arguments):  # type: ignore[no-untyped-def]
            self.num_failures += 3
            return super().compare(*arguments)

    run = rehearse(algorithm(), share_of_e, steps=2, oracle=FailsThrice(share_of_e))
    assert [record["perf"]["oracle_failures"] for record in run.journal.records] == [3] * 5
    best = rehearse(
        algorithm(), share_of_e, steps=1, oracle=FailsThrice(share_of_e), settings={"eval": {"best_of_n": 4}}
    )
    assert [record["perf"]["oracle_failures"] for record in best.journal.of("eval")] == [9, 9], "two rounds, a verdict"
    online = rehearse(
        algorithm(), share_of_e, steps=1, oracle=FailsThrice(share_of_e), settings={"eval": {"online": True}}
    )
    assert [record["perf"]["oracle_failures"] for record in online.journal.of("step")] == [6], "and of both sides"
    quiet = rehearse(algorithm(), share_of_e, steps=1)
    assert all("oracle_failures" not in record["perf"] for record in quiet.journal.records)


def test_an_oracle_that_answers_nonsense_stops_the_run() -> None:
    class Liar(PreferenceOracle):
        def compare(self, prompts, first, second, references=None):  # type: ignore[no-untyped-def]
            return Verdicts(first_win=np.full(len(prompts), 1.5, np.float32), is_valid=np.ones(len(prompts), bool))

    with pytest.raises(OracleError):
        rehearse(algorithm(), share_of_e, steps=1, oracle=Liar())


def test_bernoulli_feedback_chooses_the_loser_now_and_then() -> None:
    run = rehearse(algorithm(), share_of_e, steps=5, settings={"oracle": {"feedback": "bernoulli"}})
    wins = [pair["win_probability"] for pair in run.journal.pairs]
    assert 0.02 < np.mean([win < 0.5 for win in wins]) < 0.5


def test_queries_end_a_run_in_the_middle_of_a_step() -> None:
    run = rehearse(algorithm(), share_of_e, steps=3, settings={"data": {"max_queries": 70}})
    assert [record["queries"] for record in run.journal.of("step")] == [32, 64, 70]


def test_equal_responses_cost_no_query_and_the_budget_is_spent_on_others() -> None:
    # Of two tokens at this temperature many pairs are of two equal texts.
    sampling = {"temperature": 0.05, "max_new_tokens": 2}
    settings = {"data": {"max_queries": 40}, "sampling": sampling, "eval": {"every": 100}}
    run = rehearse(algorithm(), share_of_e, steps=8, settings=settings)
    steps = run.journal.of("step")
    asked = [pair for pair in run.journal.pairs if pair["chosen"] != pair["rejected"]]
    assert len(run.journal.pairs) - len(asked) > 0, "there must be equal ones for this to show anything"
    assert steps[-1]["queries"] == len(asked) <= 40
    compared = [int(call.split()[1]) for call in run.calls if call.startswith("compare")]
    assert sum(compared) == len(asked) + 2 * 26, "the rest are the two evaluations"
    assert all(not pair["is_trainable"] for pair in run.journal.pairs if pair["chosen"] == pair["rejected"])
    assert [record["without_verdict"] for record in steps] == [0] * len(steps)


def test_evaluations_by_queries_come_when_a_multiple_is_crossed() -> None:
    settings = {"eval": {"every": 1, "every_queries": 80}}
    run = rehearse(algorithm(), share_of_e, steps=6, settings=settings)
    steps = {record["step"]: record["queries"] for record in run.journal.of("step")}
    crossed = [step for step, queries in steps.items() if queries // 80 > steps.get(step - 1, 0) // 80]
    evals = run.journal.of("eval")
    assert [record["step"] for record in evals] == [0, *crossed, *([] if crossed[-1] == 6 else [6])]
    assert [record["queries"] for record in evals] == [0, *(steps[record["step"]] for record in evals[1:])]


def test_evaluations_ask_their_own_oracle_and_training_does_not() -> None:
    def fewer(prompt: str, response: str) -> float:
        return -share_of_e(prompt, response)

    own = rehearse(algorithm(), share_of_e, steps=20, eval_oracle=FunctionOracle(fewer))
    same = rehearse(algorithm(), share_of_e, steps=20)
    assert own.journal.pairs == same.journal.pairs, "training is the same"
    first, last = own.journal.of("eval")[0], own.journal.of("eval")[-1]
    assert last["reward"] < first["reward"] and last["win_rate"] < first["win_rate"]
    assert last["reward"] == pytest.approx(-same.journal.of("eval")[-1]["reward"])


def test_the_best_of_several_samples_is_judged_on_request() -> None:
    def evals(best_of_n: int) -> list[dict[str, object]]:
        settings = {"eval": {"best_of_n": best_of_n, "best_of_n_temperature": 1.5}}
        return rehearse(algorithm(), share_of_e, steps=4, settings=settings).journal.of("eval")

    one, many = evals(1), evals(16)
    assert many[0]["reward"] > one[0]["reward"] + 0.2  # type: ignore[operator]
    assert [record["queries"] for record in many] == [record["queries"] for record in one], "they are not training's"
    assert [record["eval_queries"] for record in (*one, *many)] == [26] * len(one) + [16 * 26] * len(many)
    plain = rehearse(algorithm(), share_of_e, steps=4).journal.of("eval")
    assert _without_perf(one) == _without_perf(plain), "one is the greedy response, whatever the temperature"


class ThirdOnly(PreferenceOracle):
    """Judges each third pair alone, and prefers what stands first, whatever it is."""

    def compare(self, prompts, first, second, references=None):  # type: ignore[no-untyped-def]
        is_valid = np.arange(len(prompts)) % 3 == 0
        return Verdicts(first_win=np.ones(len(prompts), np.float32), is_valid=is_valid)


def test_an_evaluation_says_how_many_it_could_judge_and_equal_texts_are_a_draw() -> None:
    run = rehearse(algorithm(), share_of_e, steps=2, eval_oracle=ThirdOnly())
    records = run.journal.of("eval")
    assert [record["judged"] for record in records] == [pytest.approx(9 / 26)] * 3
    assert all(record["win_rate"] == 1 for record in records)
    assert len(run.journal.notes) == 3 and "no verdict on 65% of the held-out prompts" in run.journal.notes[0]
    quiet = rehearse(algorithm(), share_of_e, steps=2)
    assert quiet.journal.notes == [] and quiet.journal.of("eval")[0]["judged"] == 1

    answers = {row["prompt"]: row["response"] for row in quiet.journal.evaluations[0]}
    drawn = rehearse(algorithm(), share_of_e, steps=1, eval_oracle=ThirdOnly(), reference=answers["a"])
    rows = [row for row in drawn.journal.evaluations[0] if row["is_valid"]]
    assert {row["win_probability"] for row in rows if row["response"] == row["reference"]} == {0.5}
    assert {row["win_probability"] for row in rows if row["response"] != row["reference"]} == {1.0}


def test_training_responses_are_judged_against_the_references_on_request() -> None:
    plain = rehearse(algorithm(), share_of_e, steps=10)
    judged = rehearse(
        algorithm(),
        share_of_e,
        steps=10,
        settings={"eval": {"online": True}},
        training_reference="eb",
    )
    rates = [record["online_win_rate"] for record in judged.journal.of("step")]
    assert "online_win_rate" not in plain.journal.of("step")[0]
    assert [r["queries"] for r in judged.journal.of("step")] == [r["queries"] for r in plain.journal.of("step")]
    assert judged.journal.pairs == plain.journal.pairs
    for record in judged.journal.of("step"):
        pairs = [pair for pair in judged.journal.pairs if pair["step"] == record["step"]]
        scores = [share_of_e("", pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        expected = np.mean([np.sign(score - share_of_e("", "eb")) / 2 + 0.5 for score in scores])
        assert record["online_win_rate"] == pytest.approx(expected)
    assert rates[-1] > rates[0]


def test_a_training_response_that_equals_its_reference_is_a_draw_and_the_seconds_of_judging_it_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FirstPlace(PreferenceOracle):
        def compare(self, prompts, first, second, references=None):  # type: ignore[no-untyped-def]
            return Verdicts(first_win=np.ones(len(prompts), np.float32), is_valid=np.ones(len(prompts), bool))

    compare = InMemoryActors.compare

    def slow(self: InMemoryActors, *arguments: Any, purpose: Any = "train") -> Any:
        return compare(self, *arguments, purpose=purpose)[0], 2.0 if purpose == "eval" else 0.5

    monkeypatch.setattr(InMemoryActors, "compare", slow)
    settings = {"eval": {"online": True}, "sampling": {"max_new_tokens": 1}}
    run = rehearse(algorithm(), share_of_e, steps=4, oracle=FirstPlace(), settings=settings, training_reference="e")
    num_draws = 0
    for record in run.journal.of("step"):
        pairs = [pair for pair in run.journal.pairs if pair["step"] == record["step"]]
        is_draw = [pair[side] == "e" for pair in pairs for side in ("chosen", "rejected")]
        assert record["online_win_rate"] == pytest.approx(1 - np.mean(is_draw) / 2)
        assert record["perf"]["score_s"] == 2.5
        num_draws += sum(is_draw)
    assert num_draws > 0


def test_label_noise_turns_the_stated_share_around_and_nothing_else() -> None:
    clean = rehearse(algorithm(), share_of_e, steps=1, prompts_per_step=512)
    noisy = rehearse(algorithm(), share_of_e, steps=1, prompts_per_step=512, settings={"oracle": {"flip_prob": 0.3}})
    turned = 0
    for before, after in zip(clean.journal.pairs, noisy.journal.pairs, strict=True):
        assert before["is_trainable"] == after["is_trainable"]
        if after.get("is_flipped"):
            turned += 1
            assert (after["chosen"], after["rejected"]) == (before["rejected"], before["chosen"])
            assert after["win_probability"] == pytest.approx(1 - before["win_probability"])
        else:
            assert after == before
    asked = sum(pair["chosen"] != pair["rejected"] for pair in clean.journal.pairs)
    assert turned / asked == pytest.approx(0.3, abs=0.07)


def test_flipped_labels_carry_flipped_margins() -> None:
    """A loss that learns from margins sees the noise too: every one turned around, it learns the opposite."""
    config = ALGORITHM_CONFIGS["rev_kl"]()
    right = rehearse(algorithm(config), share_of_e, steps=40)
    wrong = rehearse(algorithm(config), share_of_e, steps=40, settings={"oracle": {"flip_prob": 1.0}})
    assert right.journal.of("eval")[-1]["reward"] > right.journal.of("eval")[0]["reward"]
    assert wrong.journal.of("eval")[-1]["reward"] < wrong.journal.of("eval")[0]["reward"]


EXPLORE = {"num_candidates": 6, "members": 8, "hidden_size": 32, "gradient_steps": 20}


@pytest.mark.parametrize("rule", ["sea-bai", "sea-ee", "uncertainty", "passive"])
def test_exploration_chooses_among_candidates_and_the_head_learns(rule: str) -> None:
    run = rehearse(algorithm(DPO), share_of_e, steps=25, settings={"explore": {"rule": rule, **EXPLORE}})
    steps = run.journal.of("step")
    assert all(record["queries"] <= 32 * record["step"] for record in steps)
    # A verdict is the least certain where two responses are equally good: uncertainty comes to ask about ties alone.
    has_ties_alone = [record["trained_pairs"] == 0 for record in steps]
    assert any(has_ties_alone) == (rule == "uncertainty")
    assert has_ties_alone == ["head/accuracy" not in record for record in steps]
    accuracies = [record["head/accuracy"] for record in steps if "head/accuracy" in record]
    assert np.mean(accuracies[-5:]) > 0.7 and accuracies[0] < 0.75, "told before it learns from a comparison"
    assert steps[-1]["head/loss"] < steps[0]["head/loss"] - 0.1
    assert steps[-1]["head/pull"] == pytest.approx(0.5 * 128 / steps[-1]["queries"])
    assert ("encode 64" if rule == "passive" else "encode 192") in run.calls
    first, last = run.journal.of("eval")[0], run.journal.of("eval")[-1]
    assert last["win_rate"] > first["win_rate"] + 0.25
    again = rehearse(algorithm(DPO), share_of_e, steps=3, settings={"explore": {"rule": rule, **EXPLORE}})
    assert again.journal.pairs == [pair for pair in run.journal.pairs if pair["step"] <= 3]


def test_thompson_sampling_finds_better_responses_than_the_first_two() -> None:
    rewards = {}
    for rule in ("sea-ee", "passive"):
        settings = {"explore": {"rule": rule, "head_only": True, **EXPLORE}}
        run = rehearse(algorithm(DPO), share_of_e, steps=12, settings=settings)
        rewards[rule] = np.mean([record["reward"] for record in run.journal.of("step")[6:]])
    assert rewards["sea-ee"] > 1.5 * rewards["passive"] > 0


def test_where_only_the_head_learns_the_policy_stays_and_its_best_of_n_improves() -> None:
    settings = {
        "explore": {"rule": "sea-bai", "head_only": True, **EXPLORE},
        "eval": {"best_of_n": 8, "best_of_n_temperature": 1.0},
    }
    run = rehearse(algorithm(DPO), share_of_e, steps=12, settings=settings)
    assert torch.equal(run.policy.logits, BigramPolicy(0).logits)
    assert [record["trained_pairs"] for record in run.journal.of("step")] == [0] * 12
    assert not [call for call in run.calls if call.startswith("sync")], "the actors hold it already"
    held = {(record["policy_version"], record["staleness"]) for record in run.journal.of("step")}
    assert held == {(0, 0)}
    assert run.journal.notes == []
    first, last = run.journal.of("eval")[0], run.journal.of("eval")[-1]
    assert last["reward"] > first["reward"] + 0.3
    compared = [int(call.split()[1]) for call in run.calls if call.startswith("compare")]
    assert compared.count(26) == 3, "the best is the head's to pick, and the oracle judges only it"


def test_the_head_labels_its_own_pairs_after_the_burn_in_and_at_no_query() -> None:
    explore = {"rule": "sea-ee", "self_label_ratio": 0.5, "burn_in": 3, **EXPLORE}
    run = rehearse(algorithm(DPO), share_of_e, steps=8, settings={"explore": explore})
    steps, pairs = run.journal.of("step"), run.journal.pairs
    assert [round(record["self_labelled"], 1) for record in steps] == [0.0] * 3 + [0.5] * 5
    for step in range(1, 9):
        own = [pair for pair in pairs if pair["step"] == step and pair.get("is_self_labelled")]
        asked = steps[step - 1]["queries"] - (steps[step - 2]["queries"] if step > 1 else 0)
        others = [p for p in pairs if p["step"] == step and not p.get("is_self_labelled")]
        assert len(own) == (16 if step > 3 else 0)
        assert asked == sum(pair["chosen"] != pair["rejected"] for pair in others)
        assert all(pair["win_probability"] == 1 and not pair.get("is_flipped") for pair in own)
    right = [share_of_e("", p["chosen"]) >= share_of_e("", p["rejected"]) for p in pairs if p.get("is_self_labelled")]
    assert np.mean(right) > 0.85


def test_a_budget_of_queries_with_own_labels_is_spent_exactly_and_in_as_many_steps_as_planned() -> None:
    """24 letters long, answers differ: every query is one. 2 x 32 in the burn-in, then 16 a step, at last 7."""
    explore = {"rule": "sea-ee", "self_label_ratio": 0.5, "burn_in": 2, **EXPLORE}
    settings = {"explore": explore, "data": {"max_queries": 103}, "sampling": {"max_new_tokens": 24}}
    run = rehearse(algorithm(DPO), share_of_e, steps=20, settings=settings)
    assert [record["queries"] for record in run.journal.of("step")] == [32, 64, 80, 96, 103]
    assert [sum(pair["step"] == step for pair in run.journal.pairs) for step in (3, 5)] == [32, 14]


def test_active_preference_learning_asks_where_the_policy_is_unsure_about_what_it_tells_apart() -> None:
    explore = {"rule": "apl", "num_candidates": 5, "entropy_share": 0.5, "certainty_share": 0.75}
    run = rehearse(algorithm(SIMPO), share_of_e, steps=30, settings={"explore": explore})
    steps = run.journal.of("step")
    assert [record["queries"] for record in steps[:3]] == [12, 24, 36], "three quarters of a half of 32"
    assert run.journal.of("eval")[-1]["win_rate"] > run.journal.of("eval")[0]["win_rate"] + 0.25
    assert not any("head/loss" in record for record in steps)
    # Before the first update nothing is told apart, and the first two candidates meet.
    everything = {"rule": "apl", "num_candidates": 2, "entropy_share": 1.0, "certainty_share": 1.0}
    plain, active = (
        rehearse(algorithm(DPO), share_of_e, steps=4, settings={"explore": options} if options else {})
        for options in ({}, everything)
    )
    assert active.journal.pairs == plain.journal.pairs


def test_active_preference_learning_spends_what_is_left_of_its_budget_in_one_step() -> None:
    explore = {"rule": "apl", "num_candidates": 4, "entropy_share": 0.5, "certainty_share": 0.5}
    settings = {"explore": explore, "data": {"max_queries": 21}}
    run = rehearse(algorithm(SIMPO), share_of_e, steps=10, settings=settings)
    assert [sum(pair["step"] == step for pair in run.journal.pairs) for step in (1, 2, 3, 4)] == [8, 8, 5, 0]
    assert run.journal.of("step")[-1]["queries"] == 21


def test_active_preference_learning_picks_the_pair_of_the_largest_implicit_margin() -> None:
    explore = {"rule": "apl", "num_candidates": 4, "entropy_share": 1.0, "certainty_share": 1.0}
    kept, passive = (
        rehearse(algorithm(DPO), share_of_e, steps=10, settings={"explore": options})
        for options in (explore, {"rule": "passive", "num_candidates": 4})
    )
    margins = [[abs(r["margin"]) for r in run.journal.of("step")[4:]] for run in (kept, passive)]
    assert np.mean(margins[0]) > 1.3 * np.mean(margins[1])


def test_the_head_stops_learning_after_its_budget() -> None:
    explore = {"rule": "passive", "learn_until": 70, **EXPLORE}
    run = rehearse(algorithm(DPO), share_of_e, steps=4, settings={"explore": explore})
    assert ["head/loss" in record for record in run.journal.of("step")] == [True, True, False, False]


def test_dropped_prompts_are_not_asked_about() -> None:
    config = CustomAlgorithmConfig(name=f"{EXAMPLE}:FarApart", options={"min_gap": 0.12})
    run = rehearse(algorithm(config), share_of_e, steps=3)
    queries = [record["queries"] for record in run.journal.of("step")]
    assert 0 < queries[0] < 32
    assert len(run.journal.pairs) == queries[-1]


def test_the_reference_of_dpo_is_the_initial_policy() -> None:
    run = rehearse(algorithm(DPO), share_of_e, steps=10)
    kl = [record["kl"] for record in run.journal.of("step")]
    assert abs(kl[0]) < 1e-6
    assert kl[-1] > 0.01


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (f"{EXAMPLE}:Nothing", {}, "has no Nothing"),
        (f"{EXAMPLE}:FarApartOptions", {}, "is not an Algorithm"),
        (f"{EXAMPLE}:FarApart", {"margn": 1}, "did you mean algorithm.options.margin"),
        (f"{EXAMPLE}:FarApart", {"margin": "wide"}, "margin"),
        ("nowhere.py:FarApart", {}, "does not exist"),
    ],
)
def test_a_users_algorithm_that_cannot_be_used_is_one_line(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_algorithm(CustomAlgorithmConfig(name=name, options=options))
    assert "\n" not in str(caught.value)


def _without_perf(records: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in record.items() if key != "perf"} for record in records]
