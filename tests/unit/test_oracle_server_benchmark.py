"""The arithmetic of the benchmark of the oracle's server: what is growth, and what breaks the claim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from oracle_server import MOST_GROWTH, Memory, broken_claims


def growth(*mib: float) -> float:
    memory = Memory({"client": []})
    memory._times, memory._mib = [float(n) for n in range(len(mib))], {"client": list(mib)}
    return memory.growth()["client"]


def test_growth_is_from_the_second_quarter_of_the_time_to_the_last() -> None:
    filling = [float(10 * n) for n in range(10)]
    assert growth(*filling, *[100.0] * 30) == 0, "in the first, allocators fill"
    assert growth(*filling, *[100.0] * 10, *[150.0] * 10, *[109.0] * 10) == pytest.approx(9)
    assert growth(*filling, *[100.0] * 10, *[100.0] * 10, *[91.0] * 10) == pytest.approx(-9)
    assert growth(*filling, *[100.0] * 29, 400.0) == 0, "a single sample is no growth"


def test_a_leak_is_growth_and_two_samples_are_enough_for_an_answer() -> None:
    assert growth(*[float(n) for n in range(40)]) == pytest.approx(20)
    assert growth(3.0) == 0 and growth(3.0, 5.0) == 0
    assert growth(3.0, 5.0, 6.0) == pytest.approx(1)


def test_a_request_that_failed_or_a_process_that_grew_breaks_the_claim() -> None:
    mib = {"client": 200.0, "workers": 1000.0}
    still = {"client": 200 * MOST_GROWTH, "workers": -3.0}
    assert broken_claims(0, still, mib) == []
    assert broken_claims(2, still, mib) == ["2 requests failed"]
    grew = still | {"workers": 1000 * MOST_GROWTH + 4}
    assert broken_claims(1, grew, mib) == ["1 requests failed", f"workers grew by {1000 * MOST_GROWTH + 4:.0f} MiB"]
