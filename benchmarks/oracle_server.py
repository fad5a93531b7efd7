"""The oracle's server holds 64 requests at once for two minutes, without an error and in flat memory.

`oatlite serve-oracle` with two workers, and its client in this process, which sends a request whenever one is
answered; beside it the same model in this process. The memory's slope is that of a line through the last three
quarters of the time. It exits with 1 where a request failed, or where median memory in the last quarter of the time is
more than MOST_GROWTH above that in the second: in the first, allocators still fill. Workers are looked at together:
what one of them holds follows the batch that it has in hand, by tens of MiB, and the larger ones fall now to this one,
now to that.

    python benchmarks/oracle_server.py [--seconds 120] [--concurrency 64] [--pairs 8] [--workers 2]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from report import machine, save

from oatlite.config.schema import RemoteConfig
from oatlite.demo import task
from oatlite.demo.build import ensure_demo
from oatlite.oracles.remote import RemoteOracle
from oatlite.oracles.reward_model import RewardModelOracle

Pairs = tuple[list[str], list[str], list[str]]
SAMPLE_S = 1.0
CALL_REQUESTS = 256
START_S = 120.0
MOST_GROWTH = 0.025
"""Of the memory; the medians of a quarter of two minutes differ by up to half of that where nothing grows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8, help="of one request")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{machine()}, {load:.1f} processes at work before")
    model = str(ensure_demo().reward_model)
    pairs = make_pairs(4096)
    served = measure_server(model, pairs, options)
    alone = measure_in_process(model, pairs, options.pairs, seconds=min(20.0, options.seconds))
    for name, result in (("server", served), ("in process", alone)):
        print(
            f"{name:<10} {result['pairs_per_s']:8.0f} pairs/s, a request of {options.pairs}: "
            f"p50 {1000 * result['p50_s']:.0f} ms, p99 {1000 * result['p99_s']:.0f} ms"
        )
    print(f"server / in process: {served['pairs_per_s'] / alone['pairs_per_s']:.2f} of the pairs/s")
    for name, slope in served["memory_slope_mib_per_min"].items():
        print(f"{name:<10} {served['memory_mib'][name]:8.0f} MiB, {slope:+.2f} MiB/min")
    print(f"{served['requests']} requests, {served['failures']} failed")
    broken = broken_claims(served["failures"], served["memory_growth_mib"], served["memory_mib"])
    print("the claim holds" if not broken else f"the claim does not hold: {'; '.join(broken)}")
    print(
        save("oracle_server", options=vars(options), load_before=load, server=served, in_process=alone, broken=broken)
    )
    sys.exit(1 if broken else 0)


def broken_claims(failures: int, growth_mib: dict[str, float], mib: dict[str, float]) -> list[str]:
    """What of the claim does not hold, in words."""
    failed = [f"{failures} requests failed"] if failures else []
    return failed + [
        f"{name} grew by {growth:.0f} MiB" for name, growth in growth_mib.items() if growth > MOST_GROWTH * mib[name]
    ]


def make_pairs(num: int) -> Pairs:
    """The demo's posts, each with two candidates."""
    judged = task.make_judged(num, 2, seed=17)
    first, second = ([post["responses"][side] for post in judged] for side in (0, 1))
    return [post["prompt"] for post in judged], first, second


def measure_server(model: str, pairs: Pairs, options: argparse.Namespace) -> dict[str, Any]:
    with serving(model, options.workers) as (url, pids):
        config = RemoteConfig(url=url, batch_size=options.pairs, concurrency=options.concurrency)
        oracle = RemoteOracle(config, deadline_s=120)
        latencies = timed(oracle)
        # Only at a call's end are there fewer requests under way, so a call has many.
        asked = [column * -(-CALL_REQUESTS * options.pairs // len(column)) for column in pairs]
        num_pairs = 0
        with Memory({"client": [os.getpid()], **pids}) as memory:
            start = time.perf_counter()
            while time.perf_counter() - start < options.seconds:
                assert oracle.compare(*asked).is_valid.all()
                num_pairs += len(asked[0])
            elapsed = time.perf_counter() - start
        failures = oracle.num_failures
        oracle.close()
    return {
        "seconds": elapsed,
        "pairs_per_s": num_pairs / elapsed,
        "requests": len(latencies),
        "failures": failures,
        **percentiles(latencies),
        "memory_mib": memory.last(),
        "memory_growth_mib": memory.growth(),
        "memory_slope_mib_per_min": memory.slopes(),
    }


def timed(oracle: RemoteOracle) -> list[float]:
    """Where the seconds of each request go from now on, from its first byte out to the last one in."""
    latencies: list[float] = []
    post = oracle._caller._post

    async def timed_post(body: bytes, deadline: float) -> bytes:
        start = time.perf_counter()
        answer = await post(body, deadline)
        latencies.append(time.perf_counter() - start)
        return answer

    oracle._caller._post = timed_post
    return latencies


def measure_in_process(model: str, pairs: Pairs, size: int, seconds: float) -> dict[str, Any]:
    oracle = RewardModelOracle(model)
    latencies, at = [], 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        part = [[column[(at + i) % len(column)] for i in range(size)] for column in pairs]
        start = time.perf_counter()
        oracle.compare(*part)
        latencies.append(time.perf_counter() - start)
        at += size
    return {"pairs_per_s": at / (time.perf_counter() - begin), **percentiles(latencies)}


def percentiles(latencies: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_s": float(p50), "p99_s": float(p99)}


class Memory:
    """Resident memory of named groups of processes, sampled while it is entered."""

    def __init__(self, pids: dict[str, list[int]]) -> None:
        self._pids = pids
        self._times: list[float] = []
        self._mib: dict[str, list[float]] = {name: [] for name in pids}

        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._times.append(time.monotonic())
            for name, pids in self._pids.items():
                pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
                self._mib[name].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def last(self) -> dict[str, float]:
        return {name: mib[-1] for name, mib in self._mib.items()}

    def growth(self) -> dict[str, float]:
        """From the second quarter of the time to the last, by their medians."""
        quarter = max(1, len(self._times) // 4)
        return {
            name: float(np.median(mib[-quarter:]) - np.median(mib[quarter : 2 * quarter] or mib[:quarter]))
            for name, mib in self._mib.items()
        }

    def slopes(self) -> dict[str, float]:
        skip = len(self._times) // 4
        times = np.array(self._times[skip:])
        return {name: 60 * float(np.polyfit(times - times[0], mib[skip:], 1)[0]) for name, mib in self._mib.items()}


@contextmanager
def serving(model: str, workers: int) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """The server's url, and the numbers of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    oatlite = Path(sys.executable).with_name("oatlite")
    command = [str(oatlite), "serve-oracle", "--model", model, "--devices", "cpu", "--workers", str(workers)]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        assert line.startswith("serving "), "the server did not start"
        print(line, end="")
        yield f"http://127.0.0.1:{port}", _kinds(process.pid)
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait()


def _kinds(root: int) -> dict[str, list[int]]:
    """The workers, those with torch in memory, and the other processes of the server."""
    parents = {
        int(entry.name): int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
    }
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    workers = sorted(pid for pid in tree if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text())
    return {"workers": workers, "the rest": sorted(tree - set(workers))}


if __name__ == "__main__":
    main()
