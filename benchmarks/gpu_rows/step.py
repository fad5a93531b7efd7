"""A step of online SimPO by oatlite's own parts: the learner's loop and update here, an actor with its reward model in
another process, weights between them as in a run. Only what a machine lacks is stood for, and said.
"""

from __future__ import annotations

import importlib.util
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from one_actor import startable_actor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gpu_rows.plain_trainer import PlainTrainer
from gpu_rows.roofline import Work, roofline
from gpu_rows.scale import PAD, Scale, Tell, text_of, word_tokenizer
from gpu_rows.timing import seconds
from oatlite.algorithms import build_algorithm
from oatlite.config.schema import Config
from oatlite.data import PromptSet
from oatlite.errors import WorkerDied
from oatlite.launcher import Worker
from oatlite.layout_choice import choose_layout
from oatlite.lora import all_parameters
from oatlite.models import PairModel, load_policy
from oatlite.testing import InMemoryJournal
from oatlite.trainer import OptimizerOptions, Ranks, Trainer
from oatlite.weights import plan_layout
from oatlite.workers.contracts import Share
from oatlite.workers.experience import Experience, Rollouts
from oatlite.workers.learner import Learner
from oatlite.workers.policies import PolicyWeights
from oatlite.workers.rollout import ActorPool
from oatlite.workers.update import Layout, Updater

NUM_STEPS, WARM_UP = 5, 2
BUCKET_BYTES = 256 << 20
RANKS_S = 120.0
END_S = 10.0
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Folders:
    policy: Path
    reward: Path


def save_networks(scale: Scale, folder: Path) -> Folders:
    """A random policy and a random reward model of its shape, with a tokenizer that both share."""
    tokenizer = word_tokenizer(scale.vocab_size)
    kinds = {
        "policy": (AutoModelForCausalLM, scale.config()),
        "reward": (AutoModelForSequenceClassification, scale.config(num_labels=1)),
    }
    for name, (auto_class, config) in kinds.items():
        scale.network(auto_class, config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if scale.on_gpu:
        torch.cuda.empty_cache()
    return Folders(folder / "policy", folder / "reward")


def random_prompts(scale: Scale, count: int) -> PromptSet:
    rng = np.random.default_rng(0)
    tokens = [scale.tokens(rng, scale.prompt_tokens) for _ in range(count)]
    texts = [text_of(one) for one in tokens]
    return PromptSet(texts=texts, raw_texts=texts, tokens=tokens, references=None, rows=np.arange(count), num_dropped=0)


def settings(scale: Scale, folders: Folders) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(folders.policy), "dtype": scale.dtype_name},
            "oracle": {"path": str(folders.reward), "dtype": scale.dtype_name},
            "sampling": {"max_new_tokens": scale.new_tokens},
            "rollout": {"prompts_per_step": scale.num_prompts},
            "learner": {
                "batch_size": scale.num_prompts,
                "buffer_size": scale.num_prompts,
                "micro_batch_size": scale.micro_batch_size,
                "zero_stage": 2 if scale.dtype_name == "bfloat16" else 0,
            },
            "placement": {"actors": 1, "learners": 1},
        }
    )


def start_trainer(scale: Scale, tell: Tell, config: Config, folder: Path) -> tuple[PairModel, Any]:
    """The policy and what trains it: DeepSpeed, or torch alone where that is missing or does not start."""
    learner = config.learner
    options = OptimizerOptions(
        lr=learner.lr,
        schedule=learner.schedule,
        warmup_ratio=learner.warmup_ratio,
        num_steps=NUM_STEPS,
        micro_steps=scale.num_prompts // scale.micro_batch_size,
        micro_batch_size=scale.micro_batch_size,
        weight_decay=learner.weight_decay,
        betas=learner.adam_betas,
        eps=learner.adam_eps,
        max_grad_norm=learner.max_grad_norm,
        zero_stage=learner.zero_stage or 0,
        dtype=scale.dtype_name,
    )
    ranks = Ranks(rank=0, count=1, rendezvous=folder / "ranks", device=scale.place(), timeout_s=RANKS_S)

    def policy() -> PairModel:
        return PairModel(load_policy(str(config.model.path), scale.dtype())).to(scale.place())

    why = "DeepSpeed is not installed"
    if importlib.util.find_spec("deepspeed") is not None:
        try:
            model = policy()
            trainer = Trainer(model, options, ranks)
        except Exception as error:  # what a machine without a compiler, say, makes of DeepSpeed's start
            why = f"DeepSpeed does not start ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        else:
            tell("learner", f"DeepSpeed, ZeRO {options.zero_stage}, {scale.dtype_name}")
            return model, trainer
    tell("learner", f"torch's AdamW on a float32 copy: {why}")
    model = policy()
    return model, PlainTrainer(model, options)


@contextmanager
def watched(worker: Worker) -> Iterator[None]:
    """Raise WorkerDied in this, the main thread, if the actor ends; in any case its log becomes part of this one."""
    is_over = threading.Event()

    def died(*_: object) -> None:
        raise WorkerDied(f"the actor ended with {worker.exit_code()}; its log is above")

    def watch() -> None:
        while not is_over.wait(POLL_S):
            if worker.exit_code() is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    before = signal.signal(signal.SIGUSR2, died)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, before)
        sys.stderr.write(worker.log.read_text(errors="replace"))


