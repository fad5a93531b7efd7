"""DeepSpeed on a GPU takes the steps that torch takes, and its weights go into an actor that samples with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_rows.scale import PAD, Scale

NUM_STEPS = 3
DECIDED = {"float32": 1e-2, "bfloat16": 0.3}  # nearer logits than that may be decided by rounding
MAX_NEW_TOKENS = 12
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128}


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


def test_deepspeed_steps_as_torch_does(scale: Scale, tmp_path: Path) -> None:
    needs("deepspeed")
    import torch
    from gpu_rows.forward import pairs_of
    from gpu_rows.plain_trainer import PlainTrainer
    from transformers import AutoModelForCausalLM

    from oatlite.layouts import lay_out
    from oatlite.models import PairModel
    from oatlite.trainer import OptimizerOptions, Ranks, Trainer

    options = OptimizerOptions(
        lr=1e-3,
        schedule="constant",
        warmup_ratio=0.0,
        num_steps=NUM_STEPS,
        micro_steps=2,
        micro_batch_size=4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        max_grad_norm=1.0,
        zero_stage=2 if scale.on_gpu else 0,
        dtype=scale.dtype_name,
    )
    ranks = Ranks(rank=0, count=1, rendezvous=tmp_path / "ranks", device=scale.place(), timeout_s=60.0)
    found = []
    for make in (PlainTrainer, lambda model, options: Trainer(model, options, ranks)):
        model = PairModel(scale.network(AutoModelForCausalLM, scale.config()))
        trainer: Any = make(model, options)
        norms = []
        for step in range(NUM_STEPS):
            for micro in range(options.micro_steps):
                pairs = pairs_of(scale, 4, 20 + 7 * step + micro)
                batch = lay_out(pairs, "shared", PAD, scale.place())
                trainer.backward(-trainer.forward(batch).mean() / options.micro_steps)
            norms.append(trainer.step().grad_norm)
        with trainer.whole_parameters([name for name, _ in model.named_parameters()]) as parameter:
            weights = torch.cat([parameter(name).float().flatten().cpu() for name, _ in model.named_parameters()])
        trainer.close()
        found.append((weights, norms))
    (plain, plain_norms), (ours, our_norms) = found
    assert our_norms == pytest.approx(plain_norms, rel=0.02)
    torch.manual_seed(0)
    first = PairModel(scale.network(AutoModelForCausalLM, scale.config()))
    initial = torch.cat([p.detach().float().flatten().cpu() for p in first.parameters()])
    moved = float((plain - initial).norm())
    assert moved > 0
    # A first step of Adam goes by a gradient's sign, which rounding turns where there is hardly any.
    assert float((plain - ours).norm()) < (0.3 if scale.on_gpu else 0.05) * moved


def greedy_tokens(model: Any, prompt: np.ndarray, decided: float) -> list[int]:
    """Hugging Face's greedy tokens, up to the first that rounding could decide."""
    import torch

    device = next(model.parameters()).device
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < MAX_NEW_TOKENS:
            best = model(input_ids=ids).logits[0, -1].float().topk(2)
            if float(best.values[0] - best.values[1]) < decided:
                break
            tokens.append(int(best.indices[0]))
            ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return tokens


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_an_actor_samples_with_the_weights_that_it_was_sent(scale: Scale, family: str, tmp_path: Path) -> None:
    needs("pydantic", "zmq", "vllm")
    import torch
    from one_actor import one_actor
    from small_folders import VOCAB_SIZE, save_model

    from oatlite.models import load_policy
    from oatlite.sampling import SamplingOptions
    from oatlite.weights import plan_layout

    policy = Path(save_model(tmp_path / "policy", family, seed=5, **SIZES))
    reward = Path(save_model(tmp_path / "reward", "llama", reward=True, **SIZES))
    model = load_policy(str(policy), scale.dtype()).to(scale.place()).eval()
    parameters = dict(model.named_parameters())
    layout = plan_layout([(n, tuple(p.shape)) for n, p in parameters.items()], scale.dtype(), 60_000)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, size).astype(np.int32) for size in rng.integers(4, 40, 12)]
    greedy = SamplingOptions(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)

    @contextmanager
    def source(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: parameters[name].data

    more = {"model": {"dtype": scale.dtype_name}, "oracle": {"dtype": scale.dtype_name}}
    more |= {"placement": {"gpu_memory_utilization": 0.3}}
    options: dict[str, Any] = {"max_model_len": 64, "more": more, "device": scale.device}
    seeds = np.zeros((len(prompts), 1), np.uint64)
    with one_actor(policy, reward, layout, VOCAB_SIZE, tmp_path, **options) as pool:
        num_compared = 0
        for version in range(1, 4):
            torch.manual_seed(version)
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            pool.sync(version, source)
            candidates, _ = pool.generate(prompts, seeds, [["policy"]] * len(prompts), greedy)
            for prompt, (candidate,) in zip(prompts, candidates, strict=True):
                expected = greedy_tokens(model, prompt, DECIDED[scale.dtype_name])
                found = candidate.tokens[: len(expected)].tolist()
                assert found == expected[: len(found)]
                num_compared += len(found)
    assert num_compared > 3 * len(prompts)
