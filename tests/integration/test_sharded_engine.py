"""An engine that is cut up over two of vLLM's worker processes, which on the CPU stand for two GPUs."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from greedy import decided_tokens
from live import EngineMode, Stopwatch, live, wait_until
from one_actor import startable_actor
from runs import Inputs, Run, command
from small_folders import VOCAB_SIZE, save_model
from test_security import bound_by, shared_memory, sockets_of, unix_names

from oatlite.launcher import RUN_VARIABLE
from oatlite.models import load_policy
from oatlite.sampling import SamplingOptions
from oatlite.weights import SHM_FOLDER, plan_layout
from oatlite.workers.rollout import ActorPool

MAX_NEW_TOKENS = 16
GREEDY = SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
BUCKET_BYTES = 60_000
SOON_S = 30.0
NOTICED_S = 10.0
PATIENCE_S = 9.0  # of vLLM with a worker that waits for the dead one: five seconds, and four after SIGTERM


def group_of(leader: int) -> list[Path]:
    """The processes of a process group in /proc that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == leader and state not in "ZX":
                    found.append(entry)
    return found


def workers_of(actor: int) -> list[Path]:
    return [one for one in group_of(actor) if b"VLLM::Worker" in (one / "cmdline").read_bytes()]


def run_of(process: Path) -> str:
    """The private folder of its run, as its environment says."""
    words = dict(word.partition(b"=")[::2] for word in (process / "environ").read_bytes().split(b"\0"))
    return words[RUN_VARIABLE.encode()].decode()


def test_workers_load_each_sync_and_none_outlives_its_actor(llama: Inputs, tmp_path: Path) -> None:
    policy = Path(save_model(tmp_path / "policy", "llama", seed=5, tie_word_embeddings=True, **SIZES))
    model = load_policy(str(policy), torch.float32).eval()
    layout = plan_layout([(n, p.shape) for n, p in model.named_parameters()], torch.float32, BUCKET_BYTES)
    more = {"placement": {"gpus_per_actor": 2}}
    with startable_actor(
        policy, llama.reward_model, layout, VOCAB_SIZE, tmp_path, max_model_len=64, lora=None, more=more
    ) as (pool, start):
        actor = start()
        pool.wait_until_ready()
        assert_synced(pool, model, layout.num_buckets)
        family = group_of(actor.pid)
        (folder,) = {run_of(process) for process in family}
        workers = workers_of(actor.pid)
        assert len(workers) == 2
        assert_private(family, Path(folder))
        weights = SHM_FOLDER / pool._exporter.handle("").segment
        assert all(str(weights) in (worker / "maps").read_text() for worker in workers), "each reads them itself"

        os.kill(actor.pid, signal.SIGKILL)  # it alone
        wait_until(lambda: not group_of(actor.pid), SOON_S, lambda: f"{group_of(actor.pid)} are left")
    assert not [entry for entry in SHM_FOLDER.iterdir() if Path(folder).name in entry.name]
    assert not Path(folder).exists()


def assert_synced(pool: ActorPool, model: torch.nn.Module, num_buckets: int) -> None:
    """Three versions, after each of which the workers together decide as Hugging Face does."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    prompts = [rng.integers(3, VOCAB_SIZE, size).astype(np.int32) for size in rng.integers(4, 40, 12)]
    seen = []

    @contextmanager
    def source(names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        with torch.no_grad():
            yield model.get_parameter

    for version in range(3):
        assert len(set(pool.sync(version, source))) == num_buckets > 1
        found, _ = pool.generate(prompts, np.zeros((len(prompts), 1), np.uint64), [["policy"]] * len(prompts), GREEDY)
        seen.append([one[0].tokens.tolist() for one in found])
        expected = [decided_tokens(model, prompt, MAX_NEW_TOKENS) for prompt in prompts]
        assert sum(map(len, expected)) > 50, "too little was decided to say anything"
        assert [got[: len(wanted)] for got, wanted in zip(seen[-1], expected, strict=True)] == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert seen[0] != seen[1] != seen[2], "the weights never changed"


def assert_private(family: list[Path], folder: Path) -> None:
    """What these processes speak through is on loopback, in the run's folder, or shared memory with the run's name."""
    sockets = sockets_of(family)
    bound = bound_by(sockets)
    assert bound, "workers meet somewhere"
    assert all(ipaddress.ip_address(address).is_loopback for _, address in bound)
    names = unix_names(sockets)
    assert names and all(name.startswith(f"{folder}/") for name in names)
    segments = shared_memory(family)
    assert len(segments) > 2, "of weights, and vLLM's queues"
    assert all(mode == 0o600 and folder.name in path for path, mode in segments.items()), segments


@pytest.mark.long
@pytest.mark.fault("2")
def test_a_run_goes_on_when_one_of_an_actors_two_processes_is_killed(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    arguments = command(llama, folder, "--algo", "simpo", "--gpus-per-actor", "2")
    with live(arguments, folder, engine.environment) as run:
        run.wait_for("actor 0", "generate: 32 samples")
        worker = workers_of(run.pid("actor-0"))[1]
        os.kill(int(worker.name), signal.SIGKILL)
        watch = Stopwatch()
        run.wait_for("actor 0 ended with code 3; restart 1 of 3")
        watch.within(NOTICED_S + PATIENCE_S, "vLLM's worker killed, to the actor's restart")
        engine.set("fast")
        code, _ = run.end()
    assert code == 0, run.output
    assert [record["step"] for record in Run(folder, code, "").records("step")] == [1, 2, 3]
    assert (folder / "model" / "model.safetensors").exists()
