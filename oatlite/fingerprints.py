"""What tells, when a run resumes, that its models, its tokenizer and its data are those that it had."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config
from oatlite.model_checks import WEIGHTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from oatlite.preferences import PreferenceSet

PART_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20


def fingerprints_of(config: Config, policy: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    weights = {name: _weights(name) for name in {str(config.model.path), str(config.model.reference)}}
    return {
        "model": digest(_architecture(policy)),
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "initial policy": digest(weights[str(config.model.path)]),
        "reference": digest(weights[str(config.model.reference)]),
        "reward model": digest([_weights(name) for name in config.oracle.path if kind_of(name) == "model"]),
    }


def _architecture(model: PretrainedConfig) -> dict[str, object]:
    """What decides the shape of a model, without what depends on where it lies and on the library's version."""
    passing = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
    return {key: value for key, value in model.to_dict().items() if key not in passing}


def _weights(path: str) -> str:
    """What tells a model's weights in a folder from others of the same shape; of a hub's model, its name."""
    return digest_of_weights(path) or path


def digest_of_weights(folder: str) -> str | None:
    """Of all that the files of weights in ``folder`` hold, which all cores read at once; None where there are none.

    Two models that were merged from adapters of one base differ in few places, and need not at the ends of a file.
    """
    files = sorted(path for pattern in WEIGHTS for path in Path(folder).glob(pattern))
    parts = [(path, start) for path in files for start in range(0, path.stat().st_size, PART_BYTES)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        digests = list(threads.map(_digest_of_part, *zip(*parts, strict=True))) if parts else []
    named = [(path.name, start, found) for (path, start), found in zip(parts, digests, strict=True)]
    return digest(named) if files else None


def _digest_of_part(path: Path, start: int) -> str:
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(PART_BYTES // BLOCK_BYTES):
            found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def digest_of_pairs(pairs: PreferenceSet) -> str:
    """Of all that is trained on: tokens, and margins where there are any."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens):
        for tokens in part:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    if pairs.margins is not None:
        digest.update(pairs.margins.tobytes())
    return digest.hexdigest()
