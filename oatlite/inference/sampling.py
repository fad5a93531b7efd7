"""Sampling from a model in a process of its own.

A vLLM engine that ends inside a process leaves memory, threads and a process group of torch behind, so that a second
model, or an oracle on the same GPU, would not find what it needs; it also writes to the screen. A process for each
engine gives everything back when it ends, has a log in place of the screen, and can be ended at once, in the middle of
a long call, by Ctrl-C. It answers by a file in the private folder of a launcher, whose reaper leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from oatlite.config.schema import Config
from oatlite.data import PromptSet
from oatlite.errors import BY_EXIT_CODE, DeadlineExceeded, OatliteError, WorkerDied
from oatlite.fitting import Report
from oatlite.hardware import usable_cores
from oatlite.inference.job import FAILURE, LOG, REPLIES, Failure, Job, Response, Sampling
from oatlite.launcher import LocalLauncher, Worker

POLL_S = 0.1
Responses = list[list[Response]]
"""By prompt, by sample."""


def device_of(config: Config) -> Literal["cpu", "cuda"]:
    """Where a resolved configuration puts engines and oracles."""
    return "cuda" if config.placement.gpus else "cpu"


def job_for(
    config: Config, model: str, prompts: PromptSet, samplings: Sequence[Sampling], *, adapter: Path | None = None
) -> Job:
    return Job(
        config=config,
        model=model,
        adapter=adapter,
        device=device_of(config),
        threads=len(usable_cores()),
        prompts=[tokens.tolist() for tokens in prompts.tokens],
        rows=prompts.rows.tolist(),
        samplings=list(samplings),
    )


def sample(job: Job, what: str, report: Report) -> list[Responses]:
    """The responses of each of ``job.samplings``. ``what`` is what is reported to be done.

    Raises what the engine raised, WorkerDied where its process ended, and DeadlineExceeded when it neither stood
    within ``timeouts.start_s`` nor gave a response within ``timeouts.generate_s``.
    """
    with LocalLauncher("oatlite-") as launcher:
        private = launcher.private_dir
        (private / "job.json").write_text(job.model_dump_json())
        command = [sys.executable, "-m", "oatlite.inference.process", str(private)]
        worker = launcher.start(command, _environment(job, private), private / LOG)
        replies = _watch(job, worker, private, what, report)
    found: list[Responses] = [[[] for _ in job.prompts] for _ in job.samplings]
    for reply in sorted(replies, key=lambda reply: reply.sample):
        found[reply.sampling][reply.prompt].append(reply)
    return found


def _watch(job: Job, worker: Worker, private: Path, what: str, report: Report) -> list[Response]:
    replies: list[Response] = []
    seen, unread, position, stands = time.monotonic(), "", 0, False
    timeouts = job.config.timeouts
    while True:
        code = worker.exit_code()  # before the file is read, so that nothing is missed after its end
        text, position = _read_from(private / REPLIES, position)
        *lines, unread = (unread + text).split("\n")
        if lines:
            seen, stands = time.monotonic(), True
        replies += [Response.model_validate_json(line) for line in lines if line]
        if lines and replies:
            num_tokens = sum(len(reply.tokens) for reply in replies) / len(replies)
            report(what, len(replies), job.num_samples, f"{num_tokens:.0f} tokens each")
        if code is not None:
            break
        if time.monotonic() - seen > (timeouts.generate_s if stands else timeouts.start_s):
            raise DeadlineExceeded(
                f"the engine of {job.model} was silent for {time.monotonic() - seen:.0f} s",
                f"log: {kept(private / LOG)}; raise timeouts.{'generate_s' if stands else 'start_s'} with --set",
            )
        time.sleep(POLL_S)
    if code != 0 or len(replies) < job.num_samples:
        raise _failure(job, code, private)
    return replies


def _read_from(path: Path, position: int) -> tuple[str, int]:
    if not path.exists():
        return "", position
    with path.open("rb") as file:
        file.seek(position)
        found = file.read()
    end = found.rfind(b"\n") + 1  # not in the middle of a character
    return found[:end].decode(), position + end


def _failure(job: Job, code: int, private: Path) -> OatliteError:
    if (private / FAILURE).exists():
        told = Failure.model_validate_json((private / FAILURE).read_text())
        cls = BY_EXIT_CODE.get(told.exit_code, WorkerDied)
        if cls is not WorkerDied:
            return cls(told.message, told.fix)
        message = told.message
    else:
        message = f"its process ended with code {code}" if code >= 0 else f"its process was killed by signal {-code}"
    return WorkerDied(f"the engine of {job.model} failed: {message}", f"log: {kept(private / LOG)}")


def kept(log: Path) -> Path:
    """A copy of ``log`` that stays when the private folder goes."""
    descriptor, name = tempfile.mkstemp(prefix="oatlite-", suffix=".log")
    os.close(descriptor)
    shutil.copyfile(log, name)
    return Path(name)


def _environment(job: Job, private: Path) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    return {
        **os.environ,
        **hidden,
        "TMPDIR": str(private),
        "OMP_NUM_THREADS": str(job.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
