"""How a learner rank is put together, and how it leaves its last policy behind."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from oatlite.algorithms import build_algorithm
from oatlite.algorithms.base import Algorithm
from oatlite.checkpoint import checkpoints_of, read
from oatlite.config.schema import Config
from oatlite.config.steps import gradient_steps
from oatlite.data import load_prompts
from oatlite.loading import load_callable
from oatlite.lora import (
    Published,
)
from oatlite.metrics.sinks import Sink, WandbSink
from oatlite.preferences import load_preferences
from oatlite.trainer import OptimizerOptions, Ranks, Trainer, join_ranks
from oatlite.transport import Hub, address
from oatlite.weights import DTYPES, WeightExporter, create_buffer, plan_layout
from oatlite.workers.active import ActivePreferences
from oatlite.workers.ahead import Ahead, Unseen
from oatlite.workers.contracts import Collects, Judges, Share, Shows
from oatlite.workers.evaluation import Judge
from oatlite.workers.experience import Experience
from oatlite.workers.explorer import Explorer
from oatlite.workers.gold import GoldScore, checked_gold
from oatlite.workers.journal import Journal
from oatlite.workers.learned import leave_behind, load_learned, reference_of
from oatlite.workers.learner import Learner
from oatlite.workers.lifeline import Lifeline
from oatlite.workers.offline import HeldOutPairs, RecordedExperience
from oatlite.workers.policies import PolicyWeights, behaviour_is_kept
from oatlite.workers.rollout import ActorPool, Deadlines
from oatlite.workers.saving import Keeper, Progress
from oatlite.workers.spec import STOP_SIGNAL, WorkerSpec, rollout_socket
from oatlite.workers.turns import Turn
from oatlite.workers.update import Updater

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ORACLE_SLACK_S = 30.0
"""A server that fails until its deadline is told by the actor that asked it, before its actor counts as silent."""


def run_learner(spec: WorkerSpec, lifeline: Lifeline) -> None:
    """Load, meet the other ranks and the actors, run the loop, write the final policy."""
    config, device = spec.config, _device(spec)
    torch.set_num_threads(spec.threads)
    ranks = _ranks(spec, device)
    lifeline.stage("starting", "model")
    algorithm = build_algorithm(config.algorithm)
    policy = load_learned(spec, device)
    sent, dtype = policy.published[config.lora.sync], DTYPES[config.model.dtype]
    lifeline.stage("waiting", "for ranks")
    join_ranks(ranks)
    lifeline.stage("starting", "trainer")
    pool = None if config.rollout.offline else _connect(spec, sent, dtype, device, policy.vocab_size)
    trainer = Trainer(policy.model, _optimizer_options(spec), ranks)
    policies = PolicyWeights(trainer, sent, dtype, keeps_behaviour=pool is not None and behaviour_is_kept(config))
    reference, at_hand = reference_of(config, algorithm, device, policy.model, trainer)
    updater = Updater(config, trainer, algorithm, reference, policy.rows, at_hand)
    share = Share(rank=spec.index, count=int(config.placement.learners or 1))
    head = None
    if pool is not None and config.explore.rule not in ("none", "apl"):
        head = Explorer(config, share, pool, trainer, device)
    lifeline.stage("starting", "data")
    beside = Unseen() if config.rollout.asynchronous else None
    experience, judge = _halves(
        spec, pool, algorithm, updater, policy.tokenizer, lifeline, beside or lifeline, share, head
    )
    keeper, progress = _checkpoints(spec, trainer, policies, updater, lifeline, head)
    journal = None
    if spec.index == 0:
        journal = Journal(spec.run_dir, lifeline, _more_sinks(spec), resumed_step=progress.step or None)
    is_stop_asked = threading.Event()
    signal.signal(STOP_SIGNAL, lambda *_: is_stop_asked.set())
    gives_back = torch.cuda.empty_cache if config.placement.sleep else None
    if pool is not None:
        lifeline.stage("waiting", "for actors")
        pool.wait_until_ready()
        if gives_back is not None:
            gives_back()
        pool.sync(progress.policy_version, policies.behaviour)
    lifeline.stage("idle")
    is_complete = Learner(
        config=config,
        num_steps=spec.most_steps,
        experience=experience,
        judge=judge,
        actors=pool,
        updater=updater,
        ranks=trainer,
        policies=policies,
        journal=journal,
        shows=lifeline,
        measure=lambda: _measure(spec),
        keeper=keeper,
        progress=progress,
        is_stop_asked=is_stop_asked.is_set,
        ahead=Ahead(config, experience, spec.most_steps, progress.step + 1, beside.alone_s) if beside else None,
        turn=Turn(spec.gpu_lock, gives_back, timeout_s=spec.turn_s).taken,
    ).run()
    if pool is not None:
        pool.stop()
    if is_complete:
        with lifeline.doing("saving", "model"):
            is_kept = spec.index == 0
            hosted = {way: policies.copy_to_host(dtype, one, is_kept=is_kept) for way, one in policy.published.items()}
            leave_behind(spec, policy.model, hosted, head.head if head is not None else None)
    for part in (journal, pool, trainer):
        if part is not None:
            part.close()


def _checkpoints(
    spec: WorkerSpec,
    trainer: Trainer,
    policies: PolicyWeights,
    updater: Updater,
    lifeline: Lifeline,
    head: Explorer | None,
) -> tuple[Keeper, Progress]:
    """What saves the rank's part, and where the run stands: at its beginning, or where it was saved."""
    keeper = Keeper(
        checkpoints_of(spec.run_dir),
        keep_last=spec.config.checkpoint.keep_last,
        trainer=trainer,
        policies=policies,
        buffer=updater.buffer,
        rank=spec.index,
        about={"config": spec.config.model_dump(mode="json"), "fingerprints": spec.fingerprints},
        explorer=head,
    )
    if spec.resume_from is None:
        return keeper, Progress()
    lifeline.stage("starting", f"restoring {spec.resume_from.name}")
    return keeper, keeper.restore(read(spec.resume_from))


