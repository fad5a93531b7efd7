"""The commands that a command suggests next: they name what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oatlite_cli import generate, reward_model
from oatlite_cli.building import command
from oatlite_cli.main import main

from oatlite.config.schema import Config
from oatlite.resuming import how_to_go_on
from oatlite.run_folder import summary


def suggested_after_reward_model(tmp_path: Path, row: dict[str, Any], **keys: str | None) -> str:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    pairs = (keys.get("chosen"), keys.get("rejected"))
    given = reward_model._Keys(str(data), "train", "prompt", pairs, "reference")
    made = reward_model._Made(
        num_parameters=10**9, num_comparisons=1, left_out="", accuracy=1.0, num_held_out=1, seconds=1.0
    )
    return reward_model._next("policy", given, tmp_path / "reward", made).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("row", "keys", "prompts"),
    [
        ({"prompt": "p", "reference": "a"}, {}, "data.jsonl"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {}, "data.jsonl --reference-key chosen"),
        ({"prompt": "p", "g": "a", "b": "b"}, {"chosen": "g", "rejected": "b"}, "data.jsonl --reference-key g"),
        ({"chosen": [{"role": "user", "content": "p"}], "rejected": []}, {}, "PROMPTS"),
    ],
)
def test_what_a_reward_model_is_trained_on_gives_prompts_and_references(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, str], prompts: str
) -> None:
    following = suggested_after_reward_model(tmp_path, row, **keys)
    assert following == f"oatlite train --model policy --oracle reward --prompts {prompts}"


@pytest.mark.parametrize("name", ["judge", "remote", "pairrm", "demo"])
def test_a_reward_models_folder_has_no_name_that_means_another_oracle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reward-model", "--model", "tiny-llama", "--data", "gone.jsonl", "--output", name]) == 2
    assert f"type --output {name}-model" in capsys.readouterr().err
    assert main(["reward-model", "--model", "tiny-llama", "--data", "gone.jsonl", "--output", f"under/{name}"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_commands_start_with_what_finds_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def printed() -> list[str]:
        return [command("eval", {}, {}), how_to_go_on(tmp_path), *summary(Config(), {}, tmp_path, 1.0)["next"]]

    monkeypatch.delenv("OATLITE_COMMAND", raising=False)
    bare = printed()
    assert bare[0] == "oatlite eval"
    monkeypatch.setenv("OATLITE_COMMAND", "/a b/.venv/bin/oatlite")
    assert printed() == [line.replace("oatlite ", "'/a b/.venv/bin/oatlite' ", 1) for line in bare] != bare


def test_what_is_generated_is_judged_on_the_same_prompts() -> None:
    given = {"model": "m", "prompts": "p.jsonl", "adapter": None, "temperature": 0.5, "seed": 3}
    plain = "oatlite eval --model m --against references --oracle REWARD_MODEL --prompts p.jsonl"
    assert generate._eval_of(given) == plain
    keys = {"prompt_key": "q", "reference_key": "a", "split": "test", "chat_template": False}
    flags = "--prompt-key q --reference-key a --split test --no-chat-template"
    assert generate._eval_of(given | keys) == f"{plain} {flags}"
    assert generate._eval_of(given | {"adapter": Path("adapter")}) is None
