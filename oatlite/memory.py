"""What each process takes of a GPU's memory, by arithmetic alone, and how the GPU is divided among them.

All sizes are in bytes; b is the bytes of a weight, P the parameters of the policy, T those that are trained, R the
learner's ranks. What cannot be told from a shape (contexts, kernels' workspaces, graphs) are constants on the large
side. The estimate decides how much vLLM is given; an explicit ``placement.gpu_memory_utilization`` overrules it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oatlite.model_size import ModelSize

GIB = 1 << 30
CONTEXT_BYTES = 1 * GIB
"""Of one process: CUDA's context, workspaces of cuBLAS and NCCL, what the allocator cannot use between its blocks."""
GRAPH_BYTES = 1 * GIB
"""vLLM's CUDA graphs and its buffers of a fixed size, which stay when it sleeps."""
SMALLEST_CACHE_BYTES = 1 * GIB
MAX_SEQUENCES = 256
"""That vLLM runs at once (``max_num_seqs`` of :mod:`oatlite.engine.options`)."""
BLOCK_TOKENS = 16
"""That vLLM's cache is given out by: the last block of a sequence is part full."""
STEP_TOKENS = 8192
"""Of one of vLLM's steps, at least (``max_num_batched_tokens`` there)."""
REDUCE_NUMBERS = 500_000_000
"""Gradients that DeepSpeed's ZeRO reduces at a time: its buffer of this length is there whatever the model."""
GATHERED_NUMBERS = 1_000_000_000
"""Weights that ZeRO-3 keeps whole at a time, at most."""
LOGITS_CHUNK = 512
"""Tokens whose logits exist at a time in the learner (:mod:`oatlite.models`)."""
WHOLE_GPU = 0.9
"""vLLM's share of a GPU that it has for itself."""

Parts = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerShape:
    """One rank of the learner. ``num_trained`` parameters are those of the adapter, where there is one; a micro-batch
    has ``num_rows`` rows of ``row_tokens`` tokens. ``buffer_bytes`` is the weight buffer on the GPU."""

    policy: ModelSize
    weight_bytes: int
    num_trained: int
    zero_stage: int
    ranks: int
    num_rows: int
    row_tokens: int
    buffer_bytes: int
    reference: ModelSize | None = None
    is_reference_offloaded: bool = False
    is_optimizer_offloaded: bool = False
    are_parameters_offloaded: bool = False
    is_quantized: bool = False
    recomputes_activations: bool = False

    @property
    def is_whole(self) -> bool:
        return self.num_trained == self.policy.num_parameters


def resident(learner: LearnerShape) -> Parts:
    """What a learner rank holds at all times.

    - weights: b P, of ZeRO-3 b P / R, none with offload; in 4 bits about 0.55 a linear weight;
    - gradients: 4 T, of ZeRO 2 and 3 4 T / R (the float32 sum over micro-batches), none with offload;
    - optimizer: AdamW's two moments 8 T, and in half precision a float32 copy 4 T more; with ZeRO by R, none with
      offload;
    - reference: b times its parameters; weight buffer; context.
    """
    shards = learner.ranks if learner.zero_stage else 1
    trained = learner.num_trained
    master = 4 if learner.weight_bytes < 4 else 0
    parts = {
        "weights": _learner_weights(learner),
        "gradients": 4 * trained // (learner.ranks if learner.zero_stage >= 2 else 1),
        "optimizer": (8 + master) * trained // shards,
        "reference": 0,
        "weight buffer": learner.buffer_bytes,
        "context": CONTEXT_BYTES,
    }
    if learner.is_optimizer_offloaded:
        parts |= {"gradients": 0, "optimizer": 0}
    if learner.reference is not None and not learner.is_reference_offloaded:
        parts["reference"] = learner.weight_bytes * learner.reference.num_parameters
    return parts


def _learner_weights(learner: LearnerShape) -> int:
    if learner.are_parameters_offloaded:
        return 0
    shards = learner.ranks if learner.zero_stage == 3 else 1
    count, adapter = learner.policy.num_parameters, 0
    if not learner.is_whole:
        adapter = learner.weight_bytes * learner.num_trained
    if learner.is_quantized:
        embeddings = 2 * learner.policy.vocab_size * learner.policy.hidden_size
        linear = max(0, count - embeddings)
        return linear * 55 // 100 + (count - linear) * learner.weight_bytes + adapter
    return (learner.weight_bytes * count + adapter) // shards


def passing(learner: LearnerShape) -> int:
    """What a learner rank takes while it learns and gives back: the largest of

    - backward: the activations of one micro-batch, and with ZeRO the buffer that gradients are reduced in (b times
      5e8) and their float32 sum; with ZeRO-3 the weights that are whole at a time, too;
    - the end of a micro-batch: its gradients beside their sum so far, 4 T / R;
    - the optimizer's step: the gradient laid flat and AdamW's denominators, 8 T / R; none with offload;
    - an offloaded reference, while it is asked.
    """
    shards = learner.ranks if learner.zero_stage else 1
    b, trained = learner.weight_bytes, learner.num_trained
    backward = activations(learner)
    if learner.zero_stage:
        backward += b * REDUCE_NUMBERS + 4 * min(REDUCE_NUMBERS, trained)
    if learner.zero_stage == 3:
        backward += b * min(GATHERED_NUMBERS, learner.policy.num_parameters)
    step = 0 if learner.is_optimizer_offloaded else 8 * trained // shards
    asked = 0
    if learner.reference is not None and learner.is_reference_offloaded:
        asked = b * learner.reference.num_parameters
    return max(backward, step, asked)


