"""The least time that each stage of a step can take: its operations by the rate of a matrix product, or its bytes by
that of a copy, whichever takes longer.

``parameters`` are those of the layers, without embedding and output head.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_rows.scale import Scale

FORWARD, WITH_BACKWARD = 1, 3
WEIGHT_BYTES = 2
OPTIMIZER_BYTES = 4 + 3 * 8 + 2
"""Of a parameter, an AdamW step reads its gradient, reads and writes weight and both moments in float32, and writes the
weight in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much there is to do for a step of a network of ``shape``."""

    shape: dict[str, int]
    num_prompts: int
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, scale: Scale, num_prompts: int, prompt_tokens: int) -> Work:
        return cls(shape=scale.shape, num_prompts=num_prompts, prompt_tokens=prompt_tokens, new_tokens=scale.new_tokens)

    @property
    def layer_parameters(self) -> int:
        hidden, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        return self.shape["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * inner)

    @property
    def head_parameters(self) -> int:
        return self.shape["hidden_size"] * self.shape["vocab_size"]

    @property
    def parameters(self) -> int:
        return self.layer_parameters + 2 * self.head_parameters

    def row_tokens(self, *, is_shared: bool) -> int:
        copies = 1 if is_shared else 2
        return self.num_prompts * (copies * self.prompt_tokens + 2 * self.new_tokens)

    def operations(self, passes: int, *, is_shared: bool, with_head: bool) -> float:
        """Of both responses of each prompt, a pass forward counting 1 and the one backward 2."""
        attended = self.prompt_tokens**2 / 2 * (1 if is_shared else 2)
        attended += 2 * self.new_tokens * (self.prompt_tokens + self.new_tokens / 2)
        attention = 4 * self.shape["num_hidden_layers"] * self.shape["hidden_size"] * attended * self.num_prompts
        layers = 2 * self.layer_parameters * self.row_tokens(is_shared=is_shared)
        head = 2 * self.head_parameters * self.num_prompts * 2 * self.new_tokens if with_head else 0
        return passes * (layers + attention + head)

    def decode_bytes(self) -> float:
        """All weights once for each new token, and the keys and values of each response so far."""
        weights = WEIGHT_BYTES * (self.layer_parameters + self.head_parameters)
        per_token = 2 * WEIGHT_BYTES * self.shape["num_hidden_layers"] * self.shape["hidden_size"]
        cache = 2 * self.num_prompts * per_token * (self.prompt_tokens + self.new_tokens / 2)
        return self.new_tokens * (weights + cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Seconds of each stage, at best."""

    generate_s: float
    score_s: float
    learn_s: float
    sync_s: float

    @property
    def step_s(self) -> float:
        return self.generate_s + self.score_s + self.learn_s + self.sync_s


def roofline(work: Work, scale: Scale, *, is_shared: bool) -> Roofline | None:
    """None where the machine's own rates were not measured. In any case each prompt is filled in once for both of its
    responses, since an engine's cache of prefixes does that."""
    operations, moved = scale.operations_per_s, scale.bytes_per_s
    if operations is None or moved is None:
        return None
    fill_in = 2 * work.layer_parameters * work.num_prompts * work.prompt_tokens / operations
    learn = work.operations(WITH_BACKWARD, is_shared=is_shared, with_head=True) / operations
    return Roofline(
        generate_s=fill_in + work.decode_bytes() / moved,
        score_s=work.operations(FORWARD, is_shared=is_shared, with_head=False) / operations,
        learn_s=learn + OPTIMIZER_BYTES * work.parameters / moved,
        sync_s=2 * WEIGHT_BYTES * work.parameters / moved,
    )
