"""What is said of oracles before a process is spawned: what cannot be added up, and templates that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_folders import byte_tokenizer, save_model
from small_pairrm import save_pairrm

from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.oracle_checks import check_oracle_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "reward": save_model(folder / "reward", reward=True),
        "chatty": save_model(folder / "chatty", reward=True, tokenizer=byte_tokenizer(chat=True)),
        "pairrm": save_pairrm(folder / "pairrm")[0],
    }


def check(*paths: str, **oracle: Any) -> list[str]:
    settings = {"oracle": {"path": list(paths), **oracle}, "sampling": {"max_new_tokens": 8}}
    return check_oracle_models(Config.model_validate(settings))


@pytest.mark.parametrize("name", ["remote", "judge", "pairrm"])
def test_an_oracle_that_only_compares_cannot_be_added_to_another(name: str, models: dict[str, str]) -> None:
    path = models.get(name, name)
    assert check(path) == []
    for paths in ((path, models["reward"]), (models["reward"], path)):
        with pytest.raises(ConfigError) as caught:
            check(*paths)
        assert str(caught.value) == f"the oracle {path} only compares, and rewards are what can be added; give it alone"


def test_a_template_is_for_a_reward_model_that_has_one(models: dict[str, str]) -> None:
    assert check(models["chatty"], chat_template=True) == []
    [note] = check(models["chatty"])
    assert f"the reward model {models['chatty']} has a chat template, and reads plain text" in note
    with pytest.raises(ConfigError, match=r"reward has no chat template; set oracle\.chat_template = false"):
        check(models["reward"], chat_template=True)
    with pytest.raises(ConfigError, match=r"PairRM reads plain text.*; oracle\.chat_template = false"):
        check(models["pairrm"], chat_template=True)


def test_a_folder_is_named_as_it_was_given(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(models["chatty"]).parent)
    [note] = check("chatty")
    assert note.startswith("the reward model chatty has a chat template")
