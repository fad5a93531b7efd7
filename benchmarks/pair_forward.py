"""Claim: one sequence per pair, its prompt shared by both responses, is at least 2.5 times as fast forward and
backward as two sequences at prompts of 400 tokens, never slower at 100, and needs less memory.

Both sides run in turn, in one process; the memory of each is measured in a process of its own.

    python benchmarks/pair_forward.py [--models 5M-float32,116M-bfloat16] [--prompts 100,400,1000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from report import machine, save
from transformers import AutoModelForCausalLM, LlamaConfig

from oatlite.models import LayoutName, PairModel, TokenPair, lay_out

NEW_TOKENS = 53
AT_400 = 2.5
AT_100 = 1.0
SLOW_GFLOPS = 10.0
CPU = torch.device("cpu")
LAYOUTS: tuple[LayoutName, LayoutName] = ("plain", "shared")
# Hidden size, intermediate size, layers, vocabulary, and pairs of one forward pass.
SHAPES = {"5M": (256, 1024, 4, 4096, 8), "116M": (768, 2048, 12, 32000, 2)}


def network(name: str) -> PairModel:
    size, _, dtype = name.partition("-")
    hidden, intermediate, layers, vocabulary, _ = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return PairModel(AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)))


def pairs_for(name: str, prompt_tokens: int) -> list[TokenPair]:
    *_, vocabulary, count = SHAPES[name.partition("-")[0]]
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(0, vocabulary, length).astype(np.int32)

    return [
        TokenPair(prompt=tokens(prompt_tokens), chosen=tokens(NEW_TOKENS), rejected=tokens(NEW_TOKENS))
        for _ in range(count)
    ]


def step(model: PairModel, pairs: list[TokenPair], layout: LayoutName) -> tuple[float, torch.Tensor]:
    """Seconds of a forward and a backward pass, and the log-probabilities."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    logprobs = model(lay_out(pairs, layout, 0, CPU))
    logprobs.sum().backward()
    return time.perf_counter() - start, logprobs.detach()


def peak_mib(name: str, prompt_tokens: int, layout: LayoutName) -> float:
    """Peak memory of two steps beyond what the process held before them, in a process of its own."""
    command = [sys.executable, __file__, "--peak", f"{name},{prompt_tokens},{layout}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, prompt_tokens: int, layout: LayoutName) -> float:
    model, pairs = network(name), pairs_for(name, prompt_tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(model, pairs, layout)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def gflops(dtype: torch.dtype) -> float:
    a = torch.randn(256, 256).to(dtype)
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 256**3 / (time.perf_counter() - start) / 1e9


def compare(name: str, prompt_tokens: int, repeats: int) -> dict[str, object]:
    model, pairs = network(name), pairs_for(name, prompt_tokens)
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    found = {}
    for repeat in range(repeats + 1):
        for layout in LAYOUTS:
            duration, found[layout] = step(model, pairs, layout)
            if repeat:
                seconds[layout].append(duration)
    medians = {layout: statistics.median(values) for layout, values in seconds.items()}
    return {
        "model": name,
        "prompt_tokens": prompt_tokens,
        "pairs": len(pairs),
        "seconds": medians,
        "speedup": medians["plain"] / medians["shared"],
        "peak_mib": {layout: peak_mib(name, prompt_tokens, layout) for layout in LAYOUTS},
        "largest_difference": float((found["plain"] - found["shared"]).abs().max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="5M-float32,116M-bfloat16")
    parser.add_argument("--prompts", default="100,400,1000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, prompt_tokens, layout = arguments.peak.split(",")
        print(measure_peak(name, int(prompt_tokens), layout))
        return 0
    rows, left_out = [], {}
    headings = ("prompt", "plain s", "shared s", "speedup", "plain MiB", "shared MiB")
    print("model".ljust(14), *(heading.rjust(10) for heading in headings))
    for name in arguments.models.split(","):
        rate = gflops(getattr(torch, name.partition("-")[2]))
        if rate < SLOW_GFLOPS:
            left_out[name] = f"matrix products in this type run at {rate:.1f} GFLOP/s on this processor"
            print(f"{name:<14} left out: {left_out[name]}")
            continue
        for prompt_tokens in map(int, arguments.prompts.split(",")):
            row = compare(name, prompt_tokens, arguments.repeats)
            rows.append(row)
            seconds, peak = row["seconds"], row["peak_mib"]
            numbers = (
                f"{prompt_tokens}",
                f"{seconds['plain']:.2f}",
                f"{seconds['shared']:.2f}",
                f"{row['speedup']:.2f}x",
            )
            memory = (f"{peak['plain']:.0f}", f"{peak['shared']:.0f}")
            print(name.ljust(14), *(number.rjust(10) for number in (*numbers, *memory)), flush=True)
    wanted = {100: AT_100, 400: AT_400}
    is_met = all(
        row["speedup"] >= wanted.get(row["prompt_tokens"], 0) and row["peak_mib"]["shared"] < row["peak_mib"]["plain"]
        for row in rows
    )
    print(f"{machine()}: {'met' if is_met else 'MISSED'}")
    print(save("pair_forward", new_tokens=NEW_TOKENS, rows=rows, left_out=left_out))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
