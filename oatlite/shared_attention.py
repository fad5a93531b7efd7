"""Attention over rows that begin with a prompt and go on with responses that do not see each other.

Up to where the shortest prompt of a batch ends, every row is plainly causal, which needs no mask and half the work;
only what comes after needs one. So the mask that is handed over is that of the last positions alone: (R, 1, S, L) for
rows of L tokens whose first L - S are causal. A mask of another shape is applied as usual. On GPUs, PyTorch takes
FlashAttention for the causal part by itself.

Instead there may be a mask by blocks (:func:`block_mask`) for FlexAttention, which is compiled for a GPU and leaves
out the blocks that nobody sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "oatlite_shared"


def install(model: Any) -> bool:
    """Let the attention of a Hugging Face model take such masks; False where it cannot be replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation not in ("sdpa", NAME):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def block_mask(part_ids: torch.Tensor) -> BlockMask:
    """Who sees whom, for rows cut into parts (R, L): 0 the prompt, 1 and 2 responses, -1 padding. (R, 1, L, L)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        key_part = part_ids[row, key]
        return ((key_part == part_ids[row, query]) | (key_part == 0)) & (key <= query)

    num_rows, length = part_ids.shape
    return create_block_mask(is_visible, num_rows, None, length, length, device=part_ids.device.type)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention for queries (R, H, L, D); gives (R, L, H, D), as transformers wants it."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    num_causal = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if num_causal == 0:
        result: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **options
        )[0]
        return result, None
    first = (tensor[:, :, :num_causal] for tensor in (query, key, value))
    causal, _ = sdpa_attention_forward(module, *first, None, is_causal=True, **options)
    rest, _ = sdpa_attention_forward(
        module, query[:, :, num_causal:], key, value, attention_mask, is_causal=False, **options
    )
    return torch.cat([causal, rest], dim=1), None
