"""benchmarks/exploration.py goes on where it stopped, with a stand-in for the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import exploration
import report


class FakeTraining:
    """Leaves the records of a run whose win rate rises by a tenth with each run that was really made."""

    def __init__(self) -> None:
        self.flags: list[list[str]] = []

    def __call__(self, flags: list[str], run_folder: Path) -> None:
        self.flags.append(flags)
        run_folder.mkdir(parents=True)
        rate = len(self.flags) / 10
        records = [
            {"kind": "eval", "queries": queries, "win_rate": rate, "gold_score": 0.5} for queries in (0, 128, 256)
        ]
        lines = [*records, {"kind": "step", "queries": 64}]
        (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_a_run_is_repeated_only_by_another_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = FakeTraining()

    def rate(method: str = "sea-ee", seed: int = 0, queries: int = 256) -> float:
        result = exploration.run(method, seed, queries, tmp_path, train)
        assert result["queries"] == [0, 128, 256]
        return float(result["win_rate"][-1])

    assert [rate(), rate()] == [0.1, 0.1], "kept, and not made again"
    assert [rate(seed=1), rate(queries=512), rate("passive"), rate()] == [0.2, 0.3, 0.4, 0.1]
    monkeypatch.setitem(exploration.METHODS, "sea-ee", ["--explore", "sea-ee", "--set", "explore.members=5"])
    assert [rate(), rate()] == [0.5, 0.5], "a method whose flags have changed is another"
    monkeypatch.undo()
    assert rate() == 0.1 and len(train.flags) == 5


def test_the_table_the_picture_and_the_result_have_a_row_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    arguments = ["--methods", "passive,sea-ee", "--seeds", "3", "--queries", "256", "--folder", str(tmp_path)]
    train = FakeTraining()
    assert exploration.main(arguments, train) == 0 and len(train.flags) == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:8] == ["passive", "0", "of", "3", "runs", "0.200", "±", "0.248"], "t(0.975, 2) sd / sqrt 3"
    assert lines[2].split()[0] == "sea-ee" and lines[2].split()[5:8] == ["0.500", "±", "0.248"]
    [saved] = (tmp_path / "results").iterdir()
    rows = json.loads(saved.read_text())["rows"]
    assert [(row["method"], row["win_rate"], len(row["machines"])) for row in rows] == [
        ("passive", [0.1, 0.2, pytest.approx(0.3)], 1),
        ("sea-ee", [0.4, 0.5, 0.6], 1),
    ]
    assert {path.name for path in tmp_path.glob("exploration.*")} == {f"exploration.{n}" for n in ("csv", "png", "pdf")}


def test_a_run_that_failed_is_made_again(tmp_path: Path) -> None:
    def fails(flags: list[str], run_folder: Path) -> None:
        raise SystemExit("no")

    with pytest.raises(SystemExit):
        exploration.run("passive", 0, 256, tmp_path, fails)
    assert exploration.run("passive", 0, 256, tmp_path, FakeTraining())["win_rate"] == [0.1, 0.1, 0.1]


def test_every_method_is_in_a_panel_and_reaches_the_goal_where_its_line_crosses_it() -> None:
    assert {name for names in exploration.PANELS.values() for name in names} == set(exploration.METHODS)
    crossing = {"queries": [0, 100, 200], "win_rate": [0.3, 0.7, 0.9]}
    assert exploration.queries_to(0.8, crossing) == pytest.approx(150)
    assert exploration.queries_to(0.95, crossing) is None
