"""``python -m oatlite.inference.process FOLDER``: one engine that answers the job in a folder, and ends.

Each response is a line of a file as soon as it is complete, so that whoever watches sees how far it is.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

import numpy as np

from oatlite.config.schema import Config
from oatlite.engine import Engine, EngineOptions
from oatlite.errors import OatliteError, WorkerDied
from oatlite.inference.job import FAILURE, REPLIES, Failure, Job, Response
from oatlite.lora import read_adapter
from oatlite.seeds import seed_of
from oatlite.sources import first_line


def main(folder: Path) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    faulthandler.enable()
    try:
        _answer(Job.model_validate_json((folder / "job.json").read_text()), folder / REPLIES)
    except Exception as error:
        logging.exception("sampling ends")
        if not isinstance(error, OatliteError):
            error = WorkerDied(f"{type(error).__name__}: {first_line(error)}")
        told = Failure(exit_code=error.exit_code, message=error.message, fix=error.fix)
        (folder / FAILURE).write_text(told.model_dump_json())
        return error.exit_code
    return 0


def open_engine(
    config: Config, model: str, adapter_folder: Path | None, device: str, threads: int, max_model_len: int
) -> Engine:
    """The engine with its adapter, if it has one, in place. Raises ConfigError for what vLLM does not take."""
    tensors, adapter = ([], None) if adapter_folder is None else read_adapter(adapter_folder)
    engine = Engine(
        EngineOptions(
            path=model,
            dtype=config.model.dtype,
            max_model_len=max_model_len,
            seed=config.run.seed,
            device=device,
            gpu_memory_utilization=config.placement.gpu_memory_utilization,
            kv_cache_gib=config.placement.kv_cache_gib,
            threads=threads,
            trust_remote_code=config.model.trust_remote_code,
            adapter=adapter,
        )
    )
    if adapter is not None:
        engine.begin_load()
        engine.load_bucket(tensors)
        engine.finish_load()
    return engine


def _answer(job: Job, replies: Path) -> None:
    engine = open_engine(job.config, job.model, job.adapter, job.device, job.threads, job.max_model_len)
    with replies.open("w", encoding="utf-8", buffering=1) as file:
        file.write("\n")  # the engine stands
        for number, sampling in enumerate(job.samplings):
            asked = [(prompt, sample) for prompt in range(len(job.prompts)) for sample in range(sampling.num_samples)]
            finished = engine.finished(
                [np.asarray(job.prompts[prompt], np.int32) for prompt, _ in asked],
                [seed_of(job.config.run.seed, sampling.purpose, job.rows[prompt], sample) for prompt, sample in asked],
                sampling.options,
            )
            for index, found in finished:
                response = Response(
                    sampling=number,
                    prompt=asked[index][0],
                    sample=asked[index][1],
                    text=found.text,
                    tokens=found.tokens.tolist(),
                    logprob=float(found.logprobs.astype(np.float64).sum()),
                    is_finished=found.is_finished,
                )
                file.write(response.model_dump_json() + "\n")


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    # Libraries leave threads and atexit hooks that can hang; everything of ours is closed.
    os._exit(code)
