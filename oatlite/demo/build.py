"""The demo's policy, reward model and prompts: built on first use on this machine, then found in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oatlite.demo import task
from oatlite.output_folder import complete_or_absent

if TYPE_CHECKING:
    from oatlite.fitting import Report
    from oatlite.reward_modeling import Ranking


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides what the demo is made of, besides the code. Raise ``version`` when the code changes it."""

    version: int = 1
    seed: int = 0
    num_train: int = 4096
    num_test: int = 256
    hidden_size: int = 192
    num_layers: int = 3
    max_positions: int = 256
    vocab_size: int = 1024
    policy_rows: int = 8_000
    policy_lr: float = 2e-3
    policy_batch_tokens: int = 1024
    policy_prompt_weight: float = 0.1
    reward_posts: int = 1_500
    reward_responses: int = 8
    reward_lr: float = 2e-3
    reward_batch_tokens: int = 2048
    min_gap: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPaths:
    """``prompts`` is a folder with ``train.jsonl`` and ``test.jsonl``, the others are model folders."""

    policy: Path
    reward_model: Path
    prompts: Path


def ensure_demo(report: Report | None = None, recipe: Recipe | None = None) -> DemoPaths:
    """The demo's folders in the cache, built there if need be (a minute or two on two cores).

    ``report`` gets the progress of a build; by default it shows on stderr. Two processes that build at once make
    the same, and the first to finish stays. Raises StorageError when the cache cannot be written.
    """
    recipe = recipe or Recipe()
    folder = cache_root() / recipe_hash(recipe)
    if not folder.is_dir():
        _build(folder, recipe, report)
    return DemoPaths(policy=folder / "policy", reward_model=folder / "reward-model", prompts=folder / "prompts")


def cache_root() -> Path:
    """``oatlite/demo`` under ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oatlite" / "demo"


def recipe_hash(recipe: Recipe) -> str:
    """Names a build by its hyperparameters and a sample of the data that the task generates."""
    rows = task.make_rows(64, recipe.seed)
    judged = task.make_judged(16, recipe.reward_responses, recipe.seed)
    content = json.dumps([asdict(recipe), rows, judged], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _build(folder: Path, recipe: Recipe, report: Report | None) -> None:
    from oatlite.fitting import console_report

    if report is None:
        with console_report() as report:
            return _build(folder, recipe, report)
    # Inside one temporary folder, so that a build which is killed leaves nothing that looks like a demo.
    with complete_or_absent(folder) as work:
        rows = task.make_rows(recipe.num_train + recipe.num_test, recipe.seed)
        _write_jsonl(work / "prompts" / "train.jsonl", rows[: recipe.num_train])
        _write_jsonl(work / "prompts" / "test.jsonl", rows[recipe.num_train :])
        _build_policy(work / "policy", recipe, report)
        _build_reward_model(work / "reward-model", recipe, report)
    return None


def _build_policy(output: Path, recipe: Recipe, report: Report) -> None:
    from oatlite.supervised import SupervisedOptions, train_policy
    from oatlite.tiny import TinyShape

    options = SupervisedOptions(
        model="tiny-llama",
        epochs=1,
        lr=recipe.policy_lr,
        batch_tokens=recipe.policy_batch_tokens,
        max_tokens=recipe.max_positions,
        prompt_weight=recipe.policy_prompt_weight,
        vocab_size=recipe.vocab_size,
        shape=TinyShape(
            hidden_size=recipe.hidden_size, num_layers=recipe.num_layers, max_positions=recipe.max_positions
        ),
        seed=recipe.seed,
    )
    # Fresh posts, each read once: a small policy learns to summarize from them, not to recite.
    rows = task.make_rows(recipe.policy_rows, recipe.seed + 1)
    train_policy([(row["prompt"], row["reference"]) for row in rows], options, output, report)


def _build_reward_model(output: Path, recipe: Recipe, report: Report) -> None:
    from oatlite.reward_modeling import RewardOptions, train_reward_model
    from oatlite.tiny import TinyShape

    options = RewardOptions(
        model="tiny-llama",
        lr=recipe.reward_lr,
        batch_tokens=recipe.reward_batch_tokens,
        max_tokens=recipe.max_positions,
        vocab_size=recipe.vocab_size,
        shape=TinyShape(
            hidden_size=recipe.hidden_size, num_layers=recipe.num_layers, max_positions=recipe.max_positions
        ),
        seed=recipe.seed,
    )
    judged = task.make_judged(recipe.reward_posts, recipe.reward_responses, recipe.seed + 2)
    train_reward_model([_rank(post, recipe.min_gap) for post in judged], options, output, report)


def _rank(post: task.Judged, min_gap: float) -> Ranking:
    from oatlite.reward_modeling import Ranking

    scores = post["scores"]
    places = range(len(scores))
    wins = tuple((i, j) for i in places for j in places if scores[i] - scores[j] >= min_gap)
    return Ranking(post["prompt"], tuple(post["responses"]), wins)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
