"""``oatlite bandit``: the numerical side, without a language model."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oatlite.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import torch

    from oatlite.plots import Curve

ROUNDING = 1e-25  # below it rounding of the logits rules, and the picture ends
EXPERIMENT, TABULAR, DUELING = "Experiment", "tabular", "dueling"


class Experiment(StrEnum):
    tabular = "tabular"
    dueling = "dueling"


def bandit(
    experiment: Annotated[
        Experiment,
        typer.Argument(
            help="tabular: DPO on a table, by the sampler of its pairs; dueling: SEA's rules on a contextual bandit",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="folder for curves and pictures; default: bandit-EXPERIMENT", show_default=False)
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(help="independent runs", min=1, rich_help_panel=EXPERIMENT),
    ] = 20,
    seed: Annotated[int, typer.Option(help="the first of them", min=0, rich_help_panel=EXPERIMENT)] = 0,
    actions: Annotated[int, typer.Option(help="actions to choose from", min=2, rich_help_panel=TABULAR)] = 20,
    beta: Annotated[float, typer.Option(help="weight of the KL term", rich_help_panel=TABULAR)] = 3.0,
    updates: Annotated[
        int,
        typer.Option(
            help="updates with exact gradients; sampled ones take ten times more", min=2, rich_help_panel=TABULAR
        ),
    ] = 40,
    samples: Annotated[int, typer.Option(help="pairs of a sampled gradient", min=1, rich_help_panel=TABULAR)] = 1024,
    rounds: Annotated[int, typer.Option(help="rounds of 8 duels", min=2, rich_help_panel=DUELING)] = 60,
    candidates: Annotated[int, typer.Option(help="candidates a prompt", min=2, rich_help_panel=DUELING)] = 10,
) -> None:
    """Numerical experiments without a language model, in seconds.

    Writes curves as a table and as pictures, and prints what they come to.
    """
    if not beta > 0:
        raise ConfigError(f"--beta {beta:g} is no weight", "give one above 0, such as 3")
    folder = output or Path(f"bandit-{experiment.value}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}", "give another --output") from None
    if experiment is Experiment.tabular:
        _tabular(folder, seeds, seed, actions, beta, updates, samples)
    else:
        _dueling(folder, seeds, seed, rounds, candidates)


def _tabular(
    folder: Path, num_seeds: int, seed: int, num_actions: int, beta: float, num_updates: int, num_samples: int
) -> None:
    import numpy as np
    import torch

    from oatlite.maths.bandit import SAMPLERS, convergence_order, newton_rate, tabular_dpo
    from oatlite.plots import Curve

    rewards = torch.stack(
        [
            torch.randn(num_actions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + n))
            for n in range(num_seeds)
        ]
    )
    exact: dict[str, Curve] = {}
    sampled: dict[str, Curve] = {}
    rows = []
    for sampler in SAMPLERS:
        # Uniform pairs have another curvature: that of a mixture between equal actions.
        rate = newton_rate(torch.zeros_like(rewards) if sampler == "uniform" else rewards, beta=beta)
        gaps = tabular_dpo(rewards, sampler, beta=beta, learning_rate=rate, num_updates=num_updates)
        exact[sampler] = Curve.of_quantiles(np.arange(num_updates, dtype=np.float64), gaps.clamp(min=ROUNDING).numpy())
        noisy = tabular_dpo(
            rewards,
            sampler,
            beta=beta,
            learning_rate=rate / 10,
            num_updates=10 * num_updates,
            num_samples=num_samples,
            generator=torch.Generator().manual_seed(seed),
        )
        sampled[sampler] = Curve.of_quantiles(
            np.arange(10 * num_updates, dtype=np.float64), noisy.clamp(min=ROUNDING).numpy()
        )
        floor = float(noisy[:, -num_updates:].mean(1).median())
        orders = [convergence_order(of_seed[None]) for of_seed in gaps]
        rows.append([sampler, *_orders(orders), _first_below(gaps, 1e-9), f"{floor:.2g}"])
    _write(
        folder / "tabular",
        {"exact gradients": exact, f"gradients of {num_samples} pairs": sampled},
        "update",
        "gap to the optimal value",
        is_log=True,
    )
    _print(
        f"Tabular DPO, {num_seeds} seeds, {num_actions} actions",
        ["sampler", "order", "from ... to", "to 1e-9", "noise floor"],
        rows,
    )
    print(
        "order: fitted q in gap' = c gap^q with exact gradients (1 linear, 2 quadratic), of each seed: median and range"
    )
    print("to 1e-9: updates until the median gap is there")
    print(f"noise floor: median gap at the end with gradients of {num_samples} pairs, at a tenth of the rate")
    _tell(folder)


def _orders(orders: Sequence[float]) -> tuple[str, str]:
    """The median over seeds and the range, where at least half of them have an order."""
    import statistics

    fitted = [order for order in orders if order == order]
    if 2 * len(fitted) < len(orders):
        return "too few updates to fit", ""
    return f"{statistics.median(fitted):.2f}", f"{min(fitted):.2f} ... {max(fitted):.2f}"


def _first_below(gaps: torch.Tensor, bound: float) -> str:
    reached = (gaps.median(0).values < bound).nonzero()
    return str(int(reached[0])) if len(reached) else f"over {gaps.shape[1] - 1}"


def _dueling(folder: Path, num_seeds: int, seed: int, num_rounds: int, num_candidates: int) -> None:
    import torch

    from oatlite.dueling_bandit import RULES, Problem, run
    from oatlite.plots import Curve

    torch.set_num_threads(1)  # its tensors are too small to share
    problem = Problem(num_rounds=num_rounds, num_candidates=num_candidates)
    runs = {rule: run(rule, problem, range(seed, seed + num_seeds)) for rule in RULES}
    panels: dict[str, dict[str, Curve]] = {"cumulative regret": {}, "simple regret": {}}
    rows = []
    for rule, regret in runs.items():
        row = [rule]
        for curves, values, passive, digits in (
            (panels["cumulative regret"], regret.cumulative, runs["passive"].cumulative, 0),
            (panels["simple regret"], regret.simple, runs["passive"].simple, 3),
        ):
            curves[rule] = Curve.of_runs(regret.queries, values)
            row.append(_mean(curves[rule], digits))
            paired = Curve.of_runs(regret.queries, values - passive)
            row.append("" if rule == "passive" else _mean(paired, digits, sign="+"))
        rows.append(row)
    _write(folder / "dueling", panels, "comparisons asked", "regret")
    _print(
        f"Contextual dueling bandit, {num_seeds} seeds, {int(runs['passive'].queries[-1])} comparisons",
        ["rule", "cumulative regret", "less passive's", "simple regret", "less passive's"],
        rows,
    )
    print("±: 95 % interval of the mean; less passive's: of the differences on the same seeds, so below 0 is better")
    _tell(folder)


def _mean(curve: Curve, digits: int, *, sign: str = "") -> str:
    """The last point of a curve with its interval."""
    return f"{curve.middle[-1]:{sign}.{digits}f} ± {curve.high[-1] - curve.middle[-1]:.{digits}f}"


def _write(stem: Path, panels: dict[str, dict[str, Curve]], x_name: str, y_name: str, *, is_log: bool = False) -> None:
    from oatlite.plots import draw, write_table

    curves = {f"{title}: {name}": curve for title, panel in panels.items() for name, curve in panel.items()}
    try:
        write_table(stem.with_suffix(".csv"), curves, x_name)
        draw(stem, panels, x_name=x_name, y_name=y_name, is_log=is_log)
    except OSError as error:
        raise StorageError(f"cannot write into {stem.parent}: {error.strerror}", "give another --output") from None


def _print(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(title)
    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _tell(folder: Path) -> None:
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
