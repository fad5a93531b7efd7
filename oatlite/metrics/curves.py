"""A small line plot in braille dots, with the values of its axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot in a braille cell, by row and column."""
LABEL_WIDTH = 6

Points = Sequence[tuple[int, float]]


def plot(points: Points, *, width: int, height: int, last_step: int | None = None) -> list[str]:
    """``height`` lines of at most ``width`` characters: values on the left, the curve on the right.

    The horizontal axis runs from step 0 to ``last_step`` (default: the last point), so that a curve grows into its
    plot. Points that fall on one column of dots are averaged.
    """
    if not points:
        return ["waiting for data".center(width)[:width] if row == height // 2 else "" for row in range(height)]
    columns = max(1, width - LABEL_WIDTH) * 2
    end = max(last_step or 0, points[-1][0], 1)
    means = _column_means(points, columns, end)
    low, high = _range([value for _, value in points])
    cells = [[0] * (columns // 2) for _ in range(height)]
    for column, row in _dots(means, low, high, rows=height * 4):
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    labels = {0: _label(high), height - 1: _label(low)}
    if height >= 5:
        labels[height // 2] = _label(high - (high - low) * (height // 2) / (height - 1))
    return [
        f"{labels.get(row, ''):>{LABEL_WIDTH - 1}} " + "".join(chr(0x2800 + bits) for bits in line)
        for row, line in enumerate(cells)
    ]


def _column_means(points: Points, columns: int, end: int) -> list[tuple[int, float]]:
    sums: dict[int, list[float]] = {}
    for step, value in points:
        sums.setdefault(min(columns - 1, step * (columns - 1) // end), []).append(value)
    return [(column, sum(values) / len(values)) for column, values in sorted(sums.items())]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _dots(means: Sequence[tuple[int, float]], low: float, high: float, rows: int) -> list[tuple[int, int]]:
    """Dots (column, row from the top) of the line through the means, without gaps."""

    def row_of(value: float) -> int:
        return min(rows - 1, max(0, round((high - value) / (high - low) * (rows - 1))))

    dots = [(means[0][0], row_of(means[0][1]))]
    for (left, before), (right, after) in pairwise(means):
        previous = row_of(before)
        for column in range(left + 1, right + 1):
            row = row_of(before + (after - before) * (column - left) / (right - left))
            reach = range(previous, row, 1 if row > previous else -1)
            dots += [(column, between) for between in reach[1:]] + [(column, row)]
            previous = row
    return dots


def _label(value: float) -> str:
    """At most five characters."""
    short = (f"{value:.{digits}g}".replace("e+0", "e").replace("e-0", "e-") for digits in (3, 2, 1))
    return next((text for text in short if len(text) < LABEL_WIDTH), f"{value:.0e}"[: LABEL_WIDTH - 1])
