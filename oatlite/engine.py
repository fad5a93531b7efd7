"""The only module that knows vLLM: an engine inside this process that samples, and takes new weights while running.

The engine is a state machine of two states. ``READY`` generates; ``LOADING`` takes weights, bucket by bucket, and
refuses to generate until the update is complete. An engine that fails while loading is tainted for good: half of its
layers are new, and only a fresh process helps.

Responses of the **reference** come from the same engine and the same cache of keys and values. With an adapter they are
requests without it, in one batch with the policy's. Else the reference's weights are loaded in the place of the
policy's by the same reload as a weight sync, all its responses are sampled, and the policy's are loaded back from a
copy in host memory. That costs two reloads a request (0.7 s each for 326 MiB on two busy cores) and two models in
host memory, and nothing on the device, where a second engine would want as much memory again and a second cache. It
generates at vLLM's speed, but in two batches one after the other.

Responses of a **mixture** need both models at each token. The reference then stands beside the engine as a Hugging
Face model with a cache of its own (:mod:`oatlite.next_token`), and what it says is mixed in before vLLM's sampler sees
the logits: so temperature, top-p and seeds act on the mixture, and its log-probabilities are what is reported.
"""

from __future__ import annotations

import enum
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from oatlite.errors import ConfigError, WorkerDied
from oatlite.lora import AdapterOptions, write_adapter
from oatlite.samplers import MIXTURES, coefficients

if TYPE_CHECKING:
    import torch

    from oatlite.next_token import NextTokens


