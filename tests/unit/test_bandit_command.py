"""``oatlite bandit``, its curves and pictures, and what the dueling bandit shows."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oatlite_cli.main import main

from oatlite.dueling_bandit import RULES, Heads, Problem, run
from oatlite.epistemic import HeadTrainer
from oatlite.maths.ensemble import EpistemicHead
from oatlite.plots import Curve, t_quantile


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_tabular_experiment_prints_orders_and_leaves_curves(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bandit", "tabular", "--seeds", "20", "--updates", "30", "--samples", "256"]) == 0
    printed = capsys.readouterr().out
    orders = {name: float(order) for name, order in re.findall(r"^\s*(\S+(?:form|mixture))\s+([\d.]+)", printed, re.M)}
    assert orders["uniform"] == pytest.approx(1, abs=0.05)
    assert orders["reward-mixture"] == pytest.approx(2, abs=0.15)
    assert orders["policy-mixture"] == pytest.approx(2, abs=0.15)
    ranges = re.findall(r"^\s*\S+(?:form|mixture)\s+([\d.]+)\s+([\d.]+) \.\.\. ([\d.]+)", printed, re.M)
    assert len(ranges) == 3
    for middle, low, high in ranges:
        assert float(low) <= float(middle) <= float(high)
    assert float(ranges[0][2]) < 1.5 < min(float(low) for _, low, _ in ranges[1:]), "no seed could be either"
    folder = tmp_path / "bandit-tabular"
    assert sorted(path.name for path in folder.iterdir()) == ["tabular.csv", "tabular.pdf", "tabular.png"]
    assert (folder / "tabular.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "tabular.pdf").read_bytes().startswith(b"%PDF")
    rows = table(folder / "tabular.csv")
    assert {row["curve"] for row in rows} == {
        f"{kind}: {name}" for kind in ("exact gradients", "gradients of 256 pairs") for name in orders
    }
    exact = [float(row["middle"]) for row in rows if row["curve"] == "exact gradients: uniform"]
    assert len(exact) == 30 and exact == sorted(exact, reverse=True)


def test_an_order_that_cannot_be_fitted_is_said(tmp_path: Path, capsys) -> None:
    assert main(["bandit", "tabular", "--updates", "2", "--samples", "16", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("too few updates to fit") == 3 and "nan" not in printed


def test_the_dueling_experiment_runs_every_rule(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    arguments = ["--seeds", "2", "--rounds", "3", "--candidates", "4", "--output", str(folder)]
    assert main(["bandit", "dueling", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(f" {rule} " in printed for rule in RULES) and "24 comparisons" in printed
    assert printed.count("±") == 4 * len(RULES) - 2 + 1, "means, and differences but for passive's from itself"
    assert (folder / "dueling.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "dueling.pdf").read_bytes().startswith(b"%PDF")
    rows = table(folder / "dueling.csv")
    assert {float(row["comparisons asked"]) for row in rows} == {8, 16, 24}
    assert len(rows) == 2 * len(RULES) * 3


def test_exploring_regrets_less_than_choosing_blindly() -> None:
    problem = Problem(num_rounds=30)
    ee, bai, passive = (run(rule, problem, range(4)) for rule in ("sea-ee", "sea-bai", "passive"))
    assert (ee.cumulative[:, -1] < 0.75 * passive.cumulative[:, -1]).all()
    assert (bai.cumulative[:, -1] < 0.85 * passive.cumulative[:, -1]).all()
    assert (np.diff(ee.cumulative) >= 0).all() and ee.simple.shape == (4, 30)
    assert (ee.simple[:, -1] < 0.7 * ee.simple[:, 0]).all()
    assert ee.simple[:, -1].mean() < passive.simple[:, -1].mean() > bai.simple[:, -1].mean()
    again = run("sea-ee", problem, range(4))
    assert (again.cumulative == ee.cumulative).all(), "a function of the seeds"


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_gives_the_same_whatever_runs_beside_it(rule: str) -> None:
    problem = Problem(num_rounds=5)
    together = run(rule, problem, [3, 4, 5])
    for i, seed in enumerate((3, 4, 5)):
        alone = run(rule, problem, [seed])
        assert np.allclose(alone.cumulative[0], together.cumulative[i], rtol=1e-5)
        assert np.allclose(alone.simple[0], together.simple[i], rtol=1e-5)


def test_heads_of_many_seeds_learn_as_the_trainer_would_each() -> None:
    problem = Problem(num_members=3, hidden_size=8, num_features=4, num_steps=3, batch_size=16)
    heads = Heads(problem, [5, 6])
    draws = torch.Generator().manual_seed(0)
    trainers = [
        HeadTrainer(EpistemicHead(4, num_members=3, hidden_size=8, seed=seed), num_steps=3, batch_size=16)
        for seed in (5, 6)
    ]
    for asked in (10, 20, 30):
        chosen, rejected = torch.randn(2, 2, 10, 4, generator=draws)
        heads.add(chosen, rejected)
        heads.learn(asked)
        for i, one in enumerate(trainers):
            one.add(chosen[i], rejected[i])
            one.learn(asked)
    features = torch.randn(2, 7, 5, 4, generator=draws)
    for i, one in enumerate(trainers):
        untrained = EpistemicHead(4, num_members=3, hidden_size=8, seed=5 + i)
        expected, before = centred(one.head(features[i])), centred(untrained(features[i]))
        assert torch.allclose(centred(heads.rewards(features)[i]), expected, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-3)


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """Less each member's mean: no comparison says where that lies, so it follows rounding."""
    return rewards - rewards.mean((1, 2), keepdim=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabular", "--beta", "0"], "give one above 0"),
        (["triangular"], "'tabular', 'dueling'"),
        (["tabular", "--actions", "1"], "must be at least 2"),
        (["tabular", "--output", "file/below"], "cannot make file/below"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["bandit", *arguments]) in (2, 5)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_quantiles_of_student_are_those_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 19: 2.093, 120: 1.980}
    for freedom, expected in known.items():
        assert t_quantile(freedom) == pytest.approx(expected, rel=3e-3)


