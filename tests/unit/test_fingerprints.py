"""Weights of a folder, told from others of the same size by all that is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oatlite import fingerprints
from oatlite.fingerprints import digest_of_pairs, digest_of_weights
from oatlite.preferences import PreferenceSet

PART_BYTES = 4096


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards, the first of two and a half parts."""
    monkeypatch.setattr(fingerprints, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(fingerprints, "BLOCK_BYTES", PART_BYTES // 4)
    (tmp_path / "model-00001.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "model-00002.safetensors").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize("place", [0, PART_BYTES - 1, PART_BYTES, PART_BYTES + PART_BYTES // 2, 256 * 40 - 1])
def test_a_bit_anywhere_tells_weights_apart(place: int, folder: Path) -> None:
    before = digest_of_weights(str(folder))
    file = folder / "model-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert digest_of_weights(str(folder)) != before
    content[place] ^= 1
    file.write_bytes(content)
    assert digest_of_weights(str(folder)) == before


def test_other_files_and_folders_without_weights(folder: Path) -> None:
    before = digest_of_weights(str(folder))
    (folder / "README.md").write_text("edited")
    assert digest_of_weights(str(folder)) == before
    (folder / "model-00002.safetensors").rename(folder / "model-00003.safetensors")
    assert digest_of_weights(str(folder)) != before
    assert digest_of_weights("organisation/model") is None


def pairs(margins: list[float] | None, chosen: int = 2) -> PreferenceSet:
    return PreferenceSet(
        prompts=["a"],
        chosen=["a"],
        rejected=["a"],
        prompt_tokens=[np.array([0], np.int32)],
        chosen_tokens=[np.array([chosen], np.int32)],
        rejected_tokens=[np.array([1], np.int32)],
        margins=None if margins is None else np.array(margins),
        num_dropped=0,
    )


def test_tokens_and_margins_tell_pairs_apart() -> None:
    several = [pairs(None), pairs([0.5]), pairs([0.25]), pairs(None, chosen=3)]
    assert len({digest_of_pairs(each) for each in several}) == 4
    assert digest_of_pairs(pairs([0.5])) == digest_of_pairs(pairs([0.5]))
