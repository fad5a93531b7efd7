"""A real actor killed in the middle of a weight update: its successor holds all of the new version and nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from greedy import decided_tokens
from live import CLEAN_S, Stopwatch
from one_actor import startable_actor
from runs import DEADLINE_S, Inputs
from small_folders import VOCAB_SIZE, save_model

from oatlite.models import load_policy
from oatlite.sampling import SamplingOptions
from oatlite.weights import plan_layout

GREEDY = SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=8)
PROMPTS = [np.arange(3 + i, 12 + 2 * i, dtype=np.int32) for i in range(6)]
BUCKET_BYTES = 60_000


@pytest.mark.fault("18")
def test_an_actor_killed_in_the_middle_of_an_update_is_replaced_by_one_of_the_new_version(
    llama: Inputs, tmp_path: Path
) -> None:
    models = [
        load_policy(save_model(tmp_path / f"policy-{seed}", "llama", seed=seed, **SIZES), torch.float32).eval()
        for seed in (5, 6)
    ]
    parameters = [dict(model.named_parameters()) for model in models]
    layout = plan_layout([(name, tensor.shape) for name, tensor in parameters[0].items()], torch.float32, BUCKET_BYTES)
    assert layout.num_buckets >= 4
    middle = layout.bucket(2)[0].name
    killings: list[Stopwatch] = []

    @contextmanager
    def first(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield parameters[0].__getitem__

    @contextmanager
    def second(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        if middle in names and not killings:  # bucket 0 is loaded, bucket 1 is offered
            actor.signal(signal.SIGKILL)
            assert actor.wait(CLEAN_S)
            killings.append(Stopwatch())
            threading.Thread(target=start).start()  # as the supervisor does, while the learner waits
        yield parameters[1].__getitem__

    options = {"max_model_len": 64, "lora": None, "more": None}
    with startable_actor(tmp_path / "policy-5", llama.reward_model, layout, VOCAB_SIZE, tmp_path, **options) as made:
        pool, start = made
        actor = start()
        pool.wait_until_ready()
        before = pool.sync(1, first)
        old = sampled(pool)
        after = pool.sync(2, second)
        killings[0].within(DEADLINE_S, "actor killed in an update, until its successor holds it")
        new = sampled(pool)
        again = pool.sync(3, second)
        pool.stop()
    assert not set(before) & set(after), "every bucket differs"
    assert again == after
    for model, seen in zip(models, (old, new), strict=True):
        decided = [decided_tokens(model, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]
        assert [tokens[: len(wanted)] for tokens, wanted in zip(seen, decided, strict=True)] == decided
        assert sum(map(len, decided)) > 40, "too little was decided to say anything"
    assert old != new


def sampled(pool) -> list[list[int]]:
    candidates, _ = pool.generate(PROMPTS, np.zeros((len(PROMPTS), 1), np.uint64), [["policy"]] * len(PROMPTS), GREEDY)
    return [several[0].tokens.tolist() for several in candidates]
