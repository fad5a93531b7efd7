"""Intervals and standard errors against values computed otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oatlite.maths.intervals import mean_and_error, ratio_and_error, wilson_interval


def test_wilson_solves_its_equation() -> None:
    """Its ends are where the true share lies z standard errors of its own from the observed one."""
    for wins, num in ((3, 10), (50, 100), (99.5, 200)):
        for end in wilson_interval(wins, num):
            assert abs(wins / num - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / num), rel=1e-6)


def test_wilson_at_the_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775, 1.0), abs=1e-4)


def test_a_mean_and_its_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    mean, error = mean_and_error([1.0])
    assert mean == 1 and math.isnan(error)


def test_a_ratio_and_its_error_over_many_samples() -> None:
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        sizes = rng.integers(5, 50, 100)
        values = 0.3 * sizes + rng.normal(0, 2, 100)
        ratio, error = ratio_and_error(values, sizes)
        ratios.append(ratio)
        errors.append(error)
    assert np.mean(ratios) == pytest.approx(0.3, abs=1e-3)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
