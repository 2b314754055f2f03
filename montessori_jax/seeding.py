"""Randomness keyed by what it is for, never by the order of calls."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 31-bit seed for one purpose, the same whenever and wherever it is asked for."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
