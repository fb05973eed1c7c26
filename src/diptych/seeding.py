"""Keys derived from (seed, purpose, position): the only source of randomness; no global generator is touched."""

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit key, a pure function of its arguments and of nothing else (machine, process, Python's hash seed)."""
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose and position."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *purpose)))
