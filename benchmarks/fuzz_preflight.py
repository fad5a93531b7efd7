"""What a configuration that loads comes to further on: the dry run, and all that is checked before a process starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from oatlite_cli.dry_run import report

from oatlite.config.schema import Config
from oatlite.demo.build import DemoPaths, Recipe, ensure_demo
from oatlite.demo.settings import with_demo
from oatlite.errors import ConfigError, OracleError
from oatlite.hardware import Gpu
from oatlite.preflight import check

RECIPE = Recipe(num_train=1100, num_test=64, hidden_size=64, num_layers=1, policy_rows=60, reward_posts=20)
TRIAL_S = 0.5
"""A server that is nowhere is asked so long."""
FAKE_GPUS = [Gpu(f"GPU-{number}", "fake", 80 << 30) for number in range(64)]


@contextmanager
def small_demo(folder: Path) -> Iterator[DemoPaths]:
    """``demo`` in a configuration is one that is made in a moment; no hub is asked for anything, nor a server for
    long, and the engine is taken to be the one that a configuration needs, and GPUs to be here."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", {"XDG_CACHE_HOME": str(folder)}))
        paths = ensure_demo(lambda *_: None, RECIPE)
        stack.enter_context(patch("oatlite.demo.build.ensure_demo", lambda *_: paths))
        stack.enter_context(patch("oatlite.sources.hub_answers", lambda: False))
        stack.enter_context(patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        stack.enter_context(patch("oatlite.oracle_checks.TRIAL_S", TRIAL_S))
        stack.enter_context(patch("oatlite.preflight.check_engine", lambda _: None))
        stack.enter_context(patch("oatlite.preflight.visible_gpus", lambda: FAKE_GPUS))
        yield paths


def at_hand(tables: dict[str, Any], paths: DemoPaths) -> None:
    """Put what is on this machine in place of what a preset downloads."""
    tables["model"] |= {"path": str(paths.policy)}
    tables["model"].pop("reference", None)
    prompts = {"prompts": str(paths.prompts), "prompt_key": "prompt", "reference_key": "reference"}
    tables["data"] |= prompts | {"split": "train", "eval_split": "test", "max_prompt_tokens": 256}
    tables["oracle"]["path"] = [str(paths.reward_model)]
    tables["sampling"]["max_new_tokens"] = 32
    if "encoder" in tables["explore"]:
        tables["explore"]["encoder"] = str(paths.reward_model)
    tables["placement"].pop("gpus", None)


def preflight_outcome(config: Config) -> str:
    """``valid``, ``refused before a start``, or what is wrong with how it was handled; what else is raised is raised
    here too."""
    lines = report(config, FAKE_GPUS[: int(config.placement.gpus or 0)])
    if lines[-1] != "Dry run: nothing was started.":
        return "a dry run ends otherwise"
    try:
        plan = check(with_demo(config))
    except (ConfigError, OracleError) as error:
        return "refused before a start" if len(str(error).splitlines()) == 1 else f"not one line: {str(error)!r}"
    return "valid" if plan.total_steps > 0 else "a plan of no step"
