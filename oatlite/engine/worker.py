"""What vLLM's worker processes import, by its name, to load weights themselves.

vLLM starts them when the engine has several GPUs; nothing else is run there than this and vLLM's own.
"""

from __future__ import annotations

import signal
from typing import Any

from oatlite.engine.model import LocalModel, load_checked
from oatlite.engine.shared_memory import name_after_run
from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
from oatlite.messages.codec import decode
from oatlite.weights import WeightReader

# At import: the first that vLLM lets anybody else do in a worker, before it makes a queue.
name_after_run()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in all workers of a run; vLLM ends its own by closing a pipe


class WeightLoading:
    """Mixed into vLLM's worker class; the names of its methods begin as nothing of vLLM's does.

    All take and return plain values. What is raised here ends the actor.
    """

    _oatlite: tuple[LocalModel, WeightReader]

    def oatlite_open(self: Any, manifest: list[bytes], handle: list[bytes]) -> None:
        """Open the shared buffer, by the frames of both messages."""
        described, where = decode(manifest), decode(handle)
        assert isinstance(described, WeightManifest) and isinstance(where, ShmHandle | CudaIpcHandle)
        model = LocalModel(self.model_runner.get_model(), self.vllm_config.model_config, self.device.type)
        self._oatlite = model, WeightReader(described, where)

    def oatlite_begin(self) -> None:
        self._oatlite[0].begin_load()

    def oatlite_load(self, bucket: int, checksum: str) -> float:
        model, reader = self._oatlite
        return load_checked(reader, bucket, checksum, model.load)

    def oatlite_finish(self) -> None:
        self._oatlite[0].finish_load()
