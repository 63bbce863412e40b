"""Random words by key, the same on every machine and with every library version.

A run that is stopped, moved and resumed has to draw what it would have drawn, so nothing here depends on how a library
happens to turn random bits into numbers, or on what was drawn before.
"""

import hashlib

import numpy as np


def words(*key: int | str) -> list[int]:
    """Eight independent 64-bit words for a key such as (seed, "fim", epoch, document)."""
    digest = hashlib.blake2b("/".join(str(part) for part in key).encode("utf-8"), digest_size=64).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]


def fraction(word: int) -> float:
    """A word as a number in [0, 1)."""
    return (word >> 11) / 2**53


def many_words(count: int, *key: int | str) -> np.ndarray:
    """`count` words for one key, as uint64 (Philox's raw output, which numpy promises to keep)."""
    low, high = words(*key)[:2]
    return np.random.Philox(key=low | high << 64).random_raw(count)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A random order of range(count) for a key, as int64."""
    return np.argsort(many_words(count, *key), kind="stable")