class Kept:
    """Passes on what an Experience collects, and keeps the last of it."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self.last: Rollouts | None = None

    def collect(self, step: int, num_queries: int) -> Rollouts:
        self.last = self._experience.collect(step, num_queries)
        return self.last


class Silent:
    def doing(self, stage: str, detail: str = "") -> AbstractContextManager[None]:
        return nullcontext()


def step_hugging_face(scale: Scale, tell: Tell) -> None:
    _steps(scale, tell, "gpu_rows.hugging_face_actor", "Hugging Face's generate, which stands for vLLM")


def step_vllm(scale: Scale, tell: Tell) -> None:
    _steps(scale, tell, "oatlite.workers", "vLLM")


def _steps(scale: Scale, tell: Tell, module: str, sampler: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-step-") as name:
        folder = Path(name)
        folders = save_networks(scale, folder)
        config = settings(scale, folders)
        buckets = plan_layout(scale.parameter_shapes(), scale.dtype(), BUCKET_BYTES)
        more = {"model": {"dtype": scale.dtype_name}, "oracle": {"dtype": scale.dtype_name}}
        tell("sampler", sampler)
        with startable_actor(
            folders.policy,
            folders.reward,
            buckets,
            scale.vocab_size,
            folder,
            max_model_len=scale.prompt_tokens + scale.new_tokens,
            lora=None,
            more=more,
            device="cuda" if scale.on_gpu else "cpu",
            module=module,
        ) as (pool, start):
            worker = start()
            with watched(worker):
                before = time.perf_counter()
                pool.wait_until_ready()  # before the learner takes memory, of which vLLM measures what is free
                tell("actor", f"ready after {time.perf_counter() - before:.1f} s")
                model, trainer = start_trainer(scale, tell, config, folder)
                _run(scale, tell, config, pool, model, trainer)
            pool.stop()
            worker.wait(END_S)
        trainer.close()


def _run(scale: Scale, tell: Tell, config: Config, pool: ActorPool, model: PairModel, trainer: Any) -> None:
    algorithm, share = build_algorithm(config.algorithm), Share(rank=0, count=1)
    longest = (scale.prompt_tokens, scale.new_tokens)
    shared = choose_layout(model, scale.vocab_size, PAD, scale.place(), longest=longest)
    rows = {name: Layout(name=name, pad_token_id=PAD, device=scale.place()) for name in (shared, "plain")}
    updaters = {name: Updater(config, trainer, algorithm, None, layout) for name, layout in rows.items()}
    policies = PolicyWeights(trainer, all_parameters(model.model), scale.dtype(), keeps_behaviour=False)
    prompts = random_prompts(scale, NUM_STEPS * scale.num_prompts)
    kept = Kept(Experience(config, share, prompts, algorithm, pool, Silent(), None))
    journal = InMemoryJournal()
    pool.sync(0, policies.behaviour)
    Learner(
        config=config,
        num_steps=NUM_STEPS,
        experience=kept,
        judge=SimpleNamespace(num_prompts=0),  # type: ignore[arg-type]
        actors=pool,
        updater=updaters[shared],
        ranks=trainer,
        policies=policies,
        journal=journal,
        shows=Silent(),
        measure=dict,
    ).run()
    if scale.on_gpu:
        peak = torch.cuda.max_memory_allocated()
        tell("learner's memory", f"{peak / 2**30:.1f} GiB at most", peak_bytes=peak)
    records: list[Any] = [record for record in journal.of("step") if record["step"] > WARM_UP]
    assert kept.last is not None
    pairs = kept.last.pairs
    learn_s = {
        name: seconds(scale, lambda name=name: updaters[name].learn(pairs, NUM_STEPS), repeats=2, warm_ups=1)
        for name in updaters
    }
    _tell_stages(scale, tell, records, shared, learn_s)


def _tell_stages(scale: Scale, tell: Tell, records: list[Any], layout: str, learn_s: dict[str, float]) -> None:
    stages = ("generate_s", "score_s", "learn_s", "sync_s", "reload_s", "step_s")
    found = {stage: statistics.median(record["perf"][stage] for record in records) for stage in stages}
    work = Work.of(scale, scale.num_prompts, scale.prompt_tokens)
    best = roofline(work, scale, is_shared=layout != "plain")
    for stage in stages:
        limit = getattr(best, stage, None)
        beside = "" if limit is None else f", at best {limit:.4f} s, {limit / found[stage]:.0%} of it reached"
        if stage == "reload_s":
            beside = ", the part of sync_s that the sampler spends on its own copy"
        tell(stage.removesuffix("_s"), f"{found[stage]:.4f} s{beside}", seconds=found[stage], roofline_s=limit)
    pairs, tokens = scale.num_prompts, records[-1]["response_tokens"]
    tell("shape", f"{pairs} prompts of {scale.prompt_tokens}, two responses of {tokens:.0f} tokens each")
    said = ", ".join(f"{name} {value:.3f} s" for name, value in learn_s.items())
    tell("learn again, by layout", f"{said}; the rest of the step the same", seconds=learn_s)
    mean, largest = records[-1]["mismatch_mean"], records[-1]["mismatch_max"]
    tell(
        "sampler against learner",
        f"log-probabilities differ by {mean:.2e} on average, at most {largest:.2e}",
        mean=mean,
        largest=largest,
    )
