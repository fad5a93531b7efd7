"""Claim: spoiled input is refused, whatever it is: nothing crashes, hangs, grows or is believed that is not valid.

A million spoiled frames of every kind of message go into the decoder, 10,000 into live sockets of two processes among
real messages, and 1,000 spoiled configurations through everything that checks them; with ``--run``, some that are valid
are run for two steps, which takes up to some minutes each. All drawn from one seed.

    python benchmarks/fuzz.py [--frames 1000000] [--live 10000] [--settings 1000] [--run 0] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fuzz_frames import fault_of, frames_of, real_messages, spoiled
from fuzz_preflight import small_demo
from fuzz_runs import ENDED, RAN, fuzz_runs
from fuzz_settings import outcome, spoiled_settings
from fuzz_sockets import Live, live, memory_bytes
from report import machine, save

from oatlite.messages import WeightManifest
from oatlite.messages.codec import decode
from oatlite.messages.fields import MalformedMessage
from oatlite.weights import Layout

SLOWEST_S = 0.5
GROWTH_BYTES = 16 << 20
WARM_UP = 0.2
SAMPLES = 100
KNOWN = ("valid", "refused", "refused before a start")


@dataclass(slots=True)
class Decoded:
    """Of the frames given to the decoder: how many, by the way they were spoiled, were refused, came out as a message
    that was a real one, or as another that is valid; ``faults`` should not have come out at all."""

    refused: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    valid: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    slowest_s: float = 0.0
    seconds: float = 0.0


def fuzz_decoder(generator: random.Random, num_frames: int) -> Decoded:
    """Raises whatever the decoder raises that is no MalformedMessage."""
    found, started = Decoded(), time.monotonic()
    originals = [frames_of(message) for _ in range(20) for message in real_messages(generator)]
    sent = {tuple(frames) for frames in originals}
    for i in range(num_frames):
        way, frames = spoiled(generator, originals)
        before = time.thread_time()  # of this thread alone, whatever else the machine does
        try:
            message = decode(frames)
        except MalformedMessage:
            found.refused[way] += 1
            message = None
        found.slowest_s = max(found.slowest_s, time.thread_time() - before)
        if message is not None:
            (found.same if tuple(frames) in sent else found.valid)[way] += 1
            fault = fault_of(message)
            if fault is None and isinstance(message, WeightManifest) and reaches_outside(message):
                fault = "a manifest reaches outside its buffer"
            if fault is not None:
                found.faults.append(f"{way}: {fault}")
        if i % max(1, num_frames // SAMPLES) == 0:
            found.memory.append(memory_bytes())
    found.seconds = time.monotonic() - started
    return found


def reaches_outside(manifest: WeightManifest) -> bool:
    """Whether a manifest that is believed names bytes that are not in its buffer."""
    try:
        layout = Layout.from_manifest(manifest)
    except MalformedMessage:
        return False
    return any(p.offset < 0 or p.offset + p.num_bytes > manifest.buffer_bytes for p in layout.placements)


def fuzz_settings(generator: random.Random, num_settings: int) -> Counter[str]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, small_demo(Path(name)) as paths:
        for _ in range(num_settings):
            found[outcome(spoiled_settings(generator, Path(name), paths), Path(name))] += 1
    return found


def growth(memory: list[int], num: int) -> tuple[float, int]:
    """Slope of a line through the samples after the warm-up, in bytes per item, and the growth that it makes in all."""
    settled = memory[round(len(memory) * WARM_UP) :]
    if len(settled) < 2:
        return 0.0, 0
    per_sample = float(np.polyfit(np.arange(len(settled)), np.array(settled, float), 1)[0])
    return per_sample * len(memory) / num, round(per_sample * len(settled))


def faults(decoded: Decoded, lively: Live, settings: Counter[str]) -> list[str]:
    """Whatever does not keep the claim."""
    found = [*decoded.faults, *lively.faults, *(what for what in settings if what not in (*KNOWN, RAN, ENDED))]
    if decoded.slowest_s > SLOWEST_S:
        found.append(f"the decoder took {decoded.slowest_s:.1f} s over one message")
    if lively.answered != lively.asked:
        found.append(f"{lively.asked - lively.answered} real messages were lost")
    if lively.taken + sum(lively.dropped.values()) != lively.sent:
        found.append(f"{lively.sent} frames sent, {lively.taken} taken, {lively.dropped} dropped")
    for where, memory in (("decoder", decoded.memory), ("live sockets", lively.memory)):
        grown = growth(memory, 1)[1]
        if grown > GROWTH_BYTES:
            found.append(f"{where}: memory grew by {grown >> 20} MiB")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--live", type=int, default=10_000)
    parser.add_argument("--settings", type=int, default=1_000)
    parser.add_argument("--run", type=int, default=0, help="valid configurations to run")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    generator = random.Random(asked.seed)
    settings = fuzz_settings(generator, asked.settings)
    runs = fuzz_runs(random.Random(asked.seed), asked.run)
    originals = [frames_of(message) for _ in range(20) for message in real_messages(generator)]
    lively = live(generator, originals, asked.live)
    decoded = fuzz_decoder(generator, asked.frames)
    slopes = {"decoder": growth(decoded.memory, asked.frames)[0], "live": growth(lively.memory, asked.live)[0]}
    wrong = faults(decoded, lively, settings + runs)

    print(f"{'':<26} {'refused':>9} {'unchanged':>9} {'other, valid':>12}")
    for way in sorted(decoded.refused):
        print(f"{way:<26} {decoded.refused[way]:>9} {decoded.same[way]:>9} {decoded.valid[way]:>12}")
    totals = [counter.total() for counter in (decoded.refused, decoded.same, decoded.valid)]
    print(f"{'decoder, all':<26} {totals[0]:>9} {totals[1]:>9} {totals[2]:>12}")
    print(f"{'live sockets':<26} {sum(lively.dropped.values()):>9} {'':>9} {lively.taken:>12}")
    num_refused = settings["refused"] + settings["refused before a start"]
    print(f"{'configurations':<26} {num_refused:>9} {'':>9} {settings['valid']:>12}")
    print(f"of those refused, {settings['refused before a start']} by what is read and asked before a run starts")
    print(f"of {asked.run} valid ones that were run, {runs[RAN]} ended well and {runs[ENDED]} in a line")
    print(f"real messages answered meanwhile: {lively.answered} of {lively.asked}")
    print(f"slowest decode {decoded.slowest_s * 1000:.1f} ms; {decoded.seconds / asked.frames * 1e6:.0f} us a frame")
    print(f"memory: {slopes['decoder']:.2f} bytes a frame in the decoder, {slopes['live']:.1f} in the live sockets")
    for what in wrong[:10]:
        print(f"WRONG: {what}")
    print(f"{machine()}; {'met' if not wrong else 'MISSED'}")
    print(
        save(
            "fuzz",
            seed=asked.seed,
            frames=dict(zip(("refused", "unchanged", "other_valid"), totals, strict=True)),
            live={"sent": lively.sent, "dropped": lively.dropped, "valid": lively.taken, "answered": lively.answered},
            settings=dict(settings),
            runs=dict(runs),
            slowest_decode_s=decoded.slowest_s,
            memory_bytes_per_frame=slopes,
            wrong=wrong,
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
