"""The actor process: answers its learner rank's requests with the engine and the oracle, until told to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

import numpy as np

from oatlite.algorithms import build_algorithm
from oatlite.config.oracle_names import for_evaluation
from oatlite.config.schema import Config
from oatlite.engine import WARM_UP, Engine, EngineOptions
from oatlite.errors import WorkerDied
from oatlite.lora import adapter_of
from oatlite.messages import (
    BucketLoaded,
    BucketReady,
    CandidateBatch,
    CompareRequest,
    CudaIpcHandle,
    EncodeRequest,
    FeatureBatch,
    GenerateRequest,
    Hello,
    Message,
    PreferenceBatch,
    ShmHandle,
    Stop,
    WeightManifest,
    cut,
    join,
)
from oatlite.oracles import PreferenceOracle, build_oracle, checked
from oatlite.oracles.features import Encodes, build_encoder
from oatlite.samplers import sampling_plan
from oatlite.transport import Spoke, address
from oatlite.weights import WeightReader
from oatlite.workers.lifeline import Lifeline
from oatlite.workers.spec import WorkerSpec, rollout_socket

log = logging.getLogger(__name__)

POLL_S = 1.0
NO_SCORES = np.zeros(0, np.float32)


def run_actor(spec: WorkerSpec, lifeline: Lifeline) -> None:
    """Start the engine, then the oracle beside it, and serve."""
    lifeline.stage("starting", "engine")
    engine = Engine(_engine_options(spec))
    lifeline.stage("starting", "oracle")
    with engine.hugging_face_models():
        oracles = build_oracles(spec.config, device=spec.device)
        encoder = None
        if spec.config.explore.rule not in ("none", "apl"):
            encoder = build_encoder(spec.config, oracles["train"], device=spec.device)
    lifeline.stage("starting", "warm-up")
    longest = max(1, min(16, spec.max_model_len - WARM_UP.max_new_tokens))
    log.info("warmed up in %.1f s", engine.warm_up(np.arange(1, 1 + longest, dtype=np.int32)))
    rank = spec.learner_of(spec.index)
    spoke = Spoke(address(spec.private_dir, rollout_socket(rank)), spec.role, spec.run_id)
    try:
        Actor(spec, engine, oracles, spoke, lifeline, encoder).serve()
    finally:
        spoke.close(flush_s=5.0)


def build_oracles(config: Config, *, device: str) -> dict[str, PreferenceOracle]:
    """The oracle of training, and that of evaluation, which is the same one where nothing else is asked for."""
    names = config.oracle.path
    training = build_oracle(names, config, device=device)
    if not config.eval.oracle:
        return {"train": training, "eval": training}
    return {"train": training, "eval": build_oracle(config.eval.oracle, for_evaluation(config), device=device)}


def _engine_options(spec: WorkerSpec) -> EngineOptions:
    config = spec.config
    assert config.model.path is not None
    return EngineOptions(
        path=config.model.path,
        dtype=config.model.dtype,
        max_model_len=spec.max_model_len,
        seed=config.run.seed,
        device=spec.device,
        gpu_memory_utilization=config.placement.gpu_memory_utilization,
        kv_cache_gib=config.placement.kv_cache_gib,
        threads=spec.threads,
        trust_remote_code=config.model.trust_remote_code,
        adapter=adapter_of(config.lora) if config.lora.sync == "adapter" else None,
        samplers=frozenset(sampling_plan(build_algorithm(config.algorithm), config.rollout.sampler)),
        reference=config.model.reference or config.model.path,
        mixture_weight=config.sampling.mixture_weight,
    )


class Actor:
    """Holds the weights of one policy version at a time, and generates with no other."""

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        oracles: Mapping[str, PreferenceOracle],
        spoke: Spoke,
        lifeline: Lifeline,
        encoder: Encodes | None = None,
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._oracles = oracles
        self._encoder = encoder
        self._spoke = spoke
        self._lifeline = lifeline
        self._policy_version = 0
        self._manifest: WeightManifest | None = None
        self._reader: WeightReader | None = None

    def serve(self) -> None:
        """Answer until Stop. Raises WorkerDied on a request that this actor cannot be meant by."""
        self._spoke.send(Hello(run_id=self._spec.run_id, role=self._spec.role, pid=os.getpid()))
        self._lifeline.stage("idle")
        while True:
            message = self._spoke.receive(POLL_S)
            if isinstance(message, Stop):
                return
            if message is not None:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case WeightManifest():
                self._manifest = message
            case ShmHandle() | CudaIpcHandle():
                if self._manifest is None:
                    raise WorkerDied("a weight buffer was offered without its manifest")
                self._reader = WeightReader(self._manifest, message)
            case _ if self._reader is None:
                # Meant for the actor that had this name before; after the answer to our Hello it comes again.
                log.warning("dropped a %s that came before the weight buffer", type(message).__name__)
            case GenerateRequest():
                with self._lifeline.doing("generate", f"{message.seeds.size} samples"):
                    self._spoke.send(self._generate(message))
            case CompareRequest():
                with self._lifeline.doing("score", f"{len(message.prompts)} pairs"):
                    self._spoke.send(self._compare(message))
            case EncodeRequest():
                with self._lifeline.doing("score", f"{len(message.prompts)} candidates"):
                    self._spoke.send(self._encode(message))
            case BucketReady():
                with self._lifeline.doing("sync", f"version {message.version}"):
                    self._spoke.send(self._load(message, self._reader))
            case _:
                raise WorkerDied(f"an actor was sent a {type(message).__name__}")

    def _generate(self, request: GenerateRequest) -> CandidateBatch:
        if request.policy_version != self._policy_version:
            raise WorkerDied(
                f"asked to sample from policy version {request.policy_version} while holding {self._policy_version}"
            )
        start = time.perf_counter()
        prompts = cut(request.prompt_tokens, request.prompt_lengths)
        samples = self._engine.generate(
            [prompt for prompt in prompts for _ in request.samplers],
            request.seeds.tolist(),
            request.sampling,
            samplers=request.samplers * len(prompts),
        )
        tokens, lengths = join([sample.tokens for sample in samples], "int32")
        logprobs, _ = join([sample.logprobs for sample in samples], "float32")
        return CandidateBatch(
            run_id=request.run_id,
            batch_id=request.batch_id,
            policy_version=self._policy_version,
            samplers=request.samplers,
            response_tokens=tokens,
            response_lengths=lengths,
            sampler_logprobs=logprobs,
            is_finished=np.array([sample.is_finished for sample in samples], np.bool_),
            texts=[sample.text for sample in samples],
            generate_s=time.perf_counter() - start,
        )

    def _compare(self, request: CompareRequest) -> PreferenceBatch:
        start = time.perf_counter()
        oracle, references = self._oracles[request.purpose], request.references or None
        failures_before = oracle.num_failures
        verdicts = oracle.compare(request.prompts, request.first, request.second, references)
        verdicts = checked(verdicts, len(request.prompts))
        return PreferenceBatch(
            run_id=request.run_id,
            batch_id=request.batch_id,
            first_win=verdicts.first_win,
            is_valid=verdicts.is_valid,
            first_scores=NO_SCORES if verdicts.first_scores is None else verdicts.first_scores,
            second_scores=NO_SCORES if verdicts.second_scores is None else verdicts.second_scores,
            oracle_s=time.perf_counter() - start,
            num_failures=oracle.num_failures - failures_before,
        )

    def _encode(self, request: EncodeRequest) -> FeatureBatch:
        if self._encoder is None:
            raise WorkerDied("asked for features without an encoder")
        start = time.perf_counter()
        features = self._encoder.features(request.prompts, request.responses)
        return FeatureBatch(
            run_id=request.run_id,
            batch_id=request.batch_id,
            features=features.reshape(-1),
            num_features=features.shape[1],
            encode_s=time.perf_counter() - start,
        )

    def _load(self, offer: BucketReady, reader: WeightReader) -> BucketLoaded:
        start = time.perf_counter()
        if offer.bucket == 0:
            self._engine.begin_load()
        tensors, checksum = reader.read(offer.bucket)
        read_s = time.perf_counter() - start
        if checksum != offer.checksum:
            raise WorkerDied(f"bucket {offer.bucket} of weights {offer.version} arrived damaged")
        self._engine.load_bucket(tensors)
        if offer.is_last:
            self._engine.finish_load()
            self._policy_version = offer.version
        return BucketLoaded(
            run_id=offer.run_id,
            version=offer.version,
            bucket=offer.bucket,
            checksum=checksum,
            load_s=time.perf_counter() - start - read_s,
        )
