"""Claim: our forward and backward pass over a pair is at least 2.5 times as fast as the plain one at prompts of 400
tokens, never slower at 100, and needs less memory.

``plain`` is the usual way: two sequences, and logits at every position. ``apart`` is two sequences with logits at the
responses alone, in chunks. ``shared``, ours, does the same on one sequence whose prompt both responses share. Of the
tokens of ``plain``, ``shared`` has 506 / 906 at prompts of 400: 1.79 times fewer, and what it saves beyond that is
memory traffic. Where products are all that counts, as with 116M parameters in bfloat16, 2.5 is out of reach: with its
logits everywhere ``plain`` has 2.15 times as many operations.

All run in turn, in one process; the memory of each is measured in a process of its own.

    python benchmarks/pair_forward.py [--models 5M-float32,116M-bfloat16] [--prompts 100,400,1000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from report import machine, save
from transformers import AutoModelForCausalLM, LlamaConfig

from oatlite.layouts import ForwardBatch, TokenPair, lay_out
from oatlite.models import PairModel

NEW_TOKENS = 53
AT_400 = 2.5
AT_100 = 1.0
SLOW_GFLOPS = 10.0
CPU = torch.device("cpu")
WAYS = ("plain", "apart", "shared")
# Hidden size, intermediate size, layers, vocabulary, and pairs of one forward pass.
SHAPES = {
    "5M": (256, 1024, 4, 4096, 8),
    "20M": (512, 1536, 6, 4096, 4),
    "116M": (768, 2048, 12, 32000, 2),
}


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


def plain_forward(model: PairModel, batch: ForwardBatch) -> torch.Tensor:
    """Log-probabilities of every token given those before it, of which those of the responses are taken."""
    logits = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits = logits[:, :-1].float()
    chosen = logits.gather(2, batch.input_ids[:, 1:, None])[:, :, 0]
    return (chosen - logits.logsumexp(2))[batch.predictor_rows, batch.predictor_columns]


def step(model: PairModel, pairs: list[TokenPair], way: str) -> tuple[float, torch.Tensor]:
    """Seconds of a forward and a backward pass, and the log-probabilities."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    batch = lay_out(pairs, "shared" if way == "shared" else "plain", 0, CPU)
    logprobs = plain_forward(model, batch) if way == "plain" else model(batch)
    logprobs.sum().backward()
    return time.perf_counter() - start, logprobs.detach()


def peak_mib(name: str, prompt_tokens: int, way: str) -> float:
    """Peak memory of two steps beyond what the process held before them, in a process of its own."""
    command = [sys.executable, __file__, "--peak", f"{name},{prompt_tokens},{way}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, prompt_tokens: int, way: str) -> float:
    model, pairs = network(name), pairs_for(name, prompt_tokens)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):
        step(model, pairs, way)
    return memory_mib("VmHWM") - before


def memory_mib(field: str) -> float:
    """``VmRSS``: what the process holds; ``VmHWM``: the most that it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def gflops(dtype: torch.dtype) -> float:
    a = torch.randn(256, 256).to(dtype)
    a @ a  # the first one makes its kernel
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 256**3 / (time.perf_counter() - start) / 1e9


def compare(name: str, prompt_tokens: int, repeats: int) -> dict[str, object]:
    model, pairs = network(name), pairs_for(name, prompt_tokens)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found = {}
    for repeat in range(repeats + 1):
        for way in WAYS:
            duration, found[way] = step(model, pairs, way)
            if repeat:
                seconds[way].append(duration)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "model": name,
        "prompt_tokens": prompt_tokens,
        "pairs": len(pairs),
        "seconds": medians,
        "speedup": medians["plain"] / medians["shared"],
        "speedup_of_sharing": medians["apart"] / medians["shared"],
        "peak_mib": {way: peak_mib(name, prompt_tokens, way) for way in WAYS},
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
        name, prompt_tokens, way = arguments.peak.split(",")
        print(measure_peak(name, int(prompt_tokens), way))
        return 0
    rows, left_out = [], {}
    headings = ("prompt", *(f"{way} s" for way in WAYS), "speedup", *(f"{way} MiB" for way in WAYS))
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
            cells = (
                *(str(prompt_tokens), *(f"{seconds[way]:.2f}" for way in WAYS), f"{row['speedup']:.2f}x"),
                *(f"{peak[way]:.0f}" for way in WAYS),
            )
            print(name.ljust(14), *(cell.rjust(10) for cell in cells), flush=True)
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
