"""The actor's end of a timed weight sync: reads each bucket, copies it into weights of its own, and acknowledges.

``python -m gpu_rows.reading_end cuda|cpu``, over its standard input and output. The copy stands for what an engine does
with the weights. When it is told to stop it says what its own weights come to.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping

import torch

from gpu_rows.wire import Wire
from oatlite.messages import BucketLoaded, BucketReady, CudaIpcHandle, Hello, Record, ShmHandle, Stop, WeightManifest
from oatlite.weights import WeightReader, checksum

SILENCE_S = 120.0


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A checksum of all of them, by name and by every bit."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        data = weights[name].detach().contiguous().view(-1).view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
        total.update(f"{name} {checksum(data)}".encode())
    return total.hexdigest()


def serve(wire: Wire, device: str) -> None:
    weights: dict[str, torch.Tensor] = {}
    manifest: WeightManifest | None = None
    reader: WeightReader | None = None
    run_id = ""
    wire.send(Hello(run_id="none", role="actor-0", pid=os.getpid()))
    while not isinstance(message := wire.receive(SILENCE_S), Stop):
        run_id = message.run_id
        match message:
            case WeightManifest():
                manifest = message
            case ShmHandle() | CudaIpcHandle() if manifest is not None:
                reader = WeightReader(manifest, message)
            case BucketReady(version=version, bucket=bucket) if reader is not None:
                tensors, found = reader.read(bucket)
                start = time.perf_counter()
                for name, tensor in tensors:
                    if name in weights:
                        weights[name].copy_(tensor)
                    else:
                        weights[name] = tensor.clone()
                if device == "cuda":
                    torch.cuda.synchronize()
                load_s = time.perf_counter() - start
                wire.send(BucketLoaded(run_id=run_id, version=version, bucket=bucket, checksum=found, load_s=load_s))
    wire.send(Record(run_id=run_id, kind="note", body=json.dumps({"fingerprint": fingerprint(weights)})))


if __name__ == "__main__":
    # Whatever a library prints must not get into the messages.
    writing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(Wire(os.fdopen(0, "rb", buffering=0), writing), sys.argv[1])
