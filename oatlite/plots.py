"""Curves with bands around them, as a table and as pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEGEND_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """``low`` and ``high`` (T,) bound the band around ``middle`` (T,), at ``x`` (T,)."""

    x: Floats
    middle: Floats
    low: Floats
    high: Floats

    @staticmethod
    def of_runs(x: Floats, runs: Floats) -> Curve:
        """The mean over runs (S, T), and the 95 % interval of that mean by Student's t; of one run no band."""
        mean = runs.mean(0)
        if len(runs) == 1:
            return Curve(x, mean, mean, mean)
        half = t_quantile(len(runs) - 1) * runs.std(0, ddof=1) / np.sqrt(len(runs))
        return Curve(x, mean, mean - half, mean + half)

    @staticmethod
    def of_quantiles(x: Floats, runs: Floats) -> Curve:
        """The median over runs (S, T), and where the middle half of them lies; for what spans orders of magnitude."""
        return Curve(x, *np.quantile(runs, (0.5, 0.25, 0.75), axis=0))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom.

    By the expansion of Cornish and Fisher (Abramowitz and Stegun, 26.7.5) from three on, to one part in a thousand.
    """
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms)))


def write_table(path: Path, curves: Mapping[str, Curve], x_name: str) -> None:
    """A row for each point: the curve's name, x, and the band."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["curve", x_name, "middle", "low", "high"])
        for name, curve in curves.items():
            rows = zip(curve.x, curve.middle, curve.low, curve.high, strict=True)
            table.writerows([name, *(f"{number:.6g}" for number in row)] for row in rows)


def draw(
    stem: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    x_name: str,
    y_name: str,
    y_limits: tuple[float, float] | None = None,
    is_log: bool = False,
) -> list[Path]:
    """A picture with a panel for each entry, by title, as PNG and as PDF beside each other; gives both paths.

    A curve has the same colour in every panel, and from the eleventh on another stroke. With ``y_limits`` all panels
    show that range. On a logarithmic axis everything must be positive.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    strokes = {name: ("-", "--", ":")[i // 10 % 3] for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.5 * len(panels), 4 + 0.2 * -(-max(map(len, panels.values())) // LEGEND_COLUMNS)),
        squeeze=False,
        layout="constrained",
        sharey=is_log or y_limits is not None,
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(curve.x, curve.middle, strokes[name], color=colours[name], label=name)
            axis.fill_between(curve.x, curve.low, curve.high, color=colours[name], alpha=0.2, lw=0)
        axis.set_title(title)
        axis.set_xlabel(x_name)
        if y_limits is not None:
            axis.set_ylim(y_limits)
        if is_log:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=LEGEND_COLUMNS)
    axes[0][0].set_ylabel(y_name)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