def _halves(
    spec: WorkerSpec,
    pool: ActorPool | None,
    algorithm: Algorithm,
    updater: Updater,
    tokenizer: PreTrainedTokenizerBase,
    shows: Shows,
    shows_sampling: Shows,
    share: Share,
    head: Explorer | None,
) -> tuple[Collects, Judges]:
    """Where pairs come from, and what a policy is judged by: with actors or, offline, without."""
    config = spec.config
    if pool is None:
        pairs, held_out_pairs = load_preferences(config.data, config.eval.prompts, tokenizer)
        return RecordedExperience(config, share, pairs), HeldOutPairs(share, held_out_pairs, updater)
    prompts, held_out = load_prompts(
        config.data, config.eval.prompts, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens
    )
    explorer = ActivePreferences(config, updater.score_by_reference) if config.explore.rule == "apl" else head
    gold = _gold(config)
    experience = Experience(
        config, share, prompts, algorithm, pool, shows_sampling, gold, explorer, updater.score_by_reference
    )
    return experience, Judge(config, share, held_out, pool, gold, head, shows)


def _ranks(spec: WorkerSpec, device: torch.device) -> Ranks:
    return Ranks(
        rank=spec.index,
        count=int(spec.config.placement.learners or 1),
        rendezvous=spec.private_dir / "ranks",
        device=device,
        timeout_s=spec.config.timeouts.learn_s,
    )


def _device(spec: WorkerSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")


def _connect(
    spec: WorkerSpec,
    sent: Mapping[str, Published],
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int,
) -> ActorPool:
    config = spec.config
    layout = plan_layout([(name, tensor.shape) for name, tensor in sent.items()], dtype, config.sync.bucket_mib << 20)
    buffer = create_buffer(config.sync.transport, layout.buffer_bytes, spec.run_id, device)
    timeouts = config.timeouts
    return ActorPool(
        Hub(address(spec.private_dir, rollout_socket(spec.index)), spec.run_id),
        spec.actors_of(spec.index),
        spec.run_id,
        # An actor that dies over a request has the time to start again.
        Deadlines(
            start_s=timeouts.start_s,
            generate_s=max(timeouts.generate_s, timeouts.start_s),
            oracle_s=max(timeouts.oracle_s + ORACLE_SLACK_S, timeouts.start_s),
            sync_s=max(timeouts.sync_s, timeouts.start_s),
        ),
        WeightExporter(layout, buffer),
        vocab_size,
    )


def _optimizer_options(spec: WorkerSpec) -> OptimizerOptions:
    config = spec.config
    learner = config.learner
    return OptimizerOptions(
        lr=learner.lr,
        schedule=learner.schedule,
        warmup_ratio=learner.warmup_ratio,
        num_steps=sum(gradient_steps(config, step) for step in range(1, spec.num_steps + 1)),
        micro_steps=int(learner.batch_size or 0) // int(config.placement.learners or 1) // learner.micro_batch_size,
        micro_batch_size=learner.micro_batch_size,
        weight_decay=learner.weight_decay,
        betas=learner.adam_betas,
        eps=learner.adam_eps,
        max_grad_norm=learner.max_grad_norm,
        zero_stage=int(learner.zero_stage or 0),
        dtype=config.model.dtype,
        offloads_optimizer=learner.optimizer_offload,
        offloads_parameters=learner.parameter_offload,
    )


def _gold(config: Config) -> GoldScore | None:
    name = config.eval.gold_score
    return checked_gold(name, load_callable(name)) if name else None


def _more_sinks(spec: WorkerSpec) -> list[Sink]:
    if not spec.config.run.wandb:
        return []
    run = spec.config.run
    return [WandbSink(run.wandb_project, spec.run_dir.name, spec.run_dir, spec.config.model_dump(mode="json"))]


def _measure(spec: WorkerSpec) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": spec.threads,
    }
    if spec.device == "cuda":
        measured["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return measured
