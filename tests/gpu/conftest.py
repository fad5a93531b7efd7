"""Tests that need a GPU: ``python -m pytest tests/gpu``. The suite does not collect them.

``GPU_TESTS_ON=cpu`` rehearses what of them is not about a GPU itself, on a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "unit")]

from gpu_rows.scale import Scale  # noqa: E402

from oatlite.hardware import visible_gpus  # noqa: E402

ON_CPU = os.environ.get("GPU_TESTS_ON") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = bool(visible_gpus())
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not has_gpu and (not ON_CPU or item.get_closest_marker("gpu") is not None):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Small networks on the GPU; processes that a test starts find this checkout."""
    path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return Scale(device="cpu" if ON_CPU else "cuda", tiny=True)
