"""After every sync the engine in a real actor process decides as Hugging Face does with the learner's weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZES
from greedy import decided_tokens
from one_actor import one_actor
from runs import Inputs
from small_folders import VOCAB_SIZE, save_model

from oatlite.config.schema import LoraConfig
from oatlite.lora import adapter_of, adapter_parameters, add_adapter, all_parameters, merged_parameters
from oatlite.models import load_policy
from oatlite.sampling import SamplingOptions
from oatlite.weights import plan_layout

MAX_NEW_TOKENS = 16
LONG_PROMPT = 180
GREEDY = SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
WEIGHTS = {"rank": 0}
MERGED = {"rank": 4, "alpha": 16, "sync": "merged"}
ADAPTER = MERGED | {"sync": "adapter"}


@pytest.mark.parametrize(
    ("family", "tied", "bucket_bytes", "lora"),
    [
        ("llama", True, 1 << 28, WEIGHTS),
        ("llama", False, 60_000, WEIGHTS),
        ("llama", True, 60_000, WEIGHTS),
        ("neox", False, 60_000, WEIGHTS),
        ("neox", False, 60_000, MERGED),
        ("moe", False, 60_000, WEIGHTS),
        ("llama", True, 2_000, ADAPTER),
    ],
)
def test_greedy_tokens_equal_hugging_faces(
    family: str, tied: bool, bucket_bytes: int, lora: dict[str, Any], llama: Inputs, tmp_path: Path
) -> None:
    policy = Path(save_model(tmp_path / "policy", family, seed=5, tie_word_embeddings=tied, **SIZES))
    model = load_policy(str(policy), torch.float32).eval()
    adapter = adapter_of(LoraConfig(**lora))
    if adapter is not None:
        add_adapter(model, adapter, seed=0)
    published = {"merged": merged_parameters, "adapter": adapter_parameters}.get(lora.get("sync"), all_parameters)(
        model
    )
    rng = np.random.default_rng(0)
    # The last one fills a block of the engine's prefix cache, which must not outlive the weights that it was made with.
    sizes = [*rng.integers(4, 40, 12), LONG_PROMPT]
    prompts = [rng.integers(3, VOCAB_SIZE, size).astype(np.int32) for size in sizes]
    generator = torch.Generator().manual_seed(0)

    @contextmanager
    def source(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        with torch.no_grad():
            yield lambda name: published[name].value(model.get_parameter)

    # With an adapter alone the base stays there: its responses come from the same batch as the policy's.
    models = [model, load_policy(str(policy), torch.float32).eval()][: 2 if lora.get("sync") == "adapter" else 1]
    samplers = ["policy", "reference"][: len(models)]
    more = {"rollout": {"sampler": "hybrid"}, "model": {"reference": str(policy)}} if len(models) == 2 else None
    seen: list[list[list[int]]] = []
    layout = plan_layout([(name, one.shape) for name, one in published.items()], torch.float32, bucket_bytes)
    longest = LONG_PROMPT + MAX_NEW_TOKENS
    room = {"max_model_len": longest, "lora": lora, "more": more}
    with one_actor(policy, llama.reward_model, layout, VOCAB_SIZE, tmp_path, **room) as pool:  # type: ignore[arg-type]
        for version in range(4):
            checksums = pool.sync(version, source)
            assert len(set(checksums)) == len(checksums) == layout.num_buckets
            seeds = np.zeros((len(prompts), len(samplers)), np.uint64)
            found, _ = pool.generate(prompts, seeds, [samplers] * len(prompts), GREEDY)
            for k, behind in enumerate(models):
                expected = [decided_tokens(behind, prompt, MAX_NEW_TOKENS) for prompt in prompts]
                for candidates, wanted in zip(found, expected, strict=True):
                    assert candidates[k].tokens.tolist()[: len(wanted)] == wanted, samplers[k]
                assert expected[-1], "nothing was decided after the long prompt"
                assert sum(map(len, expected)) > 50, "too little was decided to say anything"
            seen.append([candidates[0].tokens.tolist() for candidates in found])
            with torch.no_grad():
                for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert all(one != other for one, other in itertools.pairwise(seen)), "the weights never changed"
