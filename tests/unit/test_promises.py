"""SECURITY.md and FAULTS.md say how each promise is tested: those tests are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def rows_of(document: str) -> list[tuple[str, ...]]:
    """The rows of its tables, without their heads."""
    text = (ROOT / ".github" / document).read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in re.findall(r"^\|.*\|$", text, re.M)
    ]
    return [row for row in rows if row[0].strip() not in ("promise", "row") and not row[0].startswith("---")]


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def test_every_promise_names_tests_that_there_are() -> None:
    rows = rows_of("SECURITY.md")
    assert len(rows) >= 10
    for promise, how in rows:
        named = re.findall(r"`([\w/]+\.py)`", how)
        assert named, promise
        for name in named:
            paths = [path for folder in (TESTS, TESTS / "integration", ROOT) if (path := folder / name).is_file()]
            assert paths, name
            assert name.startswith("benchmarks/") or any(functions_of(paths[0])), f"{name} tests nothing"


def test_every_fault_has_a_test_and_every_marked_test_a_fault() -> None:
    marked: dict[str, list[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        for test in functions_of(path):
            for mark in test.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for argument in mark.args:
                        marked.setdefault(str(ast.literal_eval(argument)), []).append(test.name)
    rows = [row[0] for row in rows_of("FAULTS.md")]
    assert rows == ["1", "2", "3", "3b", *map(str, range(4, 21))]
    assert sorted(marked) == sorted(rows)
