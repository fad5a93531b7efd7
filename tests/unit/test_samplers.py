"""Where responses come from: plans, mixtures, what is refused, and the loop over the stand-ins of oatlite.testing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oatlite.algorithms import build_algorithm
from oatlite.config.algorithms import DPOConfig, SimPOConfig, XPOConfig
from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config
from oatlite.engine import Engine, EngineOptions, State
from oatlite.engine.mixing import REFERENCE_CACHE_BYTES, waves
from oatlite.engine.swap import SwappedWeights
from oatlite.errors import ConfigError
from oatlite.layouts import TokenPair
from oatlite.lora import AdapterOptions
from oatlite.maths.samplers import mixed_logprobs
from oatlite.samplers import PLANS, SAMPLERS, coefficients, sampling_plan
from oatlite.sampling import SamplingOptions
from oatlite.testing import (
    LETTERS,
    BigramPolicy,
    FunctionOracle,
    InMemoryActors,
    Rehearsal,
    letter_prompts,
    rehearse,
)
from oatlite.workers.buffer import PairBuffer, TrainingPair
from oatlite.workers.contracts import Share
from oatlite.workers.experience import Experience, policys_alone
from oatlite.workers.saving import pack, unpack

NUM_COUNTED = 4000


def share_of_e(prompt: str, response: str) -> float:
    return 4.0 * response.count("e") / 8


# Plans


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_two_samplers_that_there_are(name: str) -> None:
    assert set(PLANS[name]) <= set(SAMPLERS)
    assert sampling_plan(build_algorithm(DPOConfig()), name) == PLANS[name]


def test_an_algorithm_with_a_plan_of_its_own_keeps_it() -> None:
    xpo = build_algorithm(XPOConfig())
    assert sampling_plan(xpo, "policy") == ("policy", "reference")
    with pytest.raises(ConfigError, match="--sampler mixture, and XPO says itself"):
        sampling_plan(xpo, "mixture")


def test_a_sampler_that_there_is_none_of_is_refused() -> None:
    class Odd(type(build_algorithm(SimPOConfig()))):  # type: ignore[misc]
        def sampling_plan(self) -> Sequence[str]:
            return ("policy", "oracle")

    with pytest.raises(ConfigError, match=r"Odd.sampling_plan names the sampler 'oracle'; name some of policy, ref"):
        sampling_plan(Odd(SimPOConfig()), "policy")


OWN = {"model.path": "hub/policy", "data.prompts": "hub/prompts", "oracle.path": "hub/oracle", "placement.gpus": 0}
OFFLINE = {"model.path": "hub/policy", "data.preferences": "hub/pairs", "rollout.offline": True, "placement.gpus": 0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (OWN | {"algorithm.name": "xpo", "rollout.sampler": "mixture"}, "--sampler mixture, and --algo xpo says"),
        (OFFLINE | {"algorithm.name": "xpo"}, "type --algo dpo, or leave out --offline"),
        (OFFLINE | {"rollout.sampler": "hybrid"}, "--sampler is for rollouts, and --offline has none"),
        (OWN | {"rollout.sampler": "ref"}, "'policy', 'reference', 'hybrid' or 'mixture'"),
        (
            OWN | {"rollout.sampler": "hybrid", "model.reference": "hub/other", "lora.rank": 4, "lora.sync": "adapter"},
            "type --set lora.sync=merged",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(
    flags: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(flags=flags, num_gpus=0), 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapters_base_and_its_mixtures_can_be_sampled_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = {"lora.rank": 4, "lora.sync": "adapter"}
    for more in ({"rollout.sampler": "hybrid"}, {"rollout.sampler": "mixture", "model.reference": "hub/other"}):
        config = resolve(load_config(flags=OWN | adapter | more, num_gpus=0), 0)
        assert config.rollout.sampler == more["rollout.sampler"]


@pytest.mark.parametrize(("share", "words"), [(-0.1, "at least 0"), (1.0, "less than 1"), ("half", "a number")])
def test_a_share_is_at_least_zero_and_below_one(share: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.policy_share = .* must be {words}[^\n]*$"):
        load_config(flags=OWN | {"rollout.sampler": "mixture", "rollout.policy_share": share}, num_gpus=0)


# Distributions


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.1])
def test_mixtures_are_products_of_powers(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64).softmax(-1)
    powers = {
        "policy": policy,
        "reference": reference,
        "mixture-plus": policy ** (1 + weight) / reference**weight,
        "mixture-minus": policy ** (1 - weight) * reference**weight,
    }
    for name, expected in powers.items():
        shares = torch.tensor(coefficients(name, weight), dtype=torch.float64)
        # a shift of the logits is no matter
        found = mixed_logprobs(policy.log() + 3, reference.log() - 5, shares)
        torch.testing.assert_close(found.exp(), expected / expected.sum(), rtol=1e-12, atol=1e-12)


def test_rows_have_their_own_coefficients_and_half_precision_is_computed_in_float32() -> None:
    policy, reference = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.5, -0.5]])
    found = mixed_logprobs(policy, reference, shares)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], policy[0].float().log_softmax(-1))
    torch.testing.assert_close(found[1], reference[1].float().log_softmax(-1))
    torch.testing.assert_close(found[2], (1.5 * policy[2].float() - 0.5 * reference[2].float()).log_softmax(-1))


def test_the_stand_ins_sample_from_what_they_say() -> None:
    initial, policy = BigramPolicy(0), BigramPolicy(0)
    with torch.no_grad():
        policy.logits += 0.6 * torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(2))
    actors = InMemoryActors(FunctionOracle(share_of_e), initial, mixture_weight=0.5)

    def sample(count: int) -> list[list[Any]]:
        seeds = np.arange(count * len(SAMPLERS), dtype=np.uint64).reshape(count, -1)
        options = SamplingOptions(temperature=0.7, max_new_tokens=1)
        return actors.generate([np.array([5], np.int32)] * count, seeds, [SAMPLERS] * count, options)[0]

    @contextmanager
    def source(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: policy.get_parameter(name).data

    before = sample(50)
    actors.sync(1, source)
    after = sample(NUM_COUNTED)
    assert [row[1].tokens.tolist() for row in before] == [row[1].tokens.tolist() for row in after[:50]]
    assert [row[0].tokens.tolist() for row in before] != [row[0].tokens.tolist() for row in after[:50]]
    pi, ref = (model.logits[5].detach().double().log_softmax(-1) for model in (policy, initial))
    for n, name in enumerate(SAMPLERS):
        a, b = coefficients(name, 0.5)
        logprobs = (a * pi + b * ref).log_softmax(-1)
        mean = NUM_COUNTED * (logprobs / 0.7).softmax(-1).numpy()
        counts = np.bincount([row[n].tokens[0] for row in after], minlength=len(LETTERS))
        assert mean.min() > 3
        statistic, freedom = float(((counts - mean) ** 2 / mean).sum()), len(LETTERS) - 1
        assert (statistic - freedom) / np.sqrt(2 * freedom) < 4
        for row in after[:20]:
            assert row[n].logprobs[0] == pytest.approx(float(logprobs[row[n].tokens[0]]), abs=1e-5)


# The loop


class Quiet:
    def doing(self, stage: str, detail: str = "") -> AbstractContextManager[None]:
        return nullcontext()


def rehearsed(sampler: str, rollout: dict[str, Any] | None = None, **more: Any) -> Rehearsal:
    settings = {"rollout": {"sampler": sampler} | (rollout or {})}
    return rehearse(build_algorithm(DPOConfig(beta=1.0)), share_of_e, settings=settings, **more)


@pytest.mark.parametrize("sampler", ["reference", "hybrid", "mixture"])
def test_a_run_learns_whatever_it_samples_from(sampler: str) -> None:
    run = rehearsed(sampler, steps=40)
    first, last = run.journal.of("eval")[0], run.journal.of("eval")[-1]
    assert last["win_rate"] > first["win_rate"] + 0.2
    assert {tuple(sorted(row["samplers"])) for row in run.journal.pairs} == {tuple(sorted(PLANS[sampler]))}


def test_only_what_the_policy_sampled_says_how_well_sampler_and_learner_agree() -> None:
    assert all("mismatch_mean" not in record for record in rehearsed("reference", steps=3).journal.of("step"))
    assert all("mismatch_mean" not in record for record in rehearsed("mixture", steps=3).journal.of("step"))
    records = rehearsed("hybrid", steps=6).journal.of("step")
    assert abs(records[-1]["kl"]) > 1e-3, "the policy has not moved, and all samplers are the same"
    assert all(record["mismatch_max"] < 1e-5 for record in records)


def test_a_share_of_prompts_is_drawn_once_and_for_all() -> None:
    drawn = policys_alone(1, 0, range(10_000), 0.3)
    assert abs(drawn.sum() - 3000) < 4 * np.sqrt(10_000 * 0.3 * 0.7)
    assert policys_alone(1, 0, range(4000, 5000), 0.3).tolist() == drawn[4000:5000].tolist(), "by prompt"
    assert (policys_alone(1, 0, range(10_000), 0.5) >= drawn).all(), "a larger share takes others beside them"
    for other in (policys_alone(1, 1, range(10_000), 0.3), policys_alone(2, 0, range(10_000), 0.3)):
        both = int((other & drawn).sum())
        assert abs(both - 900) < 4 * np.sqrt(10_000 * 0.09 * 0.91), "independent of the other epoch or seed"
    assert not policys_alone(1, 0, range(10_000), 0.0).any()


@pytest.mark.parametrize("sampler", ["reference", "hybrid", "mixture"])
def test_a_share_of_prompts_is_the_policys_alone_and_the_others_are_as_without_it(sampler: str) -> None:
    run = rehearsed(sampler, {"policy_share": 0.3}, steps=8)
    without = rehearsed(sampler, steps=1).journal.pairs
    alone = {("policy", "policy"): True, tuple(sorted(PLANS[sampler])): False}
    is_alone = [alone[tuple(sorted(row["samplers"]))] for row in run.journal.pairs]
    for record in run.journal.of("step"):
        of_step = [is_alone[i] for i, row in enumerate(run.journal.pairs) if row["step"] == record["step"]]
        assert record["policy_share"] == pytest.approx(sum(of_step) / 32)
        assert record["mismatch_max"] < 1e-5, "which the policy's responses alone can show"
    assert 0.2 < np.mean(is_alone) < 0.4
    others = [i for i, row in enumerate(run.journal.pairs) if row["step"] == 1 and not is_alone[i]]
    assert [run.journal.pairs[i] for i in others] == [without[i] for i in others]
    assert all("policy_share" not in record for record in rehearsed(sampler, steps=1).journal.of("step"))


def test_the_policys_share_is_not_read_where_all_are_the_policys() -> None:
    (record,) = rehearsed("policy", {"policy_share": 0.3}, steps=1).journal.of("step")
    assert "policy_share" not in record


def test_the_same_prompts_are_the_policys_alone_on_any_number_of_ranks_and_after_a_restart() -> None:
    rollout = {"sampler": "mixture", "policy_share": 0.3, "prompts_per_step": 32}
    config = Config.model_validate({"rollout": rollout, "sampling": {"max_new_tokens": 8}})

    def collected(step: int, rank: int, count: int) -> list[dict[str, Any]]:
        """By a rank that has collected nothing before."""
        actors = InMemoryActors(FunctionOracle(share_of_e), BigramPolicy(0))
        parts = config, Share(rank=rank, count=count), letter_prompts(64), build_algorithm(DPOConfig())
        return Experience(*parts, actors, Quiet(), None).collect(step, 0).rows

    for step in (1, 4):  # the second one is in the second epoch
        assert len({tuple(sorted(row["samplers"])) for row in collected(step, 0, 1)}) == 2
        assert collected(step, 0, 1) == collected(step, 0, 2) + collected(step, 1, 2)


def test_the_loss_is_told_which_response_is_the_references() -> None:
    told: list[tuple[list[bool], list[bool]]] = []

    class Listens(type(build_algorithm(XPOConfig()))):  # type: ignore[misc]
        def loss(self, policy: Any, reference: Any, batch: Any) -> Any:
            told.append((batch.chosen_is_reference.tolist(), batch.rejected_is_reference.tolist()))
            return super().loss(policy, reference, batch)

    run = rehearse(Listens(XPOConfig()), share_of_e, steps=1)
    chosen, rejected = told[0]
    assert [not one for one in chosen] == rejected
    of_rows = [row["samplers"][0] == "reference" for row in run.journal.pairs if row["is_trainable"]]
    assert sorted(chosen) == sorted(of_rows)
    assert 0 < sum(chosen) < len(chosen)


def test_xpo_with_more_optimism_leaves_what_the_reference_samples() -> None:
    def likelihood(alpha: float) -> float:
        policy = rehearse(build_algorithm(XPOConfig(alpha=alpha)), lambda p, r: 0.1 * len(r), steps=20).policy
        start = BigramPolicy(0).logits.softmax(-1)
        return float((start.detach() * policy.logits.detach().log_softmax(-1)).sum(-1).mean())

    assert likelihood(0.5) < likelihood(0.0) - 0.05


def test_samplers_survive_a_checkpoint(tmp_path: Path) -> None:
    ids = np.array([1, 2], np.int32)
    samplers = [("policy", "reference"), ("mixture-minus", "mixture-plus"), ("policy", "policy")]
    buffer = PairBuffer(1)
    buffer.add(
        [
            TrainingPair(
                tokens=TokenPair(prompt=ids, chosen=ids, rejected=ids),
                sampler_logprobs=np.zeros(4, np.float32),
                is_trainable=True,
                samplers=pair,
            )
            for pair in samplers
        ],
        1,
    )
    (tmp_path / "pairs").write_bytes(pack(buffer))
    _, entries = unpack(tmp_path / "pairs")
    assert [entry.pair.samplers for entry in entries] == samplers


# The engine, as far as it goes without vLLM


class _Model(torch.nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))


class LoadsNothing(Engine):
    """An engine that notes which weights it is given, and can be told to fail."""

    def __init__(self, samplers: frozenset[str], fails_at: int | None = None) -> None:
        self._options = EngineOptions(
            path="policy",
            dtype="float32",
            max_model_len=64,
            seed=0,
            device="cpu",
            gpu_memory_utilization=0.3,
            kv_cache_gib=1.0,
            threads=1,
            samplers=samplers,
            reference="reference",
        )
        self.state = State.READY
        self.given: list[float] = []
        self._fails_at = fails_at
        self._swapped = SwappedWeights("policy", "reference", self._load_beside, is_pinned=False)
        self._swapped.share_reference(_Model(-1.0))

    @property
    def _here(self) -> LoadsNothing:
        return self

    def begin_load(self) -> None:
        self.state = State.LOADING

    def take(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.given.append(float(tensors[0][1]))
        if len(self.given) == self._fails_at:
            raise RuntimeError("out of memory")

    def finish_load(self) -> None:
        self.state = State.READY


SWAPS = frozenset({"policy", "reference"})
ONE_TOKEN = SamplingOptions(temperature=1.0, max_new_tokens=1)


def test_the_reference_is_loaded_in_the_policys_place_and_the_newest_policy_back() -> None:
    engine = LoadsNothing(SWAPS)
    for version in (1.0, 2.0):
        arrived = torch.tensor(version)
        engine._swapped.keep([("weight", arrived)])
        arrived.zero_()  # the buffer that it came in is filled anew
        with engine._as_reference():
            assert engine.given[-1] == -1
        assert engine.given[-1] == version and engine.state is State.READY
    assert len(engine.given) == 4


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_swap_that_fails_taints_the_engine(fails_at: int) -> None:
    engine = LoadsNothing(SWAPS, fails_at=fails_at)
    engine._swapped.keep([("weight", torch.tensor(1.0))])
    with pytest.raises(RuntimeError, match="out of memory"), engine._as_reference():
        pass
    assert engine.state is State.TAINTED
    prompt = [np.array([1], np.int32)]
    with pytest.raises(RuntimeError, match="cannot generate while it is tainted"):
        engine.generate(prompt, [0], ONE_TOKEN)


def test_before_the_first_sync_the_policy_is_what_lies_at_its_path() -> None:
    loaded: list[str] = []

    def load(path: str) -> _Model:
        loaded.append(path)
        return _Model({"policy": 1.0, "reference": -1.0}[path])

    one, same = (SwappedWeights(path, "reference", load, is_pinned=False) for path in ("policy", "reference"))
    assert float(one.policy()["weight"]) == 1 and float(one.reference()["weight"]) == -1
    assert float(same.policy()["weight"]) == -1 == float(same.reference()["weight"])
    one.reference()
    assert loaded == ["policy", "reference", "reference"], "the reference once each, and where it is the policy no more"


def test_an_engine_that_fails_while_it_is_the_reference_is_tainted() -> None:
    engine = LoadsNothing(SWAPS)
    engine._swapped.keep([("weight", torch.tensor(1.0))])
    with pytest.raises(KeyError), engine._as_reference():
        raise KeyError
    assert engine.state is State.TAINTED and engine.given == [-1]


def test_a_sampler_that_the_engine_was_not_started_for_is_refused() -> None:
    prompt = [np.array([1], np.int32)]
    with pytest.raises(RuntimeError, match="not started for the sampler mixture-plus"):
        LoadsNothing(SWAPS).generate(prompt, [0], ONE_TOKEN, samplers=["mixture-plus"])


def test_mixtures_go_in_waves_that_fit_the_references_cache() -> None:
    indices = list(range(10, 20))
    is_mixed = [True, False, True, True, False, True, True, True, True, False]
    third, more = REFERENCE_CACHE_BYTES // 3, 2 * REFERENCE_CACHE_BYTES
    assert list(waves(indices, is_mixed, third)) == [[10, 11, 12, 13, 14], [15, 16, 17], [18, 19]]
    assert list(waves(indices, is_mixed, more)) == [[10, 11], [12], [13, 14], [15], [16], [17], [18, 19]]
    assert list(waves(indices, [False] * 10, more)) == [indices]
    assert list(waves([], [], more)) == []


def test_an_engine_with_an_adapter_has_its_base_as_reference_alone() -> None:
    options = LoadsNothing(SWAPS)._options
    assert options.swaps and not options.mixes
    with_adapter = dataclasses.replace(options, adapter=AdapterOptions(rank=4, alpha=8))
    assert not with_adapter.swaps
    with pytest.raises(ConfigError, match="samples from no other reference than its base policy"):
        Engine(with_adapter)