def activations(learner: LearnerShape) -> int:
    """Of one micro-batch of N tokens in rows of L, hidden size H, feed-forward size F, attention size A, vocabulary V.

    - kept for the backward pass, for each token and layer: b (12 H + 4 A + 4 F) (norms in float32, projections in and
      out, rotated queries and keys, both sides of the gate), or b H where layers are computed again, plus one layer's;
    - the mask of attention: 6 L for each token;
    - chunked logits: 3 chunks of 512 tokens of V numbers in float32, and the head's gradient in float32, 4 V H, where
      the head is trained.
    """
    model, b = learner.policy, learner.weight_bytes
    num_tokens = learner.num_rows * learner.row_tokens
    of_layer = b * (12 * model.hidden_size + 4 * model.attention_size + 4 * model.ffn_size)
    kept = of_layer * model.num_layers
    if learner.recomputes_activations:
        kept = b * model.hidden_size * model.num_layers + of_layer
    head = 4 * model.vocab_size * model.hidden_size if learner.is_whole else 0
    return num_tokens * (kept + 6 * learner.row_tokens) + 3 * LOGITS_CHUNK * 4 * model.vocab_size + head


def adapter_parameters(model: ModelSize, rank: int) -> int:
    """Of an adapter on every linear layer: rank times inputs and outputs of each."""
    queries, keys = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    attention = 2 * (model.hidden_size + queries) + 2 * (model.hidden_size + keys)
    return model.num_layers * rank * (attention + 3 * (model.hidden_size + model.ffn_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorShape:
    """One actor. A batch has ``num_sequences`` of ``sequence_tokens`` tokens, prompt and response together, the model
    is cut up over ``num_gpus``, and ``beside_bytes`` is what lies beside vLLM in its process: reward models, a
    reference that mixes in."""

    model: ModelSize
    weight_bytes: int
    num_sequences: int
    sequence_tokens: int
    num_gpus: int = 1
    beside_bytes: int = 0
    sleeps: bool = False


def sampler(actor: ActorShape) -> Parts:
    """What vLLM wants of each of its N GPUs.

    - weights: b P / N;
    - cache: keys and values, b ``cached_size`` / N a token (by the heads that they have where these are fewer), of the
      batch as far as it runs at once, a gigabyte at least;
    - work: one step of 8,192 tokens or a whole sequence, b (8 H + 4 F / N) each, the logits of 256 sequences four
      times in float32, and its graphs.
    """
    model, b = actor.model, actor.weight_bytes
    step_tokens = max(STEP_TOKENS, actor.sequence_tokens)
    work = step_tokens * b * (8 * model.hidden_size + 4 * model.ffn_size // actor.num_gpus)
    logits = 4 * 4 * MAX_SEQUENCES * model.vocab_size
    of_token = b * model.cached_size // min(actor.num_gpus, model.num_kv_heads)
    tokens = min(MAX_SEQUENCES, actor.num_sequences) * (actor.sequence_tokens + BLOCK_TOKENS)
    return {
        "weights": b * model.num_parameters // actor.num_gpus,
        "cache": max(SMALLEST_CACHE_BYTES, of_token * tokens),
        "work": work + logits + GRAPH_BYTES,
    }


def reward_model(model: ModelSize, weight_bytes: int, batch_tokens: int) -> int:
    """A reward model within an actor: weights, and a forward pass of ``batch_tokens``."""
    return weight_bytes * (model.num_parameters + batch_tokens * (8 * model.hidden_size + 4 * model.ffn_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How a GPU of ``total`` bytes (None: of any size) is divided: ``engine`` for vLLM in each of ``num_actors`` and
    ``beside`` it in the same process, the ``learner`` at all times, ``passing`` while it learns. ``kept`` is what
    an engine that sleeps keeps, None where it does not sleep."""

    total: int | None
    num_actors: int = 0
    engine: Mapping[str, int]
    beside: int = 0
    learner: Mapping[str, int]
    passing: int = 0
    kept: int | None = None

    @property
    def engine_bytes(self) -> int:
        """Of one engine."""
        return sum(self.engine.values())

    @property
    def most(self) -> int:
        """What is taken at most, at whichever moment that is."""
        actor = self.engine_bytes + self.beside
        static = sum(self.learner.values())
        if self.kept is None:
            return self.num_actors * actor + static + self.passing
        return static + max(self.num_actors * actor, self.num_actors * (self.kept + self.beside) + self.passing)

    @property
    def free(self) -> int:
        """Negative where it does not fit."""
        return 0 if self.total is None else self.total - self.most


def divide(total: int | None, actor: ActorShape | None, num_actors: int, learner: LearnerShape | None) -> Division:
    """Give vLLM what its batch wants as far as there is room beside the learner, and where there is no learner, 90% of
    the GPU less what lies beside it.

    In a division that does not fit, the cache is the smallest that there can be.
    """
    static = resident(learner) if learner is not None else {}
    passes = passing(learner) if learner is not None else 0
    if actor is None:
        return Division(total=total, engine={}, learner=static, passing=passes)
    wanted = sampler(actor)
    beside = actor.beside_bytes + CONTEXT_BYTES
    kept = GRAPH_BYTES if actor.sleeps else None
    of_actors = num_actors * (beside + wanted["weights"] + wanted["work"])
    if total is not None:
        taken = sum(static.values()) + (passes if kept is None else 0) + of_actors
        room = ((int(WHOLE_GPU * total) if learner is None else total) - taken) // num_actors
        wanted["cache"] = max(SMALLEST_CACHE_BYTES, room if learner is None else min(wanted["cache"], room))
    return Division(
        total=total, num_actors=num_actors, engine=wanted, beside=beside, learner=static, passing=passes, kept=kept
    )
