"""Twenty steps of every algorithm on a tiny network: the same bits again, and the same numbers however it is cut up.

Real DeepSpeed, the real update and the real pair forward; the pairs are made up, so no engine is needed. Run as a
program, this file is one rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

from small_folders import VOCAB_SIZE, config_of  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from oatlite.algorithms import build_algorithm  # noqa: E402
from oatlite.config.algorithms import ALGORITHM_CONFIGS  # noqa: E402
from oatlite.config.schema import Config  # noqa: E402
from oatlite.layouts import ForwardBatch, TokenPair  # noqa: E402
from oatlite.lora import AdapterOptions, adapter_off, add_adapter, all_parameters, merged_parameters  # noqa: E402
from oatlite.models import PairModel  # noqa: E402
from oatlite.trainer import OptimizerOptions, Ranks, Trainer  # noqa: E402
from oatlite.workers.buffer import TrainingPair  # noqa: E402
from oatlite.workers.update import Layout, Updater  # noqa: E402

GOLDEN = Path(__file__).with_name("losses.json")
NUM_STEPS = 20
PAIRS = 8
LATEST_S = 600
CPU = torch.device("cpu")

LORA = {f"{name}, LoRA": name for name in ("simpo", "dpo")}
NAMES = {name: name for name in ALGORITHM_CONFIGS} | LORA
"""The algorithm of each trajectory. With LoRA, the reference is the policy with its adapter off."""
OPTIONS = {"xpo": {"alpha": 0.05}}  # by its default it could not be told from DPO

WAYS: dict[int, dict[str, dict[str, int]]] = {
    1: {
        "plain": {"zero_stage": 0, "micro": 8},
        "again": {"zero_stage": 0, "micro": 8},
        "accumulated": {"zero_stage": 0, "micro": 2},
        "ZeRO 1": {"zero_stage": 1, "micro": 8},
        "ZeRO 2": {"zero_stage": 2, "micro": 4},
        "ZeRO 3": {"zero_stage": 3, "micro": 8},
    },
    2: {
        "2 ranks": {"zero_stage": 0, "micro": 4},
        "2 ranks, ZeRO 1": {"zero_stage": 1, "micro": 2},
        "2 ranks, ZeRO 2": {"zero_stage": 2, "micro": 4},
        "2 ranks, ZeRO 3": {"zero_stage": 3, "micro": 4},
    },
}


def pairs_of(step: int) -> list[TrainingPair]:
    """Eight made-up pairs of uneven lengths; they come again every other step, so that there is something to learn."""
    rng = np.random.default_rng([17, step % 2])

    def pair() -> TrainingPair:
        prompt, chosen, rejected = (rng.integers(3, VOCAB_SIZE, n).astype(np.int32) for n in rng.integers(2, 9, 3))
        logprobs = np.zeros(len(chosen) + len(rejected), np.float32)
        tokens = TokenPair(prompt=prompt, chosen=chosen, rejected=rejected)
        margin = float(rng.exponential(2.0))
        return TrainingPair(tokens=tokens, sampler_logprobs=logprobs, is_trainable=True, margin=margin)

    sides = (("policy", "reference"), ("reference", "policy"))
    return [replace(pair(), samplers=sides[i % 2]) for i in range(PAIRS)]


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config_of("llama"))
    return model


def trajectory(name: str, way: dict[str, int], ranks: Ranks) -> dict[str, Any]:
    """The losses of twenty steps and the weights after them."""
    learner = {"batch_size": PAIRS, "micro_batch_size": way["micro"], "buffer_size": PAIRS}
    config = Config.model_validate(
        {
            "rollout": {"prompts_per_step": PAIRS},
            "learner": learner,
            "placement": {"learners": ranks.count, "actors": ranks.count},
            "algorithm": {"name": NAMES[name]} | OPTIONS.get(name, {}),
        }
    )
    options = OptimizerOptions(
        lr=2e-3,
        schedule="cosine",
        warmup_ratio=0.1,
        num_steps=NUM_STEPS,
        micro_steps=PAIRS // ranks.count // way["micro"],
        micro_batch_size=way["micro"],
        weight_decay=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        max_grad_norm=1.0,
        zero_stage=way["zero_stage"],
        dtype="float32",
    )
    model = PairModel(network(seed=0))
    if name in LORA:
        add_adapter(model.model, AdapterOptions(rank=4, alpha=32), seed=0)
    published = merged_parameters(model) if name in LORA else all_parameters(model)
    trainer = Trainer(model, options, ranks)
    # A reference near the policy, and not the policy itself, whose log-ratios would all begin at zero.
    reference = PairModel(network(seed=0)).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    def base(batch: ForwardBatch) -> torch.Tensor:
        with adapter_off(model):
            return trainer.forward(batch)

    layout = Layout(name="shared", pad_token_id=2, device=CPU)
    scores = base if name in LORA else reference
    updater = Updater(config, trainer, build_algorithm(config.algorithm), scores, layout)
    losses = []
    share = PAIRS // ranks.count
    for step in range(1, NUM_STEPS + 1):
        mine = pairs_of(step)[ranks.rank * share : (ranks.rank + 1) * share]
        loss = updater.learn(mine, step).loss
        total, count = trainer.add_up([loss.sum, loss.count])
        losses.append(total / count)
    sources = [source for one in published.values() for source in one.sources]
    with trainer.whole_parameters(sources) as parameter, torch.no_grad():
        weights = torch.cat([one.value(parameter).double().flatten() for one in published.values()])
    return {"losses": losses, "weights": weights.tolist()}


def rank_main(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank=rank, count=count, rendezvous=folder / "ranks", device=CPU, timeout_s=float(LATEST_S))
    found = {way: {name: trajectory(name, options, ranks) for name in NAMES} for way, options in WAYS[count].items()}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def run(count: int, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=LATEST_S)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By way, then by algorithm."""
    return {way: t for count in WAYS for way, t in run(count, tmp_path_factory.mktemp(str(count))).items()}


