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
from oatlite.workers.lifeline import Lifeline
from oatlite.workers.rest import Awake, Rest
from oatlite.workers.spec import WorkerSpec, rollout_socket
from oatlite.workers.turns import Turn

log = logging.getLogger(__name__)

POLL_S = 1.0
NO_SCORES = np.zeros(0, np.float32)


def run_actor(spec: WorkerSpec, lifeline: Lifeline) -> None:
    """Start the engine, then the oracle beside it, and serve."""
    turn = Turn(spec.gpu_lock, timeout_s=spec.turn_s)
    if turn.is_shared:
        lifeline.stage("waiting", "for its GPU")
    with turn.taken():
        engine, oracles, encoder = _start(spec, lifeline)
    rest = Awake(engine)
    if spec.config.placement.sleep:
        rest = Rest(engine, turn, has_adapter=spec.config.lora.sync == "adapter")
    rank = spec.learner_of(spec.index)
    spoke = Spoke(address(spec.private_dir, rollout_socket(rank)), spec.role, spec.run_id)
    try:
        Actor(spec, engine, oracles, spoke, lifeline, encoder, rest).serve()
    finally:
        spoke.close(flush_s=5.0)


def _start(spec: WorkerSpec, lifeline: Lifeline) -> tuple[Engine, dict[str, PreferenceOracle], Encodes | None]:
    """All that takes memory; an engine that sleeps is asleep at the end."""
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
    if spec.config.placement.sleep:
        engine.sleep(keeps_weights=True)
    return engine, oracles, encoder


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
        gpu_memory_utilization=spec.engine_share,
        sleeps=bool(config.placement.sleep),
        kv_cache_gib=config.placement.kv_cache_gib,
        threads=spec.threads,
        trust_remote_code=config.model.trust_remote_code,
        adapter=adapter_of(config.lora) if config.lora.sync == "adapter" else None,
        samplers=frozenset(sampling_plan(build_algorithm(config.algorithm), config.rollout.sampler)),
        reference=config.model.reference or config.model.path,
        mixture_weight=config.sampling.mixture_weight,
        tensor_parallel_size=config.placement.gpus_per_actor,
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
        rest: Awake | None = None,
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._oracles = oracles
        self._encoder = encoder
        self._rest = rest or Awake(engine)
        self._spoke = spoke
        self._lifeline = lifeline
        self._policy_version = 0
        self._manifest: WeightManifest | None = None
        self._has_buffer = False

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
                self._engine.open_weights(self._manifest, message)
                self._has_buffer = True
            case _ if not self._has_buffer:
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
                    self._spoke.send(self._load(message))
            case _:
                raise WorkerDied(f"an actor was sent a {type(message).__name__}")

    def _generate(self, request: GenerateRequest) -> CandidateBatch:
        if request.policy_version != self._policy_version:
            raise WorkerDied(
                f"asked to sample from policy version {request.policy_version} while holding {self._policy_version}"
            )
        wake_s = self._rest.wake()
        start = time.perf_counter()
        prompts = cut(request.prompt_tokens, request.prompt_lengths)
        samples = self._engine.generate(
            [prompt for prompt in prompts for _ in range(request.num_candidates)],
            request.seeds.tolist(),
            request.sampling,
            samplers=request.samplers,
        )
        generate_s = time.perf_counter() - start
        sleep_s = self._rest.sleep(is_last_of_version=request.is_last_of_version)
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
            generate_s=generate_s,
            sleep_s=sleep_s,
            wake_s=wake_s,
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

    def _load(self, offer: BucketReady) -> BucketLoaded:
        start = time.perf_counter()
        if offer.bucket == 0:
            self._rest.begin_load()
        before_s = time.perf_counter() - start
        load_s = self._engine.load_shared(offer.bucket, offer.checksum)
        start = time.perf_counter()
        if offer.is_last:
            self._rest.finish_load()
            self._policy_version = offer.version
        return BucketLoaded(
            run_id=offer.run_id,
            version=offer.version,
            bucket=offer.bucket,
            checksum=offer.checksum,
            load_s=before_s + load_s + time.perf_counter() - start,
        )
