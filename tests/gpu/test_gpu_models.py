"""The forward pass over pairs on a GPU: layouts agree, gradients too, and log-probabilities in chunks spare memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from gpu_rows.scale import PAD, Scale

if TYPE_CHECKING:
    import torch

    from oatlite.layouts import TokenPair
    from oatlite.models import PairModel

LONGEST = (60, 20)
SIZES = {"hidden_size": 128, "num_attention_heads": 2}
ROUNDING = {"float32": 1e-3, "bfloat16": 0.15}


def network(scale: Scale, family: str, dtype: str) -> PairModel:
    import torch
    from small_folders import config_of
    from transformers import AutoModelForCausalLM

    from oatlite.models import PairModel

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **SIZES), dtype=getattr(torch, dtype))
    return PairModel(model.to(scale.place()))


def random_pairs(count: int) -> list[TokenPair]:
    from small_folders import VOCAB_SIZE

    from oatlite.layouts import TokenPair

    rng = np.random.default_rng(1)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(3, VOCAB_SIZE, rng.integers(3, longest)).astype(np.int32)

    return [TokenPair(prompt=tokens(60), chosen=tokens(20), rejected=tokens(20)) for _ in range(count)]


def logprobs_and_gradient(model: PairModel, pairs: list[TokenPair], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    from oatlite.layouts import lay_out

    device = next(model.parameters()).device
    model.zero_grad()
    logprobs = model(lay_out(pairs, layout, PAD, device))  # type: ignore[arg-type]
    logprobs.sum().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return logprobs.detach().float().cpu(), gradient.cpu()


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_prompt_gives_what_two_sequences_give(scale: Scale, family: str, dtype: str) -> None:
    import torch
    from small_folders import VOCAB_SIZE

    from oatlite.layout_choice import choose_layout, rivals

    torch.set_float32_matmul_precision("highest")
    model = network(scale, family, dtype)
    names = rivals(scale.place(), takes_prompt_masks=True)[0]
    assert choose_layout(model, VOCAB_SIZE, PAD, scale.place(), longest=LONGEST) in names
    pairs = random_pairs(5)
    plain, plain_gradient = logprobs_and_gradient(model, pairs, "plain")
    for name in names:
        shared, shared_gradient = logprobs_and_gradient(model, pairs, name)
        assert float((plain - shared).abs().mean()) < ROUNDING[dtype] / 3, name
        distance = (plain_gradient - shared_gradient).norm() / plain_gradient.norm()
        assert float(distance) < ROUNDING[dtype], name


def test_the_gpu_agrees_with_the_cpu(scale: Scale) -> None:
    import torch

    torch.set_float32_matmul_precision("highest")
    model, pairs = network(scale, "neox", "float32"), random_pairs(3)
    here, here_gradient = logprobs_and_gradient(model, pairs, "shared")
    there, there_gradient = logprobs_and_gradient(model.cpu(), pairs, "shared")
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)
    assert float((here_gradient - there_gradient).norm() / there_gradient.norm()) < 1e-3


@pytest.mark.gpu
def test_log_probabilities_in_chunks_take_a_fraction_of_the_memory(scale: Scale) -> None:
    import torch
    from gpu_rows.timing import peak_bytes

    from oatlite.maths.logprobs import token_logprobs

    num_tokens, width, vocab = 4096, 256, 32768
    placed = {"device": scale.place(), "dtype": torch.bfloat16}
    hidden = torch.randn(num_tokens, width, **placed).requires_grad_()
    head = (torch.randn(vocab, width, **placed) / width**0.5).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), device=scale.place())

    def work() -> None:
        token_logprobs(hidden, head, None, targets, chunk=256).sum().backward()

    logits_bytes = num_tokens * vocab * 4
    peak = peak_bytes(scale, work)
    assert peak is not None and peak < logits_bytes / 2
    with torch.no_grad():
        exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found = token_logprobs(hidden, head, None, targets, chunk=256)
    assert float((found.double() - exact).abs().max()) < 0.05
