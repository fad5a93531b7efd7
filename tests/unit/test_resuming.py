"""What may change between a run and its continuation: where its oracle is, but not what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oatlite.checkpoint import Checkpoint
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.resuming import require_same_run

SAVED: dict[str, Any] = {"oracle": {"path": "judge"}, "judge": {"model": "j"}, "remote": {"url": "http://h:1"}}


def resumed(**changed: dict[str, Any]) -> None:
    before = Config.model_validate(SAVED)
    about = {"config": before.model_dump(mode="json"), "fingerprints": {"model": "m"}}
    now = Config.model_validate({name: SAVED.get(name, {}) | changed.get(name, {}) for name in SAVED | changed})
    saved = Checkpoint(folder=Path("step-000001"), step=1, about=about, files=())
    require_same_run(saved, now, {"model": "m"})


def refusal(**changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resumed(**changed)
    return str(caught.value)


def test_an_oracle_that_moved_or_wants_to_be_asked_more_gently_is_the_same_one() -> None:
    resumed(
        remote={"url": "http://elsewhere:2", "concurrency": 1, "batch_size": 4, "timeout_s": 5.0},
        judge={"url": "http://elsewhere:3/v1", "concurrency": 1, "timeout_s": 5.0, "key_env": "OTHER_KEY"},
        eval={"every_queries": 99, "url": "http://elsewhere:4", "judge_url": "http://elsewhere:5/v1"},
        timeouts={"oracle_s": 9.0},
    )
    assert "judge.model was 'j' and is 'k'" in refusal(judge={"model": "k"})
    assert "judge.order" in refusal(judge={"order": "random"})
    assert "oracle.flip_prob was 0.0 and is 0.1" in refusal(oracle={"flip_prob": 0.1})
    assert "explore.rule" in refusal(explore={"rule": "sea-ee"})