def test_bands_are_of_the_mean_and_of_the_middle_half() -> None:
    runs = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    mean = Curve.of_runs(np.arange(2.0), runs)
    assert mean.middle.tolist() == [3, 5] and mean.low[1] == mean.high[1] == 5
    assert mean.high[0] - 3 == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    assert Curve.of_runs(np.arange(2.0), runs[:1]).low.tolist() == [1, 5], "one run has no band"
    middle = Curve.of_quantiles(np.arange(2.0), runs)
    assert (middle.low[0], middle.middle[0], middle.high[0]) == (2, 3, 4)


def trainer(**options) -> HeadTrainer:
    return HeadTrainer(EpistemicHead(4, num_members=3, hidden_size=8), **options)


def test_the_buffer_is_bounded_and_the_pull_falls_with_queries() -> None:
    head = trainer(buffer_size=100, batch_size=32)
    assert head.learn(0) == {}, "nothing to learn from"
    chosen, rejected = torch.randn(2, 70, 4, generator=torch.Generator().manual_seed(0))
    head.add(chosen, rejected)
    head.add(chosen + 1, rejected + 1)
    assert len(head) == 100
    assert head.learn(140)["pull"] == pytest.approx(0.5 * 32 / 140)
    assert trainer_with(chosen, rejected, is_pull_fixed=True).learn(140)["pull"] == 0.5
    held = head.state()["comparisons"]
    assert torch.equal(held[-70:, 0], chosen + 1) and torch.equal(held[:30, 0], chosen[-30:])


def test_the_newest_comparisons_are_held_in_their_order_however_they_came() -> None:
    head = trainer(buffer_size=10)
    seen = torch.arange(60.0).view(30, 2, 1).expand(-1, -1, 4)
    for start, end in ((0, 3), (3, 4), (4, 11), (11, 11), (11, 20), (20, 30)):
        head.add(*seen[start:end].unbind(1))
        assert torch.equal(head.state()["comparisons"], seen[max(0, end - 10) : end])
    head.add(*seen.unbind(1))
    assert torch.equal(head.state()["comparisons"], seen[-10:])


def trainer_with(chosen: torch.Tensor, rejected: torch.Tensor, **options) -> HeadTrainer:
    head = trainer(**options)
    head.add(chosen, rejected)
    return head


def test_a_restored_trainer_goes_on_as_the_one_that_never_stopped() -> None:
    chosen, rejected = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    whole = trainer_with(chosen, rejected, buffer_size=150)
    whole.add(chosen[:40], rejected[:40])  # around the end of the ring
    whole.learn(200)
    stopped = trainer(buffer_size=150)
    stopped.restore(copy.deepcopy(whole.state()))
    assert stopped.learn(200) == whole.learn(200)
    assert torch.equal(stopped.head(chosen), whole.head(chosen))
