"""The only package that knows vLLM: an engine inside this process that samples, and takes new weights while running.
Over several GPUs its scheduler stays here, and the model is in vLLM's workers: :mod:`oatlite.engine.model`.

The engine is a state machine (:mod:`oatlite.engine.states`): it generates when ``READY``, and refuses to while it takes
weights, bucket by bucket, and while it sleeps. One that fails in between is tainted for good.

Responses of the **reference** come from the same engine and the same cache of keys and values. With an adapter they are
requests without it, in one batch with the policy's. Else the reference's weights are loaded in the place of the
policy's by the same reload as a weight sync, all its responses are sampled, and the policy's are loaded back from a
copy in host memory. That costs two reloads a request (0.7 s each for 326 MiB on two busy cores) and two models in
host memory, and nothing on the device, where a second engine would want as much memory again and a second cache. It
generates at vLLM's speed, but in two batches one after the other.

Responses of a **mixture** need both models at each token: :mod:`oatlite.engine.mixing`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from oatlite.engine.mixing import mix_in, mixing_arguments, waves
from oatlite.engine.model import LocalModel, ShardedModel, load_checked
from oatlite.engine.options import EngineOptions, engine_arguments, prepare_environment
from oatlite.engine.requests import Sample, sample_of, sampling_params
from oatlite.engine.shared_memory import name_after_run, name_meeting_after_run
from oatlite.engine.states import Move, State, after
from oatlite.engine.swap import SwappedWeights
from oatlite.errors import ConfigError, WorkerDied
from oatlite.lora import AdapterOptions, write_adapter
from oatlite.samplers import MIXTURES, coefficients
from oatlite.sampling import SamplingOptions
from oatlite.weights import WeightReader

if TYPE_CHECKING:
    import torch

    from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
    from oatlite.next_token import NextTokens


__all__ = ["Engine", "EngineOptions", "Sample", "State"]

Done = TypeVar("Done")
WARM_UP = SamplingOptions(temperature=1.0, max_new_tokens=4)


class Engine:
    """A vLLM engine in the calling process.

    Greedy and seeded requests are reproducible: a sample depends on its seed, its prompt and the weights, and on
    batching only through floating-point rounding.
    """

    def __init__(self, options: EngineOptions) -> None:
        if "reference" in options.samplers and options.adapter is not None and options.reference != options.path:
            raise ConfigError(
                f"an engine with an adapter samples from no other reference than its base {options.path}",
                "type --set lora.sync=merged",
            )
        if options.is_sharded and options.samplers != {"policy"}:
            raise ConfigError("an engine over several GPUs samples from the policy alone", "type --gpus-per-actor 1")
        prepare_environment(options)
        if options.is_sharded:
            name_after_run()
            if options.device == "cpu":
                name_meeting_after_run()
        from vllm import LLM

        arguments = engine_arguments(options) | (mixing_arguments() if options.mixes else {})
        try:
            self._llm = LLM(**arguments)
        except (ValueError, NotImplementedError) as error:
            fix = "if it is the adapter that it does not take: --set lora.sync=merged" if options.adapter else ""
            raise ConfigError(f"vLLM does not take the model {options.path}: {error}", fix) from error
        self._options = options
        self._model = ShardedModel(self._llm) if options.is_sharded else self._local_model()
        self._reader: WeightReader | None = None
        self._arriving: dict[str, torch.Tensor] = {}
        self._lora_request: Any = None
        self._swapped = self._swapped_weights() if options.swaps else None
        self._reference: NextTokens | None = self._put_beside() if options.mixes else None
        self.state = State.READY

    def _local_model(self) -> LocalModel:
        module = self._runner.get_model()
        return LocalModel(module, self._llm.llm_engine.model_config, self._options.device)

    @property
    def _runner(self) -> Any:
        """What runs the model, where it is in this process."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def hugging_face_models(self) -> AbstractContextManager[None]:
        """Build Hugging Face models beside the engine inside this.

        For some families vLLM patches the modules of transformers in its process, and these ask for its
        configuration when they are built.
        """
        from vllm.config import set_current_vllm_config

        manager: AbstractContextManager[None] = set_current_vllm_config(self._llm.llm_engine.vllm_config)
        return manager

    def generate(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        sampling: SamplingOptions,
        *,
        samplers: Sequence[str] | None = None,
    ) -> list[Sample]:
        """Sample one response per prompt; prompts (R,) are token ids, ``seeds`` (R,) one integer each.

        ``samplers`` (R,) say which distribution each comes from (default: the policy). Raises RuntimeError while
        weights are being loaded, and for a sampler that the engine was not started with.
        """
        samplers = ["policy"] * len(prompts) if samplers is None else samplers
        self._require_ready()
        if foreign := set(samplers) - self._options.samplers - {"policy"}:
            raise RuntimeError(f"the engine was not started for the sampler {min(foreign)}")

        def sample(indices: Sequence[int]) -> None:
            params = [
                sampling_params(
                    seeds[i], sampling, mixture=self._coefficients(samplers[i]) if samplers[i] in MIXTURES else None
                )
                for i in indices
            ]
            inputs = [{"prompt_token_ids": prompts[i].tolist()} for i in indices]
            adapters = [None if samplers[i] == "reference" else self._lora_request for i in indices]
            outputs = self._llm.generate(inputs, params, use_tqdm=False, lora_request=adapters)
            found.update(zip(indices, (sample_of(output.outputs[0]) for output in outputs), strict=True))

        found: dict[int, Sample] = {}
        swapped = [i for i, sampler in enumerate(samplers) if self._swapped is not None and sampler == "reference"]
        others = [i for i in range(len(prompts)) if i not in set(swapped)]
        if self._reference is not None:
            num_tokens = max(map(len, prompts), default=0) + sampling.max_new_tokens
            num_bytes = self._reference.cache_bytes_per_token * num_tokens
            for wave in waves(others, [samplers[i] in MIXTURES for i in others], num_bytes):
                sample(wave)
            self._reference.forget()
        elif others:
            sample(others)
        if swapped:
            with self._as_reference():
                sample(swapped)
        return [found[i] for i in range(len(prompts))]

    def finished(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        sampling: SamplingOptions,
    ) -> Iterator[tuple[int, Sample]]:
        """As :meth:`generate`, but each sample with its index in (R,) as soon as it is complete."""
        self._require_ready()
        params = [sampling_params(seed, sampling, output_kind="FINAL_ONLY") for seed in seeds]
        for name, output in self._run(prompts, params):
            if output.finished:
                yield int(name), sample_of(output.outputs[0])

    def stream(self, prompt: npt.NDArray[np.int32], seed: int, sampling: SamplingOptions) -> Iterator[str]:
        """One response, piece by piece as its text becomes certain. Closing the iterator stops it."""
        self._require_ready()
        params = sampling_params(seed, sampling, output_kind="DELTA")
        for _, output in self._run([prompt], [params]):
            yield output.outputs[0].text

    def _run(self, prompts: Sequence[npt.NDArray[np.int32]], params: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """What each step gives, with the request's number; requests that are left when this is closed are dropped."""
        engine = self._llm.llm_engine
        unfinished = {str(number) for number in range(len(prompts))}
        try:
            for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
                inputs = {"prompt_token_ids": prompt.tolist()}
                engine.add_request(str(number), inputs, each, lora_request=self._lora_request)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output.request_id, output
        finally:
            if unfinished:
                engine.abort_request(sorted(unfinished))

    def _require_ready(self) -> None:
        after(self.state, Move.GENERATE)

    def _coefficients(self, sampler: str) -> tuple[float, float]:
        return coefficients(sampler, self._options.mixture_weight)

    # ------------------------------------------------------------------ the reference

    def _swapped_weights(self) -> SwappedWeights:
        options = self._options
        assert options.reference is not None
        is_pinned = options.device != "cpu"
        return SwappedWeights(options.path, options.reference, self._load_beside, is_pinned=is_pinned)

    def _load_beside(self, path: str) -> Any:
        from oatlite.models import load_policy
        from oatlite.weights import DTYPES

        with self.hugging_face_models():
            return load_policy(path, DTYPES[self._options.dtype], trust_remote_code=self._options.trust_remote_code)

    def _put_beside(self) -> NextTokens:
        """Load the reference, and mix it into the logits of the requests that ask for it."""
        import torch

        from oatlite.next_token import NextTokens

        assert self._options.reference is not None
        model = self._load_beside(self._options.reference)
        reference = NextTokens(model, torch.device(self._options.device))
        if self._swapped is not None:
            self._swapped.share_reference(model)
        mix_in(self._runner, reference)
        return reference

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Inside, the engine holds the reference's weights. If anything fails in there it is tainted."""
        import torch

        assert self._swapped is not None
        with torch.no_grad():
            reference, policy = self._swapped.reference(), self._swapped.policy()
            with self._tainted_by_failure():
                self._replace_weights(reference)
                yield
                self._replace_weights(policy)

    def _replace_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.begin_load()
        self._guarded(lambda: self._here.take(list(weights.items())))
        self.finish_load()

    # ------------------------------------------------------------------ weights

    def warm_up(self, prompt: npt.NDArray[np.int32]) -> float:
        """Generate once so that kernels are ready before the first timed step; returns seconds."""
        start = time.perf_counter()
        for count in (1, 8):
            self.generate([prompt] * count, range(count), WARM_UP)
        self._llm.reset_prefix_cache()
        return time.perf_counter() - start

    def begin_load(self) -> None:
        """The old weights are given up layer by layer from here on."""
        self.state = after(self.state, Move.BEGIN_LOAD)
        self._arriving = {}
        if self._options.adapter is None:
            self._model.begin_load()

    def open_weights(self, manifest: WeightManifest, handle: ShmHandle | CudaIpcHandle) -> None:
        """Open the shared buffer that :meth:`load_shared` reads, wherever its tensors are wanted."""
        if isinstance(self._model, ShardedModel) and self._options.adapter is None:
            self._model.open_weights(manifest, handle)
        else:
            self._reader = WeightReader(manifest, handle)

    def load_shared(self, bucket: int, checksum: str) -> float:
        """Load a bucket of the shared buffer; nothing refers to it any more on return. Returns the seconds that loading
        took. Raises WorkerDied where its bytes, as anyone reads them, are not those of ``checksum``."""
        if self._reader is not None:
            return load_checked(self._reader, bucket, checksum, self.load_bucket)
        model = self._model
        assert isinstance(model, ShardedModel), "opened first"
        return self._guarded(lambda: model.load_bucket(bucket, checksum))

    def load_bucket(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load tensors under their Hugging Face names. On return nothing refers to their memory any more."""
        self._guarded(lambda: self._load(tensors) if self._options.adapter is None else self._keep(tensors))

    def _keep(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._arriving |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors}

    def _load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        if self._swapped is not None:
            self._swapped.keep(tensors)
        self._here.load(tensors)

    @property
    def _here(self) -> LocalModel:
        assert isinstance(self._model, LocalModel), "workers load from the shared buffer"
        return self._model

    def finish_load(self) -> None:
        """Complete the update: wait for the device, forget what the old weights cached."""

        def finish() -> None:
            if self._options.adapter is None:
                self._model.finish_load()
            else:
                self._replace_adapter(self._options.adapter)
            self._forget_cached()

        self._guarded(finish)
        self.state = after(self.state, Move.FINISH_LOAD)

    def _forget_cached(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise WorkerDied("vLLM refused to reset its prefix cache; a request is still running")

    def _replace_adapter(self, options: AdapterOptions) -> None:
        """Let vLLM load what arrived, in the place of the adapter before it. It takes adapters from files alone."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="adapter-") as name:
            write_adapter(Path(name), self._arriving, options, base=self._options.path)
            if not self._llm.llm_engine.add_lora(LoRARequest("policy", 1, name, load_inplace=True)):
                raise WorkerDied("vLLM did not take the adapter")
        self._arriving = {}
        self._lora_request = LoRARequest("policy", 1, name)

    def _guarded(self, action: Callable[[], Done]) -> Done:
        after(self.state, Move.LOAD)
        with self._tainted_by_failure():
            return action()

    @contextmanager
    def _tainted_by_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.state = State.TAINTED
            raise

    # ------------------------------------------------------------------ sleep

    def sleep(self, *, keeps_weights: bool) -> None:
        """Give up the GPU's memory, but for CUDA's context and graphs, which stay recorded.

        With ``keeps_weights`` (vLLM's level 1) they go to host memory, for whoever samples with them again: before the
        next sync, in an evaluation, or with an adapter, whose base no sync sends. Without (level 2) they are dropped,
        which saves a copy there and one back, where all of them are sent next.
        """
        if not self._options.sleeps or not (keeps_weights or self._options.adapter is None):
            what = "sleep" if not self._options.sleeps else "drop the weights that its adapter is for"
            raise RuntimeError(f"the engine was not started to {what}")
        move = Move.SLEEP if keeps_weights else Move.SLEEP_EMPTY
        self._move(move, lambda: self._llm.sleep(level=1 if keeps_weights else 2))

    def wake(self) -> None:
        """Take weights and cache back at once, without a sync."""
        self._move(Move.WAKE, self._llm.wake_up)

    def wake_weights(self) -> None:
        """Take back the memory of the weights, for :meth:`begin_load`."""
        self._move(Move.WAKE_WEIGHTS, lambda: self._llm.wake_up(tags=["weights"]))

    def wake_cache(self) -> None:
        """Take back the memory of the cache after :meth:`finish_load`; what it held is gone, and vLLM knows."""
        self._move(Move.WAKE_CACHE, lambda: self._llm.wake_up(tags=["kv_cache"]))

    def _move(self, move: Move, action: Callable[[], object]) -> None:
        state = after(self.state, move)
        with self._tainted_by_failure():
            action()
        self.state = state
