"""SECURITY.md says how each promise is tested: those tests are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github" / "SECURITY.md").read_text(encoding="utf-8")


def test_every_promise_names_tests_that_there_are() -> None:
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+) \|$", TEXT, flags=re.MULTILINE)
    assert len(rows) >= 10
    for promise, how in rows:
        named = re.findall(r"`([\w/]+\.py)`", how)
        assert named, promise
        for name in named:
            folders = [ROOT / "tests", ROOT / "tests" / "integration", ROOT]
            assert any((folder / name).is_file() for folder in folders), name
