"""Seeds by hashing, so that none depends on what was drawn before it."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int) -> int:
    """A seed of 63 bits that depends on ``parts`` and their order alone."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
