"""Options that name the environment variable of a secret: the secret itself, pasted there, is refused and not shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from oatlite_cli.main import main

from oatlite.config.load import load_config
from oatlite.errors import ConfigError

KEYS = ("judge.key_env", "remote.token_env", "eval.judge_key_env", "eval.token_env")
PASTED = ("sk-proj-A1b2C3d4E5", "hf_QwErTyUiOpAsDfGh", "ca9a7e0123456789abcdef", "A1B2-C3D4 E5", "12345678901234567890")


@pytest.mark.parametrize("secret", PASTED)
@pytest.mark.parametrize("key", KEYS)
def test_a_secret_in_place_of_a_name_is_refused_and_not_shown(
    key: str, secret: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "demo", "--dry-run", "--set", f"{key}={secret}"]) == 2
    shown = "".join(capsys.readouterr())
    assert f"{key} (--set {key}=...) must be " in shown and shown.count("\n") == 1
    assert secret not in shown
    section, _, name = key.partition(".")
    (tmp_path / "given.toml").write_text(f"[{section}]\n{name} = '{secret}'\n")
    with pytest.raises(ConfigError, match="the name of an environment variable, in capitals") as caught:
        load_config(preset="demo", file=tmp_path / "given.toml", num_gpus=0)
    assert secret not in str(caught.value) and "given.toml" in str(caught.value)


def test_a_secret_is_not_shown_by_other_refusals_either(capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (["judge.key_env=sk-one-A1", "judge.key_env=sk-two-A1"], ['judge.key_env="sk-one-A1']):
        sets = [word for setting in settings for word in ("--set", setting)]
        assert main(["label", "--oracle", "judge", "--data", "d.jsonl", "--output", "o.jsonl", *sets]) == 2
        shown = "".join(capsys.readouterr())
        assert "judge.key_env" in shown and shown.count("\n") == 1 and "sk-" not in shown


def test_a_name_is_taken_quoted_or_not() -> None:
    for typed in ("judge.key_env=MY_KEY", 'judge.key_env="MY_KEY"'):
        assert load_config(flags={"oracle.path": ["judge"]}, sets=[typed], num_gpus=0).judge.key_env == "MY_KEY"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("judge.api_key=SECRET", "there is no option judge.api_key (--set judge.api_key=...); did you mean judge.key"),
        ("OPENAI_API_KEY=SECRET", "there is no option OPENAI_API_KEY"),
        ("algorithm.hub_token=SECRET", "there is no option algorithm.hub_token"),
        ('algorithm.options={api_key="SECRET"}', "there is no option algorithm.options"),
        ('judge.password="SECRET', "--set judge.password=...: no valid TOML value"),
        ("judge=SECRET", "judge (--set judge=...) is a section"),
        ("judge.api_key SECRET", "--set without a setting"),
        ("judge.url=http://me:SECRET@host:1", "--set judge.url=... is for --oracle judge"),
        ("remote.url=https://host/?token=SECRET", "--set remote.url=... is for --oracle remote"),
    ],
)
def test_a_secret_under_a_name_that_there_is_none_of_is_not_shown(
    setting: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-canary-19c4"
    assert main(["train", "--preset", "demo", "--dry-run", "--set", setting.replace("SECRET", secret)]) == 2
    shown = "".join(capsys.readouterr())
    assert words in shown and secret not in shown and shown.count("\n") == 1


def test_an_address_with_a_secret_that_is_given_twice_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--judge-url", "http://me:sk-canary-19c4@one:1", "--set", "judge.url=http://me:sk-canary-19c4@two:1"]
    assert main(["train", "--preset", "demo", "--dry-run", "--oracle", "judge", *address]) == 2
    shown = "".join(capsys.readouterr())
    assert "judge.url is given twice: --judge-url and --set judge.url=..." in shown and "sk-canary" not in shown
