"""Where vLLM's model is, and how new weights get into it: in this process, or in one worker process per GPU.

Several GPUs are driven by vLLM's own multiprocessing executor. Of its executors it is the one that cuts a model up on
one machine while the scheduler stays in this process: Ray's wants a cluster, and the external launcher's would have
every rank schedule the same requests. Its workers load the weights of a sync themselves, each from the shared buffer
(:mod:`oatlite.engine.worker`), by the same :class:`LocalModel`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from oatlite.engine.reload import begin_reload, finish_reload, release
from oatlite.errors import WorkerDied
from oatlite.messages.codec import encode

if TYPE_CHECKING:
    import torch

    from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
    from oatlite.weights import WeightReader

Tensors = Sequence[tuple[str, "torch.Tensor"]]

EXTENSION = "oatlite.engine.worker.WeightLoading"


class LocalModel:
    """vLLM's model, or a worker's part of it, in this process. ``device`` is ``cpu`` or ``cuda``."""

    def __init__(self, module: Any, model_config: Any, device: str) -> None:
        self._module = module
        self._model_config = model_config
        self._device = device

    def begin_load(self) -> None:
        """From here on the old weights are given up layer by layer."""
        begin_reload(self._module, self._device)

    def load(self, tensors: Tensors) -> None:
        """On return nothing refers to the memory of ``tensors`` any more."""
        self.take(tensors)
        release(self._module, tensors)
        self._wait_for_device()

    def take(self, tensors: Tensors) -> None:
        """Load ``tensors``, which stay as they are. Raises WorkerDied if they are none of this model's."""
        loaded = self._module.load_weights(iter(tensors))
        if loaded is not None and not loaded:
            raise WorkerDied(f"vLLM took none of {len(tensors)} tensors, the first of them {tensors[0][0]}")

    def finish_load(self) -> None:
        finish_reload(self._module, self._model_config)
        self._wait_for_device()

    def _wait_for_device(self) -> None:
        """Until what was queued has read its inputs: a copy on a GPU returns before it is done."""
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()


class ShardedModel:
    """vLLM's model cut up over worker processes. Every call returns when all of them are done."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def open_weights(self, manifest: WeightManifest, handle: ShmHandle | CudaIpcHandle) -> None:
        self._call("oatlite_open", *([bytes(frame) for frame in encode(message)] for message in (manifest, handle)))

    def begin_load(self) -> None:
        self._call("oatlite_begin")

    def load_bucket(self, bucket: int, checksum: str) -> float:
        """As :func:`load_checked` in each worker; the longest of their times."""
        return max(self._call("oatlite_load", bucket, checksum))

    def finish_load(self) -> None:
        self._call("oatlite_finish")

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return found


def load_checked(reader: WeightReader, bucket: int, checksum: str, load: Callable[[Tensors], None]) -> float:
    """Have ``load`` load a bucket of the shared buffer; returns the seconds that it took.

    Raises WorkerDied, before anything is loaded, where its bytes are not those of ``checksum``.
    """
    tensors, found = reader.read(bucket)
    if found != checksum:
        raise WorkerDied(f"bucket {bucket} of the weights arrived damaged")
    start = time.perf_counter()
    load(tensors)
    return time.perf_counter() - start
