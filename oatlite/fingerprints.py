"""What tells, when a run resumes, that its models, its tokenizer and its data are those that it had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from oatlite.preferences import PreferenceSet

SAMPLE_BYTES = 1 << 20


def fingerprints_of(config: Config, policy: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {
        "model": digest(_architecture(policy)),
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "initial policy": digest(_weights(str(config.model.path))),
        "reference": digest(_weights(str(config.model.reference))),
        "reward model": digest([_weights(name) for name in config.oracle.path if kind_of(name) == "model"]),
    }


def _architecture(model: PretrainedConfig) -> dict[str, object]:
    """What decides the shape of a model, without what depends on where it lies and on the library's version."""
    passing = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
    return {key: value for key, value in model.to_dict().items() if key not in passing}


def _weights(path: str) -> object:
    """What tells a model's weights in a folder from others of the same shape, without reading all of them: sizes, and
    both ends of each file. Of a hub's model, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    found = []
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        with file.open("rb") as opened:
            first = opened.read(SAMPLE_BYTES)
            opened.seek(max(0, file.stat().st_size - SAMPLE_BYTES))
            ends = first + opened.read(SAMPLE_BYTES)
        found.append((file.name, file.stat().st_size, hashlib.blake2b(ends, digest_size=16).hexdigest()))
    return found


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def digest_of_pairs(pairs: PreferenceSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens):
        for tokens in part:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()
