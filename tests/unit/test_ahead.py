"""Sampling ahead of the learner: order, bounds, and what is raised where."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oatlite.algorithms import build_algorithm
from oatlite.config.algorithms import SimPOConfig
from oatlite.config.schema import Config
from oatlite.errors import DeadlineExceeded, OracleError
from oatlite.layouts import TokenPair
from oatlite.testing import BigramPolicy, InMemoryTrainer, Rehearsal, rehearse
from oatlite.workers.ahead import Ahead, Unseen
from oatlite.workers.buffer import TrainingPair
from oatlite.workers.experience import Rollouts
from oatlite.workers.update import Layout, Updater, UpdateStats

SOON_S = 20.0
PER_STEP = 4


class GatedExperience:
    """Stands in for the sampling half: a step begins, and ends when its gate is open. ``queries`` is what it spends."""

    def __init__(self, queries: int = PER_STEP) -> None:
        self.version = 0
        self.began: list[tuple[int, int, int]] = []
        """Step, version and queries before, in order."""
        self._queries = queries
        self._changed = threading.Condition()
        self._open: set[int] = set()
        self._failing: dict[int, Exception] = {}

    def open(self, *steps: int) -> None:
        with self._changed:
            self._open |= set(steps)
            self._changed.notify_all()

    def fail(self, step: int, error: Exception) -> None:
        self._failing[step] = error
        self.open(step)

    def wait_until_began(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(step == began for began, _, _ in self.began), SOON_S), self.began

    def collect(self, step: int, num_queries: int) -> Rollouts:
        with self._changed:
            self.began.append((step, self.version, num_queries))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: step in self._open, SOON_S), f"nobody opens {step}"
        if step in self._failing:
            raise self._failing[step]
        return Rollouts(policy_version=self.version, epoch=0, pairs=[], means={}, num_queries=self._queries)


def ahead_of(
    experience: GatedExperience, num_steps: int = 10, *, max_queries: int | None = None, **rollout: Any
) -> Ahead:
    config = Config.model_validate(
        {
            "rollout": {"asynchronous": True, "prompts_per_step": PER_STEP, **rollout},
            "data": {"max_queries": max_queries},
        }
    )
    return Ahead(config, experience, num_steps, 1)


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_collection_that_hangs_by_itself_has_an_end_and_one_that_waits_for_an_actor_has_its_own(
    is_waiting: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    class Collects(GatedExperience):
        def collect(self, step: int, num_queries: int) -> Rollouts:
            with shows.doing("generate"):
                if is_waiting:
                    return super().collect(step, num_queries)
            return super().collect(step, num_queries)

    shows, experience = Unseen(), Collects()
    config = Config.model_validate({"rollout": {"asynchronous": True}, "timeouts": {"learn_s": 0.5}})
    ahead = Ahead(config, experience, 10, 1, shows.alone_s)
    ahead.go_on(0, 0)
    if is_waiting:
        threading.Timer(2.5, experience.open, [1]).start()
        assert ahead.take().policy_version == 0
    else:
        with pytest.raises(DeadlineExceeded, match="step 1 did nothing but choose pairs"):
            ahead.take()
        assert "in collect" in capfd.readouterr().err
    experience.open(1, 2)


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_the_next_step_is_sampled_while_the_learner_is_at_work_and_no_more() -> None:
    experience = GatedExperience()
    experience.open(1, 3)
    ahead = ahead_of(experience)
    ahead.go_on(0, 0)
    assert ahead.take().policy_version == 0
    experience.wait_until_began(2)  # which nobody has asked for yet
    experience.open(2)
    ahead.pause()
    assert [step for step, _, _ in experience.began] == [1, 2], "step 3 would be two versions behind"
    experience.version = 1
    ahead.go_on(1, PER_STEP)
    ahead.take()
    experience.wait_until_began(3)
    assert experience.began == [(1, 0, 0), (2, 0, PER_STEP), (3, 1, 2 * PER_STEP)]


def test_a_pause_waits_for_the_batch_under_way_and_begins_none() -> None:
    experience = GatedExperience()
    experience.open(1)
    ahead = ahead_of(experience, max_staleness=3)
    ahead.go_on(0, 0)
    ahead.take()
    experience.wait_until_began(2)
    pausing = in_background(ahead.pause)
    pausing.join(0.2)
    assert pausing.is_alive()
    experience.open(2, 3, 4)
    pausing.join(SOON_S)
    assert not pausing.is_alive() and [step for step, _, _ in experience.began] == [1, 2]
    experience.version = 1
    ahead.go_on(1, PER_STEP)
    assert [ahead.take().policy_version for _ in range(2)] == [0, 1], "step 3 is as fresh as can be"


def test_strictly_each_step_is_as_stale_as_it_may_be() -> None:
    experience = GatedExperience()
    experience.open(*range(1, 9))
    ahead = ahead_of(experience, 8, max_staleness=2, strict_staleness=True)
    for step in range(1, 9):
        ahead.go_on(step - 1, 0)
        ahead.take()
        ahead.pause()
        experience.version = step
    assert [version for _, version, _ in experience.began] == [0, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("max_staleness", [1, 2, 5])
def test_staleness_never_exceeds_its_bound(max_staleness: int) -> None:
    experience = GatedExperience()
    experience.open(*range(1, 301))
    ahead = ahead_of(experience, 300, max_staleness=max_staleness)
    for step in range(1, 301):
        ahead.go_on(step - 1, 0)
        ahead.take()
        ahead.pause()
        experience.version = step
    assert [step for step, _, _ in experience.began] == list(range(1, 301))
    assert all(0 <= step - 1 - version <= max_staleness for step, version, _ in experience.began)


def test_what_a_collection_raises_is_raised_where_somebody_waits() -> None:
    experience = GatedExperience()
    experience.open(1)
    experience.fail(2, OracleError("the oracle is silent", "start it"))
    ahead = ahead_of(experience)
    ahead.go_on(0, 0)
    ahead.take()
    for call in (ahead.pause, ahead.take, ahead.pause):
        with pytest.raises(OracleError, match="silent"):
            call()


def test_what_is_there_is_taken_before_the_error_after_it_is_raised() -> None:
    experience = GatedExperience()
    experience.open(1)
    experience.fail(2, OracleError("the oracle is silent", "start it"))
    ahead = ahead_of(experience)
    ahead.go_on(0, 0)
    experience.wait_until_began(2)
    with pytest.raises(OracleError, match="silent"):
        ahead.pause()
    assert ahead.take().policy_version == 0


def test_a_step_that_would_not_have_its_whole_budget_waits_for_what_is_left() -> None:
    """Ten queries, four a step at most, and three are asked: so a third step would get 2, or, as is known later, 4."""
    experience = GatedExperience(queries=3)
    experience.open(1, 2, 3, 4)
    ahead = ahead_of(experience, max_queries=10, max_staleness=3)
    ahead.go_on(0, 0)
    ahead.take()
    ahead.take()
    assert [step for step, _, _ in experience.began] == [1, 2]
    ahead.pause()
    ahead.go_on(2, 6)
    ahead.take()
    assert experience.began[2] == (3, 0, 6)
    ahead.pause()
    ahead.go_on(3, 9)
    ahead.take()
    assert experience.began[3] == (4, 0, 9)


def test_giving_up_counts_what_was_spent_on_what_nobody_trains_on() -> None:
    experience = GatedExperience(queries=3)
    experience.open(1, 2, 3)
    ahead = ahead_of(experience, max_staleness=2)
    ahead.go_on(0, 0)
    ahead.take()
    experience.wait_until_began(3)
    assert ahead.give_up() == 6


# ---------------------------------------------------------------------- the loop over the stand-ins


def many_es(prompt: str, response: str) -> float:
    return 4.0 * response.count("e") / 8


def rehearsed(**rollout: Any) -> Rehearsal:
    learner = rollout.pop("learner", {})
    settings = {"rollout": {"asynchronous": True, **rollout}, "learner": learner}
    return rehearse(build_algorithm(SimPOConfig()), many_es, steps=40, settings=settings)


def without_perf(run: Rehearsal) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "perf"} for record in run.journal.records]


def test_an_asynchronous_run_learns_as_well() -> None:
    run = rehearsed()
    first, last = run.journal.of("eval")[0], run.journal.of("eval")[-1]
    assert last["win_rate"] > first["win_rate"] + 0.25
    steps = run.journal.of("step")
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert max(record["staleness"] for record in steps) <= 1
    assert {record["policy_version"] for record in run.journal.pairs} == {record["policy_version"] for record in steps}


def test_a_strict_run_repeats_itself_and_says_how_stale_it_is() -> None:
    one, same = (rehearsed(strict_staleness=True, max_staleness=2) for _ in range(2))
    assert without_perf(one) == without_perf(same)
    assert [record["staleness"] for record in one.journal.of("step")] == [0, 1, *[2] * 38]
    assert all("mismatch_mean" not in record for record in one.journal.of("step")[1:]), "of other weights"
    assert all("mismatch_mean" in record for record in one.journal.of("step")[:1])


def test_the_policy_drifts_from_an_older_one_that_sampled() -> None:
    drifts = [
        [record["drift"] for record in rehearsed(strict_staleness=True, max_staleness=most).journal.of("step")]
        for most in (1, 10)
    ]
    assert drifts[0][0] == pytest.approx(0, abs=1e-4), "none has gone by"
    assert np.mean(drifts[1][10:]) > 5 * abs(np.mean(drifts[0][10:])), "an estimate of a KL divergence"


@pytest.mark.parametrize(
    ("ahead_by", "samplers", "weight"),
    [
        (0.25, ("policy", "policy"), np.exp(-3 * 0.25)),
        (-0.25, ("policy", "policy"), np.exp(3 * 0.25)),
        (-0.5, ("policy", "policy"), 3.0),
        (-0.25, ("policy", "reference"), np.exp(2 * 0.25)),
        (0.25, ("reference", "policy"), np.exp(-1 * 0.25)),
        (-0.5, ("reference", "mixture-plus"), 1.0),
    ],
)
def test_a_pair_counts_by_how_likely_its_own_samples_are_now(
    ahead_by: float, samplers: tuple[str, str], weight: float
) -> None:
    """The sampler's log-probability of each of three tokens, two of them chosen, is ``ahead_by`` more than the
    learner's."""
    tokens = [np.array(ids, np.int32) for ids in ([1], [2, 0], [0])]
    policy = BigramPolicy(0)
    exact = policy.logits.detach().log_softmax(-1)
    pair = TrainingPair(
        tokens=TokenPair(prompt=tokens[0], chosen=tokens[1], rejected=tokens[2]),
        sampler_logprobs=np.array([exact[1, 2], exact[2, 0], exact[1, 0]], np.float32) + np.float32(ahead_by),
        is_trainable=True,
        samplers=samplers,
    )

    def learned(**learner: Any) -> UpdateStats:
        both = {"batch_size": 8, "buffer_size": 8, "micro_batch_size": 8, **learner}
        config = Config.model_validate({"learner": both, "rollout": {"prompts_per_step": 8}})
        trainer = InMemoryTrainer(BigramPolicy(0), 0.1, keeps_behaviour=False)
        layout = Layout(name="shared", pad_token_id=0, device=torch.device("cpu"))
        return Updater(config, trainer, build_algorithm(SimPOConfig()), None, layout).learn([pair] * 8, 1)

    plain, weighted = learned(), learned(importance_cap=3.0)
    assert weighted.loss.value == pytest.approx(weight * plain.loss.value, rel=1e-5)
    assert weighted.grad_norm.value == pytest.approx(weight * plain.grad_norm.value, rel=1e-5)
    assert weighted.importance.value == pytest.approx(weight, rel=1e-5)
    assert weighted.importance_capped.value == (weight == 3.0)
    assert plain.importance.value is None
