"""What counts as a full disk, however a library passes it on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from oatlite.errors import StorageError, as_storage_error, system_error
from oatlite.output_folder import complete_or_absent

FULL = os.strerror(errno.ENOSPC)


def raised(error: Exception, over: BaseException | None = None) -> Exception:
    try:
        raise error from over
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, FULL, "/runs/x"), f"cannot write /runs/x: {FULL}; free space on that disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; free space on that disk"),
        (raised(RuntimeError("writing failed"), OSError(errno.ENOSPC, FULL)), f"{FULL}; free space on that disk"),
        (raised(OSError(errno.EIO, "closing"), OSError(errno.ENOSPC, FULL)), f"{FULL}; free space on that disk"),
        (ValueError(f"I/O error: {FULL} (os error 28)"), f"{FULL}; free space on that disk"),
    ],
)
def test_a_full_disk_is_known(error: Exception, words: str, tmp_path: Path) -> None:
    assert str(as_storage_error(error)) == words
    with pytest.raises(StorageError, match="free space on that disk"), complete_or_absent(tmp_path / "model"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), RuntimeError("x"), OSError("of no number")])
def test_anything_else_is_none(error: Exception) -> None:
    assert as_storage_error(error) is None
    assert system_error(error) is (error if isinstance(error, OSError) else None)


def test_what_is_not_the_disks_comes_out_of_a_folder_as_it_is(tmp_path: Path) -> None:
    error = raised(RuntimeError("of another kind"), PermissionError(errno.EACCES, "denied"))
    with pytest.raises(RuntimeError, match="of another kind"), complete_or_absent(tmp_path / "model"):
        raise error
    with pytest.raises(StorageError, match=r"cannot write .*model: denied$"), complete_or_absent(tmp_path / "model"):
        raise PermissionError(errno.EACCES, "denied")
