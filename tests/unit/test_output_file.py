"""A file is there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oatlite.errors import ConfigError, StorageError
from oatlite.output_file import json_lines, require_writable, write_complete

JSONL = (".jsonl",)


def test_rows_arrive(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_complete(path, json_lines([{"a": "é"}, {"a": 1}]))
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 1}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def lines() -> Iterator[str]:
        yield "one\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_complete(tmp_path / "rows.jsonl", lines())
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_made_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    require_writable(path, JSONL)
    path.write_text("theirs")
    with pytest.raises(StorageError, match="meanwhile"):
        write_complete(path, ["ours"])
    assert path.read_text() == "theirs"
    write_complete(path, ["ours"], overwrite=True)
    assert path.read_text() == "ours" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_will_not_do_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name, words in (
        ("there.jsonl", "--overwrite"),
        ("folder.jsonl", "is a folder"),
        ("rows.txt", "name it rows.jsonl"),
        ("there.jsonl/rows.jsonl", "cannot write beside"),
    ):
        with pytest.raises(ConfigError, match=words):
            require_writable(tmp_path / name, JSONL)
    require_writable(tmp_path / "there.jsonl", JSONL, overwrite=True)
    require_writable(tmp_path / "new" / "rows.jsonl", JSONL)
