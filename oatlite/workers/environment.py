"""The environment variables of a worker."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from oatlite.config.placement import Place


def environment_of(place: Place, private_dir: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # What libraries leave in the folder for temporary files goes with the run, but for kernels compiled for a GPU.
    if place.gpu is not None:
        kernels = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    environment["TMPDIR"] = str(private_dir)
    threads = str(len(place.cores))
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait take the cores from the process whose turn it is, and from other people.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which GPUs are counted here
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(_visible_gpu, place.gpus))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _visible_gpu(gpu: int) -> str:
    """The name that CUDA knows the ``gpu``-th visible GPU by."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu].strip() if visible else str(gpu)