def relative_distance(one: list[float], other: list[float]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_steps_again_are_the_same_bits(found: dict[str, Any], name: str) -> None:
    assert found["again"][name] == found["plain"][name]


@pytest.mark.parametrize("way", [way for ways in WAYS.values() for way in ways if way not in ("plain", "again")])
@pytest.mark.parametrize("name", NAMES)
def test_however_the_work_is_cut_up_it_comes_to_the_same(found: dict[str, Any], name: str, way: str) -> None:
    plain, other = found["plain"][name], found[way][name]
    assert other["losses"] == pytest.approx(plain["losses"], rel=1e-4, abs=1e-4)
    assert relative_distance(other["weights"], plain["weights"]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_on_record(found: dict[str, Any], name: str) -> None:
    """``python tests/golden/test_trajectories.py record`` writes them anew; other processors round otherwise."""
    golden = json.loads(GOLDEN.read_text())
    assert list(golden) == list(NAMES)
    assert found["plain"][name]["losses"] == pytest.approx(golden[name], rel=1e-3, abs=1e-4)


def test_the_algorithms_can_be_told_apart_and_learn(found: dict[str, Any]) -> None:
    finals = {name: tuple(round(weight, 4) for weight in t["weights"]) for name, t in found["plain"].items()}
    assert len(set(finals.values())) == len(NAMES)
    for name, t in found["plain"].items():
        assert np.mean(t["losses"][-4:]) < np.mean(t["losses"][:4]), name


def record(folder: Path) -> None:
    plain = run(1, folder)["plain"]
    rows = [f"{json.dumps(name)}: {json.dumps([round(x, 6) for x in t['losses']])}" for name, t in plain.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1] == "record":
        import tempfile

        with tempfile.TemporaryDirectory() as name:
            record(Path(name))
    else:
        rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    # As a worker ends (oatlite.workers.__main__): threads of libraries may hang or abort in the interpreter's last act.
    os._exit(0)
