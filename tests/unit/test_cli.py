"""The command line: help, one line per mistake, exit codes, and the dry run."""

from __future__ import annotations

import errno
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from oatlite_cli.dry_run import report
from oatlite_cli.main import COMMANDS, app_for, main
from typer.main import get_command

import oatlite
from oatlite.config.flags import FLAGS, to_type
from oatlite.config.load import load_config, preset_names, resolve
from oatlite.errors import OracleError


@pytest.fixture(autouse=True)
def _on_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that would have been trained."""
    from types import ModuleType

    configs: list[Any] = []
    run = ModuleType("oatlite.run")
    run.train = lambda config: configs.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "oatlite.run", run)
    return configs


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command line that must be refused with exit code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("oatlite: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"oatlite {oatlite.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_and_its_line_in_the_list_is_its_own(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    load, line = COMMANDS[name]
    assert main([name, "--help"]) == 0
    assert "Usage: oatlite" in capsys.readouterr().out
    assert (load().__doc__ or "").splitlines()[0].rstrip(".") == line.rstrip(".")
    assert len(line) <= 60, "it stands whole in 80 columns"


def test_each_flag_of_train_is_an_option_of_the_configuration() -> None:
    command = get_command(app_for(["train"])).commands["train"]  # type: ignore[attr-defined]
    flags = {option for parameter in command.params for option in parameter.opts}
    other = {"--config", "--preset", "--set", "--dry-run"}
    assert flags == set(FLAGS.values()) | other
    assert all(parameter.help for parameter in command.params)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--lrr", "1"], "did you mean --lr"),
        (["train", "--dri-run"], "did you mean --dry-run"),
        (["trian"], "Did you mean 'train'"),
        (["train", "--lr", "fast"], "--lr"),
        (["train", "--lr"], "requires an argument"),
        (["train", "surplus"], "surplus"),
        (["train", "--zzzzzz"], "oatlite train --help"),
        (["--zzzzzz"], "oatlite --help"),
        (["train", "--lr", "-1"], "learner.lr = -1.0 (--lr) must be greater than 0"),
        (["train", "--gpus", "2"], "--gpus 0"),
        (["train", "--gpus", "two"], "'--gpus': must be a whole number;"),
        (["sft", "--lr", "fast"], "'--lr': must be a number;"),
        (["sft", "--epochs", "0"], "'--epochs': must be at least 1;"),
        (["generate", "--gpus", "2"], "'--gpus': must be at most 1;"),
        (["sft", "--dtype", "float16"], "'--dtype': 'float16' is not one of 'float32', 'bfloat16';"),
        (["train", "--judge-model", "m"], "add --oracle judge"),
        (["train", "--oracle-url", "http://h:1"], "add --oracle remote"),
        (["train", "--eval-every", "4", "--eval-every-queries", "100"], "both say when to evaluate"),
        (["train", "--oracle-weights", "1,2"], "there is 1 oracle;"),
        (["train", "--config", "gone.toml"], "gone.toml"),
        (["train", "--preset", "gone"], "no preset"),
        (["train", "--set", "learner.lrr=1"], "learner.lr"),
        (["train", "--ui", "big"], "'auto', 'live' or 'plain'"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in one_line(capsys, *arguments)


def test_failures_have_their_exit_codes(
    capsys: pytest.CaptureFixture[str], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> Any:
        def train(config: Any) -> int:
            raise error

        return train

    run = sys.modules["oatlite.run"]
    monkeypatch.setattr(run, "train", fail(OracleError("the oracle\nis silent", "start it")))
    assert main(["train"]) == 6
    assert capsys.readouterr().err == "oatlite: error: the oracle is silent; start it\n"
    monkeypatch.setattr(run, "train", fail(KeyboardInterrupt()))
    assert main(["train"]) == 130
    monkeypatch.setattr(run, "train", lambda config: 143)
    assert main(["train"]) == 143
    monkeypatch.setattr(run, "train", fail(OSError(errno.ENOSPC, "No space left on device", "/tmp/x")))
    assert main(["train"]) == 5
    told = "oatlite: error: cannot write /tmp/x: No space left on device; free space on that disk\n"
    assert capsys.readouterr().err.endswith(told)
    monkeypatch.setattr(run, "train", fail(FileNotFoundError(errno.ENOENT, "a bug too", "/tmp/x")))
    with pytest.raises(FileNotFoundError, match="a bug too"):
        main(["train"])
    monkeypatch.setattr(run, "train", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


# Training


def test_a_bare_command_trains_the_demo(trained: list[Any]) -> None:
    assert main(["train"]) == 0
    assert trained[0].model.path == "demo"
    assert trained[0].placement.gpus == 0
    assert trained[0].run.name is not None


def test_flags_win_over_the_file_and_only_when_given(trained: list[Any]) -> None:
    Path("given.toml").write_text("[learner]\nlr = 2e-4\npasses = 2\n[run]\nwandb = true\n[data]\nepochs = 3\n")
    assert main(["train", "--config", "given.toml", "--lr", "3e-4", "--set", "data.epochs=4", "--chat-template"]) == 0
    config = trained[0]
    assert (config.learner.lr, config.learner.passes, config.data.epochs) == (3e-4, 2, 4)
    assert config.run.wandb is True, "a flag that was not given does not switch it off"
    assert config.data.chat_template is True
    assert main(["train", "--config", "given.toml", "--no-wandb"]) == 0
    assert trained[1].run.wandb is False


def test_every_flag_reaches_its_option(trained: list[Any]) -> None:
    default = resolve(load_config(num_gpus=0), 0)
    values: dict[str, Any] = {
        "run.name": "n", "run.dir": "d", "run.seed": 9, "run.ui": "plain", "run.wandb": True,
        "model.path": "m", "model.reference": "r", "data.prompts": "p", "data.prompt_key": "k",
        "data.reference_key": "rk", "data.split": "s", "data.chat_template": True, "data.max_prompt_tokens": 7,
        "data.max_prompts": 800, "data.epochs": 2, "data.max_queries": 900, "algorithm.name": "dpo",
        "algorithm.beta": 0.7, "learner.lr": 0.3, "rollout.sync_every": 4, "sampling.max_new_tokens": 5,
        "rollout.sampler": "hybrid",
        "sampling.temperature": 0.2, "rollout.prompts_per_step": 80, "learner.batch_size": 40,
        "learner.micro_batch_size": 4, "oracle.path": ("o", "judge"), "oracle.weights": "0.7,0.3",
        "explore.rule": "sea-ee", "explore.num_candidates": 5,
        "oracle.flip_prob": 0.1, "remote.url": "http://h:1", "judge.model": "j", "judge.url": "http://h:2",
        "placement.gpus": 0, "placement.actors": 2,
        "lora.rank": 16, "learner.reference_offload": True,
        "placement.learners": 2, "placement.gpus_per_actor": 2,
        "eval.every": 3, "eval.prompts": 11,
        "eval.oracle": ("remote",), "eval.best_of_n": 4,
            "checkpoint.save_every": 7, "checkpoint.keep_last": 3,
    }  # fmt: skip
    # Flags that go with no rollouts, and with what does not contradict them.
    offline: dict[str, Any] = {"rollout.offline": True, "data.preferences": "p", "model.path": "m"}
    ahead: dict[str, Any] = {"rollout.asynchronous": True, "rollout.max_staleness": 3, "eval.every_queries": 99}
    assert set(values | offline | ahead) == set(FLAGS), "a new flag needs a value here"
    for number, given in enumerate((values, offline, ahead)):
        typed = [word for key, value in given.items() for word in to_type(key, value).split()]
        assert main(["train", *typed]) == 0
        for key, value in given.items():
            section, _, name = key.partition(".")
            expected = (0.7, 0.3) if key == "oracle.weights" else value
            assert getattr(getattr(trained[number], section), name) == expected, key
            if key != "placement.gpus":
                assert getattr(getattr(default, section), name) != value, f"{key} proves nothing with its default"


# Dry run


def test_a_dry_run_says_it_all_and_starts_nothing(capsys: pytest.CaptureFixture[str], trained: list[Any]) -> None:
    assert main(["train", "--dry-run", "--seed", "17"]) == 0
    text = capsys.readouterr().out
    assert trained == []
    assert not list(Path().iterdir()), "not even a folder"
    for words in ("seed", "17", "learner 0  CPU", "actor 0    CPU", "at most 24", "Missing here: nothing"):
        assert words in text
    assert "Downloads: nothing" in text
    assert ["template", "general"] in [line.split() for line in text.splitlines()], "what a judge would be asked"


def test_a_dry_run_warns_of_an_epoch_that_ends_between_two_syncs(capsys: pytest.CaptureFixture[str]) -> None:
    """9,990 prompts are 24 steps of 400, and the preset syncs every 25."""
    for prompts, is_told in ((9990, True), (10000, False)):
        assert main(["train", "--dry-run", "--preset", "online", "--max-prompts", str(prompts)]) == 0
        assert ("Warning: an epoch has 24 steps" in capsys.readouterr().out) == is_told
    assert main(["train", "--dry-run", "--preset", "tldr-offline"]) == 0
    assert "Warning" not in capsys.readouterr().out, "a run that never syncs is meant to"


def test_a_dry_run_reports_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--preset", "tldr"]) == 0
    text = capsys.readouterr().out
    for words in ("GPUs: 2 asked, none here", "GPU 1 (missing)", "model.path: trl-lib/", "data.prompts: lkevinzc/"):
        assert words in text
    assert "GPU 1 (missing): not known without the size of trl-lib/" in text, "of what is here, a line of GiB"


@pytest.mark.parametrize("preset", preset_names())
def test_a_dry_run_takes_every_preset(preset: str, capsys: pytest.CaptureFixture[str], trained: list[Any]) -> None:
    assert main(["train", "--dry-run", "--preset", preset]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Dry run: nothing was started."
    assert "Response:" not in {line.strip(" #") for line in lines}, "a value is one line"
    assert not trained


def test_a_dry_run_shows_the_gpus_of_each_actor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--preset", "demo", "--gpus-per-actor", "2"]) == 0
    assert "actor 0    CPU, 2 processes" in capsys.readouterr().out
    assert main(["train", "--dry-run", "--preset", "demo", "--gpus", "3", "--gpus-per-actor", "2"]) == 0
    assert "actor 0    GPU 1 (missing), GPU 2 (missing)" in capsys.readouterr().out
    assert main(["train", "--dry-run", "--preset", "demo", "--algo", "xpo", "--gpus-per-actor", "2"]) == 2
    assert "type --gpus-per-actor 1" in capsys.readouterr().err


def test_a_dry_run_refuses_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--preset", "demo", "--explore", "apl", "--sampler", "hybrid"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_a_dry_run_without_rollouts_places_no_actor(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--offline", "--preferences", "a/b", "--model", "c/d", "--learners", "2", "--max-prompts", "512"]
    assert main(["train", "--dry-run", *given]) == 0
    text = capsys.readouterr().out
    assert "learner 1  CPU" in text and "at most 4, of 128 pairs each" in text and "data.preferences: a/b" in text
    assert "actor 0" not in text


def test_a_dry_run_knows_folders_and_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "hub/hub/datasets--o--cached/snapshots/abc").mkdir(parents=True)
    flags = {"model.path": "local", "data.prompts": "o/cached", "oracle.path": "o/far"}
    lines = report(resolve(load_config(flags=flags, num_gpus=0), 0), [])
    assert [line.strip() for line in lines if "(hub)" in line] == ["oracle.path: o/far (hub)"]


def test_a_dry_run_measures_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--dry-run", "--set", "placement.kv_cache_gib=1e6", "--set", "sync.bucket_mib=999999999"]) == 0
    )
    text = capsys.readouterr().out
    assert "memory: 1000000.0 GiB" in text
    assert "shared memory:" in text


def test_a_dry_run_refuses_what_no_machine_could_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "prompts_per_step" in one_line(capsys, "train", "--dry-run", "--prompts-per-step", "63", "--learners", "2")


def test_the_installed_script_ends_with_the_exit_code(tmp_path: Path) -> None:
    code = "from oatlite_cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--lr", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("oatlite: error: learner.lr = 0.0 (--lr)")
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"oatlite": "oatlite_cli.main:run"}
