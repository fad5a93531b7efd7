"""Claim: on CPU a weight sync costs at most three plain copies of the same bytes, the engine's reload aside.

A real actor process with a real engine takes a Llama of about 100 million parameters in float32, as one bucket and
as several. Both sides are measured in turn in one run: the sync (fill, checksum, offer, read, checksum, acknowledge)
and a copy between two private buffers.

    python benchmarks/weight_sync.py [--syncs 10]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from one_actor import one_actor
from report import machine, save
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oatlite.weights import plan_layout

LIMIT = 3.0
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
VOCAB_SIZE = 16384


def save_models(folder: Path) -> torch.nn.Module:
    """A random policy of about 100M parameters and a tiny random reward model; returns the policy."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *bytes_to_unicode().values()])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    common = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**common, **SIZES, tie_word_embeddings=True))
    small = LlamaConfig(**common, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    small.num_labels = 1
    for name, model in (("policy", policy), ("reward", AutoModelForSequenceClassification.from_config(small))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return policy


def measure(model: torch.nn.Module, bucket_bytes: int, num_syncs: int, folder: Path) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    layout = plan_layout([(n, tuple(p.shape)) for n, p in parameters.items()], torch.float32, bucket_bytes)
    num_bytes = sum(placement.num_bytes for placement in layout.placements)
    original, copy = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)

    @contextmanager
    def source(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield parameters.__getitem__

    syncs, reloads, copies = [], [], []
    with one_actor(folder / "policy", folder / "reward", layout, VOCAB_SIZE, folder) as pool:
        for version in range(num_syncs + 2):
            start = time.perf_counter()
            pool.sync(version, source)
            middle = time.perf_counter()
            copy.copy_(original)
            syncs.append(middle - start)
            reloads.append(pool.reload_s)
            copies.append(time.perf_counter() - middle)
    # The first two touch fresh pages.
    transfer = statistics.median(s - r for s, r in zip(syncs[2:], reloads[2:], strict=True))
    plain = statistics.median(copies[2:])
    return {
        "buckets": layout.num_buckets,
        "mib": num_bytes / 2**20,
        "sync_s": statistics.median(syncs[2:]),
        "reload_s": statistics.median(reloads[2:]),
        "transfer_s": transfer,
        "copy_s": plain,
        "ratio": transfer / plain,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=10)
    num_syncs = parser.parse_args().syncs
    rows = []
    with tempfile.TemporaryDirectory() as name:
        model = save_models(Path(name))
        for bucket_mib in (1024, 64):
            rows.append(measure(model, bucket_mib << 20, num_syncs, Path(name)))
    print(f"{'buckets':>7} {'MiB':>6} {'sync s':>8} {'reload s':>9} {'transfer s':>11} {'copy s':>8} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['buckets']:>7} {row['mib']:>6.0f} {row['sync_s']:>8.3f} {row['reload_s']:>9.3f} "
            f"{row['transfer_s']:>11.4f} {row['copy_s']:>8.4f} {row['ratio']:>6.2f}"
        )
    is_met = all(row["ratio"] <= LIMIT for row in rows)
    print(f"{machine()}; at most {LIMIT:.0f} copies: {'met' if is_met else 'MISSED'}")
    print(save("weight_sync", limit=LIMIT, syncs=num_syncs, rows=rows))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
