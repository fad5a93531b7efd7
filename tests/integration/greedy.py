"""What Hugging Face decides, as far as rounding does not."""

from __future__ import annotations

import numpy as np
import torch

DECIDED = 1e-4  # nearer logits than that may be decided by rounding


def decided_tokens(model: torch.nn.Module, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
    """Hugging Face's greedy tokens up to the first that rounding could decide, or EOS."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < max_new_tokens and 0 not in tokens:
            best = model(input_ids=ids).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < DECIDED:
                break
            tokens.append(int(best.indices[0]))
            ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return tokens
