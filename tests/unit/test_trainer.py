"""One rank and two of DeepSpeed against plain AdamW: weights, gradient norms, and what ranks tell each other.

Run as a program, this file is one such rank.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oatlite.checkpoint import CheckpointWriter, FileRecord, name_of
from oatlite.errors import CheckpointError
from oatlite.trainer import (
    SCHEDULE_FLOOR,
    OptimizerOptions,
    Ranks,
    Trainer,
    deepspeed_config,
    schedule_factor,
    state_files,
)

SCHEDULES = ["cosine", "linear", "constant"]
NUM_STEPS = 3
ROWS_PER_STEP = 8
LATEST_S = 300

BASE = OptimizerOptions(
    lr=0.05,
    schedule="cosine",
    warmup_ratio=0.3,
    num_steps=NUM_STEPS,
    micro_steps=1,
    micro_batch_size=ROWS_PER_STEP,
    weight_decay=0.1,
    betas=(0.9, 0.98),
    eps=1e-8,
    max_grad_norm=1e9,
    zero_stage=0,
    dtype="float32",
)
OFFLOADED = {"offloads_optimizer": True, "offloads_parameters": True}
CLIPPED = 0.5  # the norms here are several times larger


def cut_into(micro_steps, num_ranks=1, **changes):
    rows = ROWS_PER_STEP // (micro_steps * num_ranks)
    return dataclasses.replace(BASE, micro_steps=micro_steps, micro_batch_size=rows, **changes)


CASES = {
    1: {
        "one micro-step": cut_into(1),
        "four micro-steps": cut_into(4),
        "clipped": cut_into(4, max_grad_norm=CLIPPED),
        "linear": cut_into(2, schedule="linear", warmup_ratio=0.0),
        "ZeRO 2": cut_into(2, zero_stage=2, max_grad_norm=CLIPPED),
        "bfloat16": cut_into(4, dtype="bfloat16"),
        "bfloat16, ZeRO 2": cut_into(4, dtype="bfloat16", zero_stage=2),
        "ZeRO 3": cut_into(2, zero_stage=3, max_grad_norm=CLIPPED),
        "ZeRO 1, offloaded": cut_into(2, zero_stage=1, max_grad_norm=CLIPPED, offloads_optimizer=True),
        "ZeRO 2, offloaded": cut_into(2, zero_stage=2, max_grad_norm=CLIPPED, offloads_optimizer=True),
        "ZeRO 3, offloaded": cut_into(2, zero_stage=3, max_grad_norm=CLIPPED, **OFFLOADED),
        "bfloat16, ZeRO 3, offloaded": cut_into(4, zero_stage=3, dtype="bfloat16", **OFFLOADED),
    },
    2: {
        "ZeRO 2, offloaded": cut_into(2, 2, zero_stage=2, max_grad_norm=CLIPPED, offloads_optimizer=True),
        "ZeRO 3, offloaded": cut_into(2, 2, zero_stage=3, max_grad_norm=CLIPPED, **OFFLOADED),
    }
    | {
        f"ZeRO {stage}, {micro_steps} micro-steps, norm {norm:g}": cut_into(
            micro_steps, 2, zero_stage=stage, max_grad_norm=norm
        )
        for stage in (0, 1, 2, 3)
        for micro_steps, norm in ((1, 1e9), (2, CLIPPED))
    },
}


# --------------------------------------------------------------------------- what is trained


class Regression(nn.Module):
    """Stands for a module whose forward gives one number per row of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def forward(self, batch):
        return self.layers(batch.to(self.layers[0].weight.dtype))[:, 0]


