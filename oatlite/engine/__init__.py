"""The only package that knows vLLM: an engine inside this process that samples, and takes new weights while running.

The engine is a state machine of two states. ``READY`` generates; ``LOADING`` takes weights, bucket by bucket, and
refuses to generate until the update is complete. An engine that fails while loading is tainted for good: half of its
layers are new, and only a fresh process helps.

Responses of the **reference** come from the same engine and the same cache of keys and values. With an adapter they are
requests without it, in one batch with the policy's. Else the reference's weights are loaded in the place of the
policy's by the same reload as a weight sync, all its responses are sampled, and the policy's are loaded back from a
copy in host memory. That costs two reloads a request (0.7 s each for 326 MiB on two busy cores) and two models in
host memory, and nothing on the device, where a second engine would want as much memory again and a second cache. It
generates at vLLM's speed, but in two batches one after the other.

Responses of a **mixture** need both models at each token: :mod:`oatlite.engine.mixing`.
"""

from __future__ import annotations

import enum
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from oatlite.engine.mixing import MIXTURE, mix_in, mixing_arguments, waves
from oatlite.engine.options import EngineOptions, engine_arguments, prepare_environment
from oatlite.engine.reload import begin_reload, finish_reload, release
from oatlite.errors import ConfigError, WorkerDied
from oatlite.lora import AdapterOptions, write_adapter
from oatlite.samplers import MIXTURES, coefficients
from oatlite.sampling import SamplingOptions

if TYPE_CHECKING:
    import torch

    from oatlite.next_token import NextTokens


__all__ = ["Engine", "EngineOptions", "Sample", "State"]

WARM_UP = SamplingOptions(temperature=1.0, max_new_tokens=4)


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
        prepare_environment(options)
        from vllm import LLM

        arguments = engine_arguments(options) | (mixing_arguments() if options.mixes else {})
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
                _params(
                    seeds[i], sampling, mixture=self._coefficients(samplers[i]) if samplers[i] in MIXTURES else None
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
        params = [_params(seed, sampling, output_kind="FINAL_ONLY") for seed in seeds]
        for name, output in self._run(prompts, params):
            if output.finished:
                yield int(name), _sample(output.outputs[0])

    def stream(self, prompt: npt.NDArray[np.int32], seed: int, sampling: SamplingOptions) -> Iterator[str]:
        """One response, piece by piece as its text becomes certain. Closing the iterator stops it."""
        self._require_ready()
        params = _params(seed, sampling, output_kind="DELTA")
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

    # ------------------------------------------------------------------ the reference

    def _load_reference(self, path: str) -> Any:
        from oatlite.models import load_policy
        from oatlite.weights import DTYPES

        with self.hugging_face_models():
            return load_policy(path, DTYPES[self._options.dtype], trust_remote_code=self._options.trust_remote_code)

    def _put_beside(self) -> NextTokens:
        """Load the reference, and mix it into the logits of the requests that ask for it."""
        import torch

        from oatlite.next_token import NextTokens

        assert self._options.reference is not None
        model = self._load_reference(self._options.reference)
        reference = NextTokens(model, torch.device(self._options.device))
        if self._options.swaps:
            self._reference_weights = _named(model)
        mix_in(self._llm.llm_engine.model_executor.driver_worker.worker.model_runner, reference)
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
            self.generate([prompt] * count, range(count), WARM_UP)
        self._llm.reset_prefix_cache()
        return time.perf_counter() - start

    def begin_load(self) -> None:
        """Enter ``LOADING``: the old weights are given up layer by layer from here on."""
        if self.state is not State.READY:
            raise RuntimeError(f"weights cannot be loaded while the engine is {self.state.value}")
        self.state = State.LOADING
        self._arriving = {}
        if self._options.adapter is None:
            begin_reload(self.model, self._options.device)

    def load_bucket(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load tensors under their Hugging Face names. On return nothing refers to their memory any more."""
        self._guarded(lambda: self._load(tensors) if self._options.adapter is None else self._keep(tensors))

    def _keep(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._arriving |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors}

    def _load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._take(tensors)
        release(self.model, tensors)
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

        def finish() -> None:
            if self._options.adapter is None:
                finish_reload(self.model, self._llm.llm_engine.model_config)
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

    def _guarded(self, action: Callable[[], None]) -> None:
        if self.state is not State.LOADING:
            raise RuntimeError(f"weights come only between begin_load and finish_load, not while {self.state.value}")
        try:
            action()
        except BaseException:
            self.state = State.TAINTED
            raise


def _params(
    seed: int,
    sampling: SamplingOptions,
    *,
    output_kind: str = "CUMULATIVE",
    mixture: tuple[float, float] | None = None,
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        seed=None if sampling.is_greedy else int(seed) % 2**63,
        logprobs=0,
        flat_logprobs=True,
        extra_args=None if mixture is None else {MIXTURE: mixture},
        output_kind=RequestOutputKind[output_kind],
    )


def _named(model: Any) -> Mapping[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _sample(output: Any) -> Sample:
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = output.logprobs
    assert logprobs is not None and len(logprobs) == len(tokens)
    values = np.fromiter(
        (logprobs.logprobs[logprobs.start_indices[i]] for i in range(len(tokens))), np.float32, len(tokens)
    )
    return Sample(tokens=tokens, logprobs=values, text=output.text, is_finished=output.finish_reason == "stop")
