"""The arithmetic of the soak benchmark: what counts as flat, and that a leak does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from soak import MAX_MORE_MIB, MAX_SLOPE_MIB, MIN_SPAN, Watched, is_flat, rows, segments, slope

MIB = 1 << 20
STEPS = range(1, 1001)


def undisturbed(num_steps: int = 1000) -> Watched:
    """Everything grows over the first quarter of the run, and stays."""
    watched = Watched()
    for step in range(1, num_steps + 1):
        for number, role in enumerate(("supervisor", "learner-0", "actor-0", "actor-1")):
            watched.memory[role, number].append((step, (100 + min(step, num_steps // 4)) * MIB))
            watched.files[role, number].append((step, 20 + (step < num_steps // 4)))
        watched.segments.append((step, 1))
    return watched


def test_a_slope_is_mib_per_100_steps_of_the_second_half() -> None:
    assert slope([(step, step * MIB / 4) for step in STEPS]) == pytest.approx(25)
    assert slope([(step, min(step, 400) * MIB) for step in STEPS]) == pytest.approx(0, abs=1e-6)


def test_a_run_that_settles_is_flat() -> None:
    watched = undisturbed()
    assert is_flat(watched, watched)
    assert list(rows(watched, watched)) == ["supervisor", "learner-0", "actor-0", "actor-1"]
    assert segments(watched) == [1]


@pytest.mark.parametrize("what", ["memory", "files", "segments", "nobody"])
def test_what_grows_is_not_flat(what: str) -> None:
    watched = undisturbed()
    match what:
        case "memory":
            leak = (MAX_SLOPE_MIB + 0.1) * MIB / 100
            watched.memory["learner-0", 1] = [(s, n + s * leak) for s, n in watched.memory["learner-0", 1]]
        case "files":
            watched.files["supervisor", 0] = [(step, 20 + (step > 700)) for step in STEPS]
        case "segments":
            watched.segments[-1] = (1000, 2)
        case "nobody":
            del watched.memory["learner-0", 1]
    assert not is_flat(watched, undisturbed())


@pytest.mark.parametrize(("more", "is_right"), [(0.0, True), (MAX_MORE_MIB - 1, True), (MAX_MORE_MIB + 1, False)])
def test_a_successor_is_held_against_the_undisturbed_process_at_its_age(more: float, is_right: bool) -> None:
    """Which grows by a MiB in each of its first 250 steps."""
    watched, beside = undisturbed(), undisturbed()
    del watched.memory["actor-0", 2]
    for number, start in ((7, 1), (8, 500)):
        ages = range(MIN_SPAN)
        watched.memory["actor-0", number] = [(start + age, (101 + age + more * (number == 8)) * MIB) for age in ages]
        watched.files["actor-0", number] = [(start + age, 20) for age in ages]
    watched.memory["actor-0", 9] = [(step, 500 * step * MIB) for step in (998, 999, 1000)]  # too few to say
    found = rows(watched, beside)
    assert [name for name in found if name.startswith("actor-0")] == ["actor-0 (7)", "actor-0 (8)"]
    assert found["actor-0 (8)"].undisturbed == 100 + MIN_SPAN
    assert is_flat(watched, beside) == is_right


def test_a_successor_that_has_lived_for_long_is_held_against_the_bound_itself() -> None:
    watched = undisturbed()
    del watched.memory["actor-0", 2]
    for number, start in ((7, 1), (8, 500)):
        steps = range(start, start + MIN_SPAN + 1)
        watched.memory["actor-0", number] = [(step, (100 + 0.02 * step * (number == 8)) * MIB) for step in steps]
        watched.files["actor-0", number] = [(step, 20) for step in steps]
    found = rows(watched, undisturbed())
    assert [found[f"actor-0 ({number})"].is_flat for number in (7, 8)] == [True, False]