def rows_of(step):
    """Inputs and targets of a step, for all ranks together."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS_PER_STEP, 5, generator=generator), 3 * torch.randn(ROWS_PER_STEP, generator=generator)


def loss_of(predictions, targets):
    return ((predictions - targets) ** 2).sum() / ROWS_PER_STEP


def trained_plainly(options):
    """Weights, gradient norms and learning rates by torch alone, all rows of a step at once."""
    model = Regression()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    norms, rates = [], []
    for step in range(NUM_STEPS):
        factor = schedule_factor(
            step, schedule=options.schedule, num_steps=options.num_steps, warmup_ratio=options.warmup_ratio
        )
        rates.append(options.lr * factor)
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        inputs, targets = rows_of(step)
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)))
        optimizer.step()
    return {"weights": as_lists(model.named_parameters()), "norms": norms, "rates": rates}


def as_lists(named):
    return {name: value.detach().double().tolist() for name, value in named}


# --------------------------------------------------------------------------- one rank, as a program


def trained_by_deepspeed(options, ranks, saved=None):
    """With a folder ``saved``, a second trainer takes over after each step from what the one before has left there."""
    trainer = Trainer(Regression(), options, ranks)
    steps = []
    for step in range(NUM_STEPS):
        if saved is not None and step:
            write_state(trainer, ranks, saved / str(step))
            model = Regression()
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
            trainer = Trainer(model, options, ranks)
            trainer.load(saved / str(step) / name_of(1))
        inputs, targets = (part.chunk(ranks.count)[ranks.rank].chunk(options.micro_steps) for part in rows_of(step))
        for x, y in zip(inputs, targets, strict=True):
            trainer.backward(loss_of(trainer.forward(x).float(), y))
        steps.append(trainer.step())
    names = [name for name, _ in Regression().named_parameters()]
    with trainer.whole_parameters(names) as parameter:
        weights = as_lists((name, parameter(name)) for name in names)
    return trainer, {"weights": weights, "norms": [s.grad_norm for s in steps], "rates": [s.lr for s in steps]}


def write_state(trainer, ranks, root):
    writer = CheckpointWriter(root, 1)
    if ranks.rank == 0:
        writer.begin()
    trainer.add_up([0.0])
    trainer.save(writer.folder, writer.open)
    parts = trainer.gather_bytes(json.dumps([dataclasses.astuple(record) for record in writer.records]).encode())
    if ranks.rank == 0:
        writer.complete(1, [FileRecord(*record) for part in parts for record in json.loads(part)], {})
    trainer.add_up([0.0])


def rank_main(rank, count, folder):
    torch.set_num_threads(1)
    ranks = Ranks(
        rank=rank, count=count, rendezvous=folder / "ranks", device=torch.device("cpu"), timeout_s=float(LATEST_S)
    )
    results = {}
    for name, options in CASES[count].items():
        trainer, results[name] = trained_by_deepspeed(options, ranks)
        _, again = trained_by_deepspeed(options, ranks, folder / "states" / name)
        results[name]["is_resumable"] = again == results[name]
    longest = bytes(range(256)) * 4 * rank  # rank 0 has nothing to say
    results["agreement"] = {
        "sum": trainer.add_up([rank + 1.0, 0.1, 2.0**53 if rank == 0 else 1.0]),
        "maximum": [trainer.maximum(float(-rank - 1)), trainer.maximum(1e300 * rank)],
        "bytes": [part.hex() for part in trainer.gather_bytes(longest)],
        "no bytes": [part.hex() for part in trainer.gather_bytes(b"")],
        "bytes of rank 0": [part.hex() for part in trainer.gather_bytes(b"abc" if rank == 0 else b"")],
    }
    trainer.close()
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))


def run_ranks(count, folder):
    """What each rank found, each in a process of its own."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(count), str(folder)],
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
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("two"))


# --------------------------------------------------------------------------- against plain AdamW


def assert_trained_alike(result, expected, tolerance, norm_tolerance=1e-5):
    assert result["rates"] == pytest.approx(expected["rates"], rel=1e-12)
    assert result["norms"] == pytest.approx(expected["norms"], rel=norm_tolerance)
    assert set(result["weights"]) == set(expected["weights"])
    for name, weights in expected["weights"].items():
        difference = torch.tensor(result["weights"][name]) - torch.tensor(weights)
        assert float(difference.abs().max()) <= tolerance, name


@pytest.mark.parametrize("case", CASES[1])
def test_one_rank_takes_the_steps_of_plain_adamw(one_rank, case):
    # The weights move by about 0.1; bfloat16 has two or three digits.
    tolerances = (1e-6, 1e-5) if CASES[1][case].dtype == "float32" else (0.03, 0.03)
    assert_trained_alike(one_rank[case], trained_plainly(CASES[1][case]), *tolerances)


@pytest.mark.parametrize("case", CASES[2])
def test_two_ranks_take_the_steps_of_one(two_ranks, case):
    expected = trained_plainly(CASES[2][case])
    for result in two_ranks:
        assert_trained_alike(result[case], expected, 1e-5)
    assert two_ranks[0][case]["weights"] == two_ranks[1][case]["weights"]
    assert two_ranks[0][case]["norms"] == two_ranks[1][case]["norms"]


def test_the_cases_can_be_told_apart(one_rank):
    """A step that ignored clipping, the schedule or the data would give other numbers."""
    plain = trained_plainly(BASE)
    assert min(plain["norms"]) > 2 * CLIPPED
    assert len(set(plain["rates"])) == NUM_STEPS
    for case in ("clipped", "linear"):
        assert one_rank[case]["weights"]["layers.0.bias"] != pytest.approx(plain["weights"]["layers.0.bias"], abs=1e-3)


