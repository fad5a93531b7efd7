"""``python -m gpu_rows.hugging_face_actor SPEC``: an actor of oatlite whose sampler is Hugging Face's generate.

It stands for vLLM where that is missing. All else of the actor is what runs otherwise.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

import oatlite.workers.actor
from oatlite.data import load_tokenizer
from oatlite.engine import EngineOptions, Sample
from oatlite.engine.model import load_checked
from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
from oatlite.models import load_policy
from oatlite.sampling import SamplingOptions
from oatlite.weights import DTYPES, WeightReader
from oatlite.workers.__main__ import main

Tokens = npt.NDArray[np.int32]


class HuggingFaceEngine:
    """What an actor needs of :class:`oatlite.engine.Engine`. Every response has ``max_new_tokens``, as a network with
    random weights would write anyway."""

    def __init__(self, options: EngineOptions) -> None:
        self._device = torch.device("cpu" if options.device == "cpu" else "cuda:0")
        self._tokenizer = load_tokenizer(options.path)
        self._model = load_policy(options.path, DTYPES[options.dtype]).to(self._device).eval()
        self._parameters = dict(self._model.named_parameters())

    def hugging_face_models(self) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up(self, prompt: Tokens) -> float:
        start = time.perf_counter()
        self.generate([prompt] * 2, [0, 1], SamplingOptions(temperature=1.0, max_new_tokens=2))
        return time.perf_counter() - start

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Tokens],
        seeds: Sequence[int],
        sampling: SamplingOptions,
        *,
        samplers: Sequence[str] | None = None,
    ) -> list[Sample]:
        """As the engine's, with one seed for all: the first."""
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for r, prompt in enumerate(prompts):
            ids[r, longest - len(prompt) :], mask[r, longest - len(prompt) :] = prompt, 1
        torch.manual_seed(int(seeds[0]) % 2**63)
        output = self._model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_new_tokens=sampling.max_new_tokens,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sampled = output.sequences[:, longest:]
        logprobs = torch.stack(
            [
                logits.float().log_softmax(-1).gather(1, sampled[:, t, None])[:, 0]
                for t, logits in enumerate(output.logits)
            ],
            dim=1,
        )
        texts = self._tokenizer.batch_decode(sampled, skip_special_tokens=True)
        rows = zip(sampled.int().cpu().numpy(), logprobs.cpu().numpy(), texts, strict=True)
        return [Sample(tokens=one, logprobs=its, text=text, is_finished=False) for one, its, text in rows]

    def begin_load(self) -> None:
        """Nothing is given up: each tensor is overwritten in its place."""

    def open_weights(self, manifest: WeightManifest, handle: ShmHandle | CudaIpcHandle) -> None:
        self._reader = WeightReader(manifest, handle)

    def load_shared(self, bucket: int, checksum: str) -> float:
        return load_checked(self._reader, bucket, checksum, self.load_bucket)

    @torch.no_grad()
    def load_bucket(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._parameters[name].copy_(tensor)
        self._wait()

    def finish_load(self) -> None:
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    oatlite.workers.actor.Engine = HuggingFaceEngine  # type: ignore[assignment,misc]
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
