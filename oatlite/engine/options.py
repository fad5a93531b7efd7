"""How to start the engine, and the environment that vLLM wants for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from oatlite.engine.model import EXTENSION
from oatlite.lora import AdapterOptions
from oatlite.samplers import MIXTURES

ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to start the engine. ``max_model_len`` counts prompt and response tokens together. ``tensor_parallel_size``
    is the number of GPUs that the model is cut up over, one worker process on each; on the CPU they share ``threads``.

    ``gpu_memory_utilization`` is its share of a GPU's memory, None on the CPU, and ``sleeps`` whether it can give that
    up for a while. With an ``adapter``, the weights that come are that adapter's alone, for the model at ``path``.
    ``samplers`` are those that may be asked for; those beside the policy need a ``reference``, a path too.
    """

    path: str
    dtype: str
    max_model_len: int
    seed: int
    device: str
    gpu_memory_utilization: float | None
    kv_cache_gib: float
    threads: int
    sleeps: bool = False
    trust_remote_code: bool = False
    adapter: AdapterOptions | None = None
    samplers: frozenset[str] = frozenset({"policy"})
    reference: str | None = None
    mixture_weight: float = 0.5
    tensor_parallel_size: int = 1

    @property
    def mixes(self) -> bool:
        return bool(self.samplers & MIXTURES)

    @property
    def swaps(self) -> bool:
        return "reference" in self.samplers and self.adapter is None

    @property
    def is_sharded(self) -> bool:
        return self.tensor_parallel_size > 1


def prepare_environment(options: EngineOptions) -> None:
    """vLLM reads these when it is imported. The engine in this process, nothing sent anywhere."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DO_NOT_TRACK"] = "1"
    # Its process groups would otherwise listen at the address of the machine's name.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo", VLLM_HOST_IP="127.0.0.1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.is_sharded:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads already, and a fork has not
        os.environ["SPT_NOENV"] = "1"  # a worker that renames itself keeps its environment, which says whose it is
    if options.mixes:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its logits processors have another interface
    if options.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(options.kv_cache_gib)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(max(1, options.threads // options.tensor_parallel_size))
        # Two small functions of its sampler would be compiled: seconds at start, and a C++ compiler needed.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """Of ``vllm.LLM``."""
    arguments: dict[str, Any] = {
        "model": options.path,
        "dtype": options.dtype,
        "seed": options.seed % 2**31,
        "max_model_len": options.max_model_len,
        "trust_remote_code": options.trust_remote_code,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": True,
        # A seeded request whose prefill is split raises on CPU; prompts are bounded, so a whole one always fits.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(options.max_model_len, 8192),
        "max_num_seqs": 256,
        "disable_log_stats": True,
        "logprobs_mode": "raw_logprobs",
    }
    if options.is_sharded:
        arguments |= {
            "tensor_parallel_size": options.tensor_parallel_size,
            "distributed_executor_backend": "mp",
            "worker_extension_cls": EXTENSION,
        }
    if options.adapter is not None:
        room = next(rank for rank in ADAPTER_RANKS if rank >= options.adapter.rank)
        # vLLM's CPU operators look up the adapter of a request without one at index -1, which is the last place for
        # adapters. A second place, which stays empty, makes that no adapter; its GPU kernels leave such requests out.
        places = 2 if options.device == "cpu" else 1
        arguments |= {"enable_lora": True, "max_loras": places, "max_lora_rank": room}
    if options.device == "cpu":
        arguments["enforce_eager"] = True
    else:
        assert options.gpu_memory_utilization is not None, "computed before"
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        arguments["enable_sleep_mode"] = options.sleeps
    return arguments