@pytest.mark.parametrize("case", CASES[1])
def test_a_trainer_that_was_replaced_after_every_step_takes_the_same_steps_bit_for_bit(one_rank, case):
    assert one_rank[case]["is_resumable"]


@pytest.mark.parametrize("case", CASES[2])
def test_ranks_that_were_replaced_after_every_step_take_the_same_steps_bit_for_bit(two_ranks, case):
    assert all(result[case]["is_resumable"] for result in two_ranks)


def test_deepspeed_is_told_what_to_offload(tmp_path):
    ranks = Ranks(rank=0, count=1, rendezvous=tmp_path / "r", device=torch.device("cuda", 0), timeout_s=1)
    options = dataclasses.replace(BASE, zero_stage=3, **OFFLOADED)
    host = {"device": "cpu", "pin_memory": True}
    told = deepspeed_config(options, ranks)
    assert told["zero_optimization"] == {"stage": 3, "offload_optimizer": host, "offload_param": host}
    assert deepspeed_config(BASE, ranks)["zero_optimization"] == {"stage": 0}


# --------------------------------------------------------------------------- what ranks tell each other


def test_one_rank_agrees_with_itself(one_rank):
    assert one_rank["agreement"] == {
        "sum": [1.0, 0.1, 2.0**53],
        "maximum": [-1.0, 0.0],
        "bytes": [""],
        "no bytes": [""],
        "bytes of rank 0": [b"abc".hex()],
    }


def test_two_ranks_agree(two_ranks):
    said = (bytes(range(256)) * 4).hex()
    for result in two_ranks:
        assert result["agreement"] == {
            "sum": [3.0, 0.2, 2.0**53 + 1.0],
            "maximum": [-1.0, 1e300],
            "bytes": ["", said],
            "no bytes": ["", ""],
            "bytes of rank 0": [b"abc".hex(), ""],
        }


# --------------------------------------------------------------------------- the learning rate

lengths = st.integers(1, 500)
ratios = st.floats(0, 1)


def factors(schedule, num_steps, warmup_ratio, more=0):
    return [
        schedule_factor(step, schedule=schedule, num_steps=num_steps, warmup_ratio=warmup_ratio)
        for step in range(num_steps + more)
    ]


@given(st.sampled_from(SCHEDULES), lengths, ratios)
def test_every_step_has_a_rate_above_nothing_and_at_most_the_peak(schedule, num_steps, warmup_ratio):
    assert all(0 < factor <= 1 for factor in factors(schedule, num_steps, warmup_ratio))


@given(st.sampled_from(["cosine", "linear"]), lengths, ratios)
def test_the_rate_rises_in_equal_steps_to_its_peak_and_then_only_falls(schedule, num_steps, warmup_ratio):
    num_warmup = math.ceil(warmup_ratio * num_steps)
    rates = factors(schedule, num_steps, warmup_ratio, more=1)
    rising, falling = rates[: num_warmup + 1], rates[num_warmup:]
    if num_warmup < num_steps:
        assert rising == pytest.approx([(i + 1) / (num_warmup + 1) for i in range(num_warmup + 1)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize(("schedule", "end"), [("cosine", SCHEDULE_FLOOR), ("linear", 0.0), ("constant", 1.0)])
@pytest.mark.parametrize("num_steps", [7, 100])
def test_where_the_schedule_ends_it_stays(schedule, end, num_steps):
    rates = factors(schedule, num_steps, 0.1, more=5)
    assert rates[num_steps:] == [rates[num_steps - 1]] * 5
    assert rates[-1] == pytest.approx(end, abs=1.2 / (0.9 * num_steps))
    assert rates[-1] > 0, "a step beyond the plan still learns"


def test_the_middle_of_each_schedule():
    assert factors("linear", 10, 0.2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert factors("cosine", 4, 0.0) == pytest.approx(
        [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    )
    assert factors("constant", 3, 1.0) == [1.0] * 3


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # As a worker ends (oatlite.workers.__main__): while the interpreter winds down, a thread of a closed process group
    # now and then makes libstdc++ abort ("terminate called without an active exception").
    os._exit(0)


class Unpickled:
    """Whoever unpickles it makes an empty file."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


def test_a_state_file_that_would_execute_something_is_refused(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "state.pt"
    torch.save({"step": 1, "more": Unpickled(trap)}, path)
    with pytest.raises(CheckpointError, match=rf"{path} holds what no checkpoint of ours does .+ not read; add"):
        state_files(tmp_path, None).load(str(path))
    assert not trap.exists()
    (tmp_path / "torn.pt").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"torn.pt holds what"):
        state_files(tmp_path, None).load(str(tmp_path / "torn.pt"))
    torch.load(path, weights_only=False)["more"].close()
    assert trap.exists(), "and it would have"
