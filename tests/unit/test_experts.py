"""Mixtures of experts: the routers' balance, and what its weight in the loss does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_folders import VOCAB_SIZE, config_of
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from oatlite.algorithms import build_algorithm
from oatlite.config.algorithms import SimPOConfig
from oatlite.config.schema import Config
from oatlite.layouts import TokenPair, lay_out
from oatlite.maths.balance import load_balancing_loss
from oatlite.models import PairModel
from oatlite.trainer import StepResult
from oatlite.workers.buffer import TrainingPair
from oatlite.workers.update import Layout, Updater, UpdateStats

CPU = torch.device("cpu")


def network() -> PairModel:
    torch.manual_seed(0)
    return PairModel(AutoModelForCausalLM.from_config(config_of("moe")))


def pairs(num: int) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    parts = [[rng.integers(3, VOCAB_SIZE, n).astype(np.int32) for n in rng.integers(2, 9, 3)] for _ in range(num)]
    return [TokenPair(prompt=a, chosen=b, rejected=c) for a, b, c in parts]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_is_that_of_transformers(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(12, 5, generator=generator) for _ in range(3)]
    is_token = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    expected = load_balancing_loss_func(tuple(logits), 5, top_k, is_token.long())
    assert float(load_balancing_loss(logits, top_k, is_token)) == pytest.approx(float(expected), rel=1e-6)


def test_it_is_least_where_the_routers_are_indifferent() -> None:
    is_token = torch.ones(1, 1000, dtype=torch.bool)
    spread = torch.eye(4).repeat(250, 1) * 20
    assert float(load_balancing_loss([spread], 1, is_token)) == pytest.approx(1.0)
    assert float(load_balancing_loss([spread.cumsum(0) * 0 + spread[0]], 1, is_token)) == pytest.approx(4.0)


def test_the_forward_gives_both_and_padding_does_not_count() -> None:
    model = network()
    short, long = pairs(6)[0], max(pairs(6), key=lambda pair: pair.num_tokens)
    plain = model(lay_out([short, long], "shared", 2, CPU))
    logprobs, balance = model(lay_out([short, long], "shared", 2, CPU, wants_balance=True))
    assert torch.equal(plain, logprobs)
    # Counted by hand: each pair alone in its row, without padding, and the tokens of both together.
    alone = [
        model.model.base_model(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            output_router_logits=True,
            use_cache=False,
        ).router_logits
        for rows in (lay_out([pair], "shared", 2, CPU) for pair in (short, long))
    ]
    layers = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    everything = torch.ones(1, len(layers[0]), dtype=torch.bool)
    assert balance.item() == pytest.approx(load_balancing_loss(layers, 2, everything).item(), rel=1e-5)


class PlainTrainer:
    """One rank and plain gradient descent."""

    def __init__(self, model: PairModel, lr: float) -> None:
        self._model = model
        self._optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def forward(self, batch: object) -> object:
        return self._model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> StepResult:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(lr=0.0, grad_norm=0.0)

    def add_up(self, values: list[float]) -> list[float]:
        return values

    def maximum(self, value: float) -> float:
        return value

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]


def learn(coefficient: float, micro_batch_size: int = 8, steps: int = 1) -> list[UpdateStats]:
    config = Config.model_validate(
        {
            "rollout": {"prompts_per_step": 8},
            "learner": {
                "batch_size": 8,
                "buffer_size": 8,
                "micro_batch_size": micro_batch_size,
                "aux_loss_coef": coefficient,
            },
        }
    )
    layout = Layout(name="shared", pad_token_id=2, device=CPU)
    updater = Updater(config, PlainTrainer(network(), 3e-3), build_algorithm(SimPOConfig()), None, layout)
    judged = [TrainingPair(tokens=pair, sampler_logprobs=None, is_trainable=True) for pair in pairs(8)]
    return [updater.learn(judged, step) for step in range(1, steps + 1)]


def test_the_balance_counts_in_the_loss_by_its_weight() -> None:
    (without,), (weighted,) = learn(0.0), learn(0.5)
    assert without.balance.count == 0
    assert weighted.balance.value is not None and weighted.balance.value > 2.0
    assert weighted.loss.value == pytest.approx(without.loss.value + 0.5 * weighted.balance.value, rel=1e-5)
    (cut,) = learn(0.5, micro_batch_size=2)
    assert cut.balance.count == 8, "each pair once, however they are cut into micro-batches"


def test_a_weight_on_the_balance_evens_the_routers_out() -> None:
    first, *_, last = learn(1.0, steps=40)
    *_, unweighted = learn(1e-9, steps=40)
    assert last.balance.value < first.balance.value
    assert last.balance.value < unweighted.balance.value
