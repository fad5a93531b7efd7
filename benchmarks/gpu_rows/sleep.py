"""How long vLLM takes to give up a card's memory and to take it back."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_rows.scale import Scale, Tell, memory_bytes
from gpu_rows.step import save_networks
from oatlite.engine import EngineOptions
from oatlite.engine.options import engine_arguments, prepare_environment

NUM_PROMPTS = 16


def sleep_and_wake(scale: Scale, tell: Tell) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-sleep-") as name:
        options = EngineOptions(
            path=str(save_networks(scale, Path(name)).policy),
            dtype=scale.dtype_name,
            max_model_len=scale.prompt_tokens + scale.new_tokens,
            seed=0,
            device=scale.device,
            gpu_memory_utilization=0.35,
            kv_cache_gib=1.0,
            threads=2,
        )
        prepare_environment(options)
        from vllm import LLM

        start = time.perf_counter()
        try:
            llm = LLM(**(engine_arguments(options) | {"enable_sleep_mode": True}))
        except ValueError as error:
            if scale.on_gpu:
                raise
            words = next(line.strip() for line in str(error).splitlines() if "sleep" in line.lower())
            tell("sleep mode", f"not on a CPU: {words.partition(' [type=')[0]}")
            return
        tell("start", f"{time.perf_counter() - start:.1f} s")
        _cycles(scale, tell, llm)


def _cycles(scale: Scale, tell: Tell, llm: Any) -> None:
    before = _greedy(scale, llm)
    for _ in range(2):  # the first one touches fresh memory of the host
        awake = memory_bytes(scale, [])
        times = {"sleep": _seconds(scale, lambda: llm.sleep(level=1))}
        asleep = memory_bytes(scale, [])
        times["wake weights"] = _seconds(scale, lambda: llm.wake_up(tags=["weights"]))
        times["wake cache"] = _seconds(scale, lambda: llm.wake_up(tags=["kv_cache"]))
        said = ", ".join(f"{what} {1e3 * value:.0f} ms" for what, value in times.items())
        freed = awake - asleep
        tell("level 1", f"{said}; frees {freed / 2**30:.1f} GiB of {awake / 2**30:.1f}", seconds=times, freed=freed)
    is_equal = _greedy(scale, llm) == before
    tell("after waking", f"greedy tokens {'as before' if is_equal else 'DIFFER'}", is_met=is_equal)
    slept = _seconds(scale, lambda: llm.sleep(level=2))
    woken = _seconds(scale, lambda: llm.wake_up())
    tell("level 2", f"sleep {1e3 * slept:.0f} ms, wake {1e3 * woken:.0f} ms; the weights are to be loaded anew")


def _greedy(scale: Scale, llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": scale.tokens(rng, scale.prompt_tokens).tolist()} for _ in range(NUM_PROMPTS)]
    params = SamplingParams(temperature=0.0, max_tokens=scale.new_tokens)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def _seconds(scale: Scale, work: Any) -> float:
    start = time.perf_counter()
    work()
    scale.synchronize()
    return time.perf_counter() - start
