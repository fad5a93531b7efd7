"""The algorithm that the README writes, rehearsed as the README says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block.partition("```")[0] for block in README.read_text().split("```python\n")[1:]]
    (mine,) = [block for block in blocks if block.startswith("# mine.py\n")]
    (rehearsal,) = [block for block in blocks if "import rehearse\n" in block]
    (tmp_path / "mine.py").write_text(mine)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    names: dict[str, Any] = {}
    exec(rehearsal, names)
    first, *_, last = [record["reward"] for record in names["run"].journal.of("eval")]
    assert last > first + 2
    assert str(last) in capsys.readouterr().out
