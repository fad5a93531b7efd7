"""The folder of a run: claimed whole or not at all, and what is left there by workers killed in the last save."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oatlite.config.schema import Config
from oatlite.errors import StorageError
from oatlite.output_folder import complete_or_absent
from oatlite.run_folder import create_run_dir, held, remove_half_written
from oatlite.workers import learned


def half_written_folder(path: Path) -> Path:
    """As ``complete_or_absent`` begins it, when nothing ends it."""
    begun = complete_or_absent(path)
    work = begun.__enter__()
    (work / "model.safetensors").write_bytes(b"x" * 1000)
    kept = work.rename(work.with_name("kept"))
    assert not begun.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    return kept.rename(work)


@pytest.mark.parametrize("refused", ["mkdir", "write_text"])
@pytest.mark.parametrize("had", [(), ("notes.txt",)])
def test_a_full_disk_leaves_the_folder_as_it_was_and_its_name_free(
    refused: str, had: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"run": {"dir": str(tmp_path), "name": "mine"}})
    for name in had:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).touch()
    original = getattr(Path, refused)

    def refuses(path: Path, *arguments: object, **named: object) -> object:
        if path.name in ("logs", "config.toml"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, refused, refuses)
        with pytest.raises(StorageError, match=r"mine: No space left on device; \d+ bytes are free; free space"):
            create_run_dir(config)
    assert [path.name for path in tmp_path.glob("mine/*")] == list(had)
    assert (tmp_path / "mine").exists() == bool(had)
    assert create_run_dir(config) == tmp_path / "mine"


def test_nothing_half_written_is_left_by_a_run_that_ends_and_nothing_else_goes(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    others = [tmp_path / name for name in (".model", ".model.backup.d", ".models.x1y2z3_w", "other")]
    for folder in others:
        folder.mkdir()
    (tmp_path / ".model.x1y2z3_w").touch()  # a file is nobody's model
    with held(tmp_path):
        half = [half_written_folder(tmp_path / name) for name in ("model", "adapter", "head")]
    assert not any(path.exists() for path in half)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in others),
        ".model.x1y2z3_w",
        "config.toml",
    }
    again = half_written_folder(tmp_path / "head")
    assert remove_half_written(tmp_path) == [again.name]
    assert remove_half_written(tmp_path) == []


def test_an_adapter_or_a_head_without_the_model_goes_and_with_it_stays(tmp_path: Path) -> None:
    for name in ("adapter", "head"):
        (tmp_path / name).mkdir()
    assert remove_half_written(tmp_path) == ["adapter", "head"]
    for name in ("adapter", "head", "model"):
        (tmp_path / name).mkdir()
    assert remove_half_written(tmp_path) == []


@pytest.mark.fault("9")
@pytest.mark.parametrize(("fails", "left"), [("adapter", set()), ("head", {"adapter"}), ("model", {"adapter", "head"})])
def test_the_model_that_says_that_a_run_is_finished_comes_last(
    fails: str, left: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(name: str) -> Callable[..., None]:
        def write(*_: object, **__: object) -> None:
            if name == fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return write

    for function, name in {"save_policy": "model", "write_adapter": "adapter", "save_head": "head"}.items():
        monkeypatch.setattr(learned, function, writes(name))
    config = Config.model_validate(
        {
            "model": {"path": "policy"},
            "lora": {"rank": 4, "alpha": 8},
            "oracle": {"path": ["reward"]},
            "data": {"prompts": "prompts"},
        }
    )
    spec: Any = SimpleNamespace(index=0, config=config, run_dir=tmp_path)
    weights: Any = {"merged": {}, "adapter": {}}
    with pytest.raises(StorageError, match="are free"):
        learned.leave_behind(spec, SimpleNamespace(model=None), weights, SimpleNamespace())  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == left
