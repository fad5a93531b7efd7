"""How a learner rank is put together, and how it leaves its last policy behind."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from oatlite.algorithms import build_algorithm
from oatlite.algorithms.base import Algorithm
from oatlite.checkpoint import checkpoints_of, read
from oatlite.config.schema import Config
from oatlite.config.steps import gradient_steps
from oatlite.data import load_prompts, load_tokenizer
from oatlite.epistemic import save_head
from oatlite.loading import load_callable
from oatlite.lora import (
    Published,
    adapter_of,
    adapter_off,
    adapter_parameters,
    add_adapter,
    all_parameters,
    merged_parameters,
    write_adapter,
)
from oatlite.maths.ensemble import EpistemicHead
from oatlite.metrics.sinks import Sink, WandbSink
from oatlite.models import ForwardBatch, PairModel, checkpoint_gradients, choose_layout, load_policy, save_policy
from oatlite.output_folder import complete_or_absent
from oatlite.preferences import load_preferences
from oatlite.trainer import OptimizerOptions, Ranks, Trainer, join_ranks
from oatlite.transport import Hub, address
from oatlite.weights import DTYPES, WeightExporter, create_buffer, plan_layout
from oatlite.workers.active import ActivePreferences
from oatlite.workers.ahead import Ahead, Unseen
from oatlite.workers.contracts import Collects, Explores, Judges, Share
from oatlite.workers.evaluation import Judge
from oatlite.workers.experience import Experience
from oatlite.workers.explorer import Explorer
from oatlite.workers.gold import GoldScore, checked_gold
from oatlite.workers.journal import Journal
from oatlite.workers.learner import Learner
from oatlite.workers.lifeline import Lifeline
from oatlite.workers.offline import HeldOutPairs, RecordedExperience
from oatlite.workers.policies import PolicyWeights, behaviour_is_kept
from oatlite.workers.reference import ReferenceModel
from oatlite.workers.rollout import ActorPool, Deadlines
from oatlite.workers.saving import Keeper, Progress
from oatlite.workers.spec import STOP_SIGNAL, WorkerSpec, rollout_socket
from oatlite.workers.update import Layout, Updater

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ORACLE_SLACK_S = 30.0
"""A server that fails until its deadline is told by the actor that asked it, before its actor counts as silent."""


def run_learner(spec: WorkerSpec, lifeline: Lifeline) -> None:
    """Load, meet the other ranks and the actors, run the loop, write the final policy."""
    config = spec.config
    torch.set_num_threads(spec.threads)
    device = _device(spec)
    ranks = _ranks(spec, device)
    lifeline.stage("starting", "model")
    algorithm = build_algorithm(config.algorithm)
    policy, published = _load_policy(spec)
    tokenizer = load_tokenizer(str(config.model.path), config.model.trust_remote_code)
    longest = (spec.longest_prompt, spec.longest_response)
    layout = choose_layout(policy.to(device), len(tokenizer), int(tokenizer.pad_token_id), device, longest=longest)
    if config.learner.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    sent = published[config.lora.sync]
    dtype = DTYPES[config.model.dtype]
    lifeline.stage("starting", "ranks")
    join_ranks(ranks)
    pool = None
    if not config.rollout.offline:
        pool = _connect(spec, sent, dtype, device, vocab_size=policy.model.get_input_embeddings().num_embeddings)
    trainer = Trainer(policy, _optimizer_options(spec), ranks)
    policies = PolicyWeights(
        trainer,
        sent,
        dtype,
        keeps_behaviour=pool is not None and behaviour_is_kept(config),
    )
    rows = Layout(name=layout, pad_token_id=int(tokenizer.pad_token_id), device=device)
    reference, at_hand = _reference(config, algorithm, device, policy, trainer)
    updater = Updater(config, trainer, algorithm, reference, rows, at_hand)
    share = Share(rank=spec.index, count=int(config.placement.learners or 1))
    head = None
    if pool is not None and config.explore.rule not in ("none", "apl"):
        head = Explorer(config, share, pool, trainer, device)
    explorer = ActivePreferences(config, updater.score_by_reference) if config.explore.rule == "apl" else head
    experience, judge = _halves(spec, pool, algorithm, updater, tokenizer, lifeline, share, explorer, head)
    keeper, progress = _checkpoints(spec, trainer, policies, updater, lifeline, head)
    journal = None
    if spec.index == 0:
        journal = Journal(spec.run_dir, lifeline, _more_sinks(spec), resumed_step=progress.step or None)
    is_stop_asked = threading.Event()
    signal.signal(STOP_SIGNAL, lambda *_: is_stop_asked.set())
    if pool is not None:
        lifeline.stage("starting", "waiting for actors")
        pool.wait_until_ready()
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
        ahead=Ahead(config, experience, spec.most_steps, progress.step + 1) if config.rollout.asynchronous else None,
    ).run()
    if pool is not None:
        pool.stop()
    if is_complete:
        with lifeline.doing("saving", "model"):
            is_kept = spec.index == 0
            _save(
                spec,
                policy,
                {way: policies.copy_to_host(dtype, one, is_kept=is_kept) for way, one in published.items()},
                head.head if head is not None else None,
            )
    if journal is not None:
        journal.close()
    if pool is not None:
        pool.close()
    trainer.close()


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
    lifeline: Lifeline,
    share: Share,
    explorer: Explores | None,
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
    gold = _gold(config)
    shows = Unseen() if config.rollout.asynchronous else lifeline
    experience = Experience(config, share, prompts, algorithm, pool, shows, gold, explorer)
    return experience, Judge(config, share, held_out, pool, gold, head)


def _load_policy(spec: WorkerSpec) -> tuple[PairModel, dict[str, dict[str, Published]]]:
    """The policy, with its adapter if it has one, and what can be sent of it by the ways of ``lora.sync``."""
    quantized_on = _device(spec) if spec.config.lora.quantize != "none" else None
    policy = PairModel(_load(spec.config, spec.config.model.path, quantized_on))
    adapter = adapter_of(spec.config.lora)
    if adapter is None:
        return policy, {"merged": all_parameters(policy.model)}
    add_adapter(policy.model, adapter, spec.config.run.seed)
    return policy, {"merged": merged_parameters(policy.model), "adapter": adapter_parameters(policy.model)}


def _save(
    spec: WorkerSpec,
    policy: PairModel,
    weights: Mapping[str, dict[str, torch.Tensor]],
    head: EpistemicHead | None,
) -> None:
    """Leave the last policy behind, by the first rank: as a model, and its adapter alone if it has one; and the head
    of exploration."""
    if spec.index != 0:
        return
    base, adapter = str(spec.config.model.path), adapter_of(spec.config.lora)
    with complete_or_absent(spec.run_dir / "model") as folder:
        save_policy(policy.model, weights["merged"], base, folder)
    if adapter is not None:
        with complete_or_absent(spec.run_dir / "adapter") as folder:
            write_adapter(folder, weights["adapter"], adapter, base=base)
    if head is not None:
        with complete_or_absent(spec.run_dir / "head") as folder:
            save_head(folder, head, encoder=spec.config.explore.encoder or spec.config.oracle.path[0])


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


def _load(config: Config, path: str | None, quantized_on: torch.device | None = None) -> torch.nn.Module:
    assert path is not None
    return load_policy(
        path,
        DTYPES[config.model.dtype],
        trust_remote_code=config.model.trust_remote_code,
        quantized_on=quantized_on,
    )


def _reference(
    config: Config, algorithm: Algorithm, device: torch.device, policy: PairModel, trainer: Trainer
) -> tuple[Callable[[ForwardBatch], torch.Tensor] | None, Callable[[], AbstractContextManager[None]]]:
    """What scores a pair for the reference: nothing, a model of its own, or the policy with its adapter off. And what
    has to be open meanwhile."""
    if not (algorithm.needs.reference or config.learner.log_kl or config.explore.rule == "apl"):
        return None, nullcontext
    if config.lora.rank and config.model.reference == config.model.path:

        def base(batch: ForwardBatch) -> torch.Tensor:
            with adapter_off(policy.model):
                return trainer.forward(batch)

        return base, nullcontext
    model = PairModel(_load(config, config.model.reference))
    reference = ReferenceModel(model, device, is_offloaded=config.learner.reference_offload)
    return reference, reference.at_hand


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