WARM_UP_TOKENS = 4
MIXTURE = "oatlite-mixture"  # what tells a request's coefficients to its logits processor
REFERENCE_CACHE_BYTES = 4 << 30  # of the reference beside the engine; more requests at once than fit wait for others
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to start the engine. ``max_model_len`` counts prompt and response tokens together.

    With an ``adapter``, the weights that come are that adapter's alone, for the model at ``path``. ``samplers`` are
    those that may be asked for; those beside the policy need a ``reference``, a path too.
    """

    path: str
    dtype: str
    max_model_len: int
    seed: int
    device: str
    gpu_memory_utilization: float
    kv_cache_gib: float
    threads: int
    trust_remote_code: bool = False
    adapter: AdapterOptions | None = None
    samplers: frozenset[str] = frozenset({"policy"})
    reference: str | None = None
    mixture_weight: float = 0.5

    @property
    def mixes(self) -> bool:
        return bool(self.samplers & MIXTURES)

    @property
    def swaps(self) -> bool:
        return "reference" in self.samplers and self.adapter is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response: token ids, the log-probability of each (T,) under its sampler's distribution at temperature 1, and
    its text without EOS."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    text: str
    is_finished: bool


class State(enum.Enum):
    READY = "ready"
    LOADING = "loading"
    TAINTED = "tainted"


def _prepare_environment(options: EngineOptions) -> None:
    """vLLM reads these when it is imported. One process, no helpers of its own, nothing sent anywhere."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.mixes:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its logits processors have another interface
    if options.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(options.kv_cache_gib)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        # Two small functions of its sampler would be compiled: seconds at start, and a C++ compiler needed.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


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
        _prepare_environment(options)
        from vllm import LLM

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
        if options.adapter is not None:
            room = next(rank for rank in ADAPTER_RANKS if rank >= options.adapter.rank)
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        if options.mixes:
            # Scheduled ahead of time, a step would not know the tokens of the one before.
            arguments |= {"logits_processors": [_tracker_class()], "async_scheduling": False}
        if options.device == "cpu":
            arguments["enforce_eager"] = True
        else:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        try:
            self._llm = LLM(**arguments)
        except (ValueError, NotImplementedError) as error:
            fix = "if it is the adapter that it does not take: --set lora.sync=merged" if options.adapter else ""
            raise ConfigError(f"vLLM does not take the model {options.path}: {error}", fix) from error
        self._options = options
        self._arriving: dict[str, torch.Tensor] = {}
        self._lora_request: Any = None
        self._policy_copy: dict[str, torch.Tensor] = {}
        self._reference_weights: Mapping[str, torch.Tensor] | None = None
        self._reference: NextTokens | None = self._put_beside() if options.mixes else None
        self.state = State.READY

    @property
    def model(self) -> Any:
        """The module that vLLM runs, for checks and for loading weights."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

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
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        max_new_tokens: int,
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
                _params(
                    seeds[i],
                    temperature,
                    top_p,
                    top_k,
                    max_new_tokens,
                    mixture=self._coefficients(samplers[i]) if samplers[i] in MIXTURES else None,
                )
                for i in indices
            ]
            inputs = [{"prompt_token_ids": prompts[i].tolist()} for i in indices]
            adapters = [None if samplers[i] == "reference" else self._lora_request for i in indices]
            outputs = self._llm.generate(inputs, params, use_tqdm=False, lora_request=adapters)
            found.update(zip(indices, (_sample(output.outputs[0]) for output in outputs), strict=True))

        found: dict[int, Sample] = {}
        swapped = [i for i, sampler in enumerate(samplers) if self._options.swaps and sampler == "reference"]
        others = [i for i in range(len(prompts)) if i not in set(swapped)]
        num_tokens = max(map(len, prompts), default=0) + max_new_tokens
        for wave in self._waves(others, [samplers[i] in MIXTURES for i in others], num_tokens):
            sample(wave)
        if self._reference is not None:
            self._reference.forget()
        if swapped:
            with self._as_reference():
                sample(swapped)
        return [found[i] for i in range(len(prompts))]

    def finished(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Sample]]:
        """As :meth:`generate`, but each sample with its index in (R,) as soon as it is complete."""
        self._require_ready()
        params = [_params(seed, temperature, top_p, top_k, max_new_tokens, output_kind="FINAL_ONLY") for seed in seeds]
        for name, output in self._run(prompts, params):
            if output.finished:
                yield int(name), _sample(output.outputs[0])

    def stream(
        self,
        prompt: npt.NDArray[np.int32],
        seed: int,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        max_new_tokens: int,
    ) -> Iterator[str]:
        """One response, piece by piece as its text becomes certain. Closing the iterator stops it."""
        self._require_ready()
        params = _params(seed, temperature, top_p, top_k, max_new_tokens, output_kind="DELTA")
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
        if self.state is not State.READY:
            raise RuntimeError(f"the engine cannot generate while it is {self.state.value}")

    def _coefficients(self, sampler: str) -> tuple[float, float]:
        return coefficients(sampler, self._options.mixture_weight)

    def _waves(self, indices: Sequence[int], is_mixed: Sequence[bool], num_tokens: int) -> Iterator[Sequence[int]]:
        """Cut requests of up to ``num_tokens`` so that the mixtures of a wave fit the reference's cache."""
        if self._reference is None or not any(is_mixed):
            yield from filter(None, [indices])
            return
        at_once = max(1, REFERENCE_CACHE_BYTES // (self._reference.cache_bytes_per_token * num_tokens))
        wave: list[int] = []
        num_mixed = 0
        for index, mixed in zip(indices, is_mixed, strict=True):
            if mixed and num_mixed == at_once:
                yield wave
                wave, num_mixed = [], 0
            wave.append(index)
            num_mixed += mixed
        yield wave

    # ------------------------------------------------------------------ the reference

    def _load_reference(self, path: str) -> Any:
        from oatlite.models import load_policy
        from oatlite.weights import DTYPES

        with self.hugging_face_models():
            return load_policy(path, DTYPES[self._options.dtype], trust_remote_code=self._options.trust_remote_code)

    def _put_beside(self) -> NextTokens:
        """Load the reference, and mix it into the logits of the requests that ask for it."""
        import torch

        from oatlite.maths.samplers import mixed_logprobs
        from oatlite.next_token import NextTokens

        assert self._options.reference is not None
        model = self._load_reference(self._options.reference)
        reference = NextTokens(model, torch.device(self._options.device))
        if self._options.swaps:
            self._reference_weights = _named(model)
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        (tracker,) = (one for one in runner.input_batch.logitsprocs.all if hasattr(one, "running"))

        def mix(module: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            running = dict(tracker.running)
            if not running:
                return None
            rows = list(running)
            logits = keywords["logits"].float()
            shares = torch.tensor([running[row].coefficients for row in rows], device=logits.device)
            logits[rows] = mixed_logprobs(logits[rows], reference.logits(list(running.values())), shares)
            return args, keywords | {"logits": logits}

        # Not as a logits processor's own work, which vLLM does after it has taken the log-probabilities to report.
        runner.sampler.register_forward_pre_hook(mix, with_kwargs=True)
        return reference

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Inside, the engine holds the reference's weights. If anything fails in there it is tainted."""
        import torch

        with torch.no_grad():
            if self._reference_weights is None:
                assert self._options.reference is not None
                self._reference_weights = self._hosted(_named(self._load_reference(self._options.reference)))
            policy: Mapping[str, torch.Tensor] = self._policy_copy
            if not policy:  # no sync has been: it holds what lies at its path
                is_reference = self._options.path == self._options.reference
                policy = self._reference_weights if is_reference else _named(self._load_reference(self._options.path))
            try:
                self._replace_weights(self._reference_weights)
                yield
                self._replace_weights(policy)
            except BaseException:
                self.state = State.TAINTED
                raise

    def _hosted(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The same in memory that a GPU copies from at full speed."""
        return weights if self._options.device == "cpu" else {name: one.pin_memory() for name, one in weights.items()}

    def _replace_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.begin_load()
        self._guarded(lambda: self._take(list(weights.items())))
        self.finish_load()

    def _copy_policy(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Keep what a sync brings, to load it again after the reference's weights."""
        import torch

        for name, tensor in tensors:
            if name not in self._policy_copy:
                is_pinned = self._options.device != "cpu"
                self._policy_copy[name] = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned)
            self._policy_copy[name].copy_(tensor)

    # ------------------------------------------------------------------ weights

    def warm_up(self, prompt: npt.NDArray[np.int32]) -> float:
        """Generate once so that kernels are ready before the first timed step; returns seconds."""
        start = time.perf_counter()
        for count in (1, 8):
            self.generate(
                [prompt] * count, range(count), temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=WARM_UP_TOKENS
            )
        self._llm.reset_prefix_cache()
        return time.perf_counter() - start

    def begin_load(self) -> None:
        """Enter ``LOADING``: the old weights are given up layer by layer from here on."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self.state is not State.READY:
            raise RuntimeError(f"weights cannot be loaded while the engine is {self.state.value}")
        self.state = State.LOADING
        self._arriving = {}
        if self._options.adapter is None:
            self._forget_expert_kernels()
            initialize_layerwise_reload(self.model)

    def _forget_expert_kernels(self) -> None:
        """Let the experts of a mixture be packed anew on the CPU, where vLLM does that only with its first kernel.

        A reload would copy the plain weights to where the packed ones are expected.
        """
        if self._options.device != "cpu":
            return
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None

    def load_bucket(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load tensors under their Hugging Face names. On return nothing refers to their memory any more."""
        self._guarded(lambda: self._load(tensors) if self._options.adapter is None else self._keep(tensors))

    def _keep(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._arriving |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors}

    def _load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._take(tensors)
        self._release(tensors)
        if self._options.swaps:
            self._copy_policy(tensors)
        self._wait_for_device()

    def _take(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        loaded = self.model.load_weights(iter(tensors))
        if loaded is not None and not loaded:
            raise WorkerDied(f"vLLM took none of {len(tensors)} tensors, the first of them {tensors[0][0]}")

    def _wait_for_device(self) -> None:
        """Until what was queued has read its inputs: a copy on a GPU returns before it is done."""
        if self._options.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def finish_load(self) -> None:
        """Complete the update: leave ``LOADING``, wait for the device, forget what the old weights cached."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        def finish() -> None:
            if self._options.adapter is None:
                finalize_layerwise_reload(self.model, self._llm.llm_engine.model_config)
                self._process_tied_layers()
            else:
                self._replace_adapter(self._options.adapter)
            self._wait_for_device()
            if not self._llm.reset_prefix_cache():
                raise WorkerDied("vLLM refused to reset its prefix cache; a request is still running")

        self._guarded(finish)
        self.state = State.READY

    def _replace_adapter(self, options: AdapterOptions) -> None:
        """Let vLLM load what arrived, in the place of the adapter before it. It takes adapters from files alone."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="adapter-") as name:
            write_adapter(Path(name), self._arriving, options, base=self._options.path)
            if not self._llm.llm_engine.add_lora(LoRARequest("policy", 1, name, load_inplace=True)):
                raise WorkerDied("vLLM did not take the adapter")
        self._arriving = {}
        self._lora_request = LoRARequest("policy", 1, name)

    def _process_tied_layers(self) -> None:
        """Let a layer that shares another's parameter see the new values.

        An output head tied to the embedding is sent no weights, so vLLM's reload leaves it alone: right where it
        reads the shared parameter, but on CPU it multiplies by a packed copy of the old one.
        """
        owners: dict[int, torch.nn.Module] = {}
        for layer in self.model.modules():
            for parameter in layer.parameters(recurse=False):
                if owners.setdefault(id(parameter), layer) is not layer:
                    layer.quant_method.process_weights_after_loading(layer)

    def _guarded(self, action: Callable[[], None]) -> None:
        if self.state is not State.LOADING:
            raise RuntimeError(f"weights come only between begin_load and finish_load, not while {self.state.value}")
        try:
            action()
        except BaseException:
            self.state = State.TAINTED
            raise

    def _release(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Clone what vLLM still holds of a bucket.

        Its layerwise reload buffers the weights of a layer until the layer is complete. Buckets end on module
        boundaries, but a layer whose parameter is padded (an embedding over a vocabulary that is no multiple of 64)
        counts as incomplete until the end, and would read the bucket after it has been refilled.
        """
        import torch
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        memory = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
        for layer in self.model.modules():
            for _, bound in get_layerwise_info(layer).loaded_weights:
                for name, value in bound.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory:
                        bound.arguments[name] = value.clone()


def _params(
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    *,
    output_kind: str = "CUMULATIVE",
    mixture: tuple[float, float] | None = None,
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_new_tokens,
        seed=None if temperature == 0 else int(seed) % 2**63,
        logprobs=0,
        flat_logprobs=True,
        extra_args=None if mixture is None else {MIXTURE: mixture},
        output_kind=RequestOutputKind[output_kind],
    )


def _named(model: Any) -> Mapping[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _tracker_class() -> type[Any]:
    """A logits processor that changes nothing, and knows which row of the batch is a mixture's request."""
    from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

    from oatlite.next_token import Running

    def begin(params: Any, prompt: list[int] | None, response: list[int]) -> Running | None:
        shares = (params.extra_args or {}).get(MIXTURE)
        return None if shares is None else Running(prompt or (), response, shares)

    class Tracker(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self.running: dict[int, Running] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self.running, batch_update, begin)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    return Tracker


def _sample(output: Any) -> Sample:
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = output.logprobs
    assert logprobs is not None and len(logprobs) == len(tokens)
    values = np.fromiter(
        (logprobs.logprobs[logprobs.start_indices[i]] for i in range(len(tokens))), np.float32, len(tokens)
    )
    return Sample(tokens=tokens, logprobs=values, text=output.text, is_finished=output.finish_reason == "stop")
