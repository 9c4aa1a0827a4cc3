"""One seeded 64-bit hash: the source of every reproducible choice about the data (order, split, dropout
keys).

A hash of *what is chosen* (seed, purpose, epoch, record) instead of a generator's stream has no state to
save, does not depend on who draws first or on a library's version, and gives every process the same answer at
any world size.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt64s: TypeAlias = npt.NDArray[np.uint64]
Word: TypeAlias = "int | str | npt.NDArray[np.int64] | npt.NDArray[np.uint64]"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash64(*words: Word) -> UInt64s:
    """Hash words to uint64, element by element over the broadcast shape of the array words.

    The state absorbs one word after the other through the output function of splitmix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): `h ← mix(h + 0x9E37…7C15 + word)`,
    all modulo 2⁶⁴. Integers count modulo 2⁶⁴; a string counts as the first eight bytes of its SHA-256.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = _mix(np.asarray(state + _GOLDEN + _as_uint64(word)))
    return np.asarray(state)


def seeded_order(count: int, *words: Word) -> npt.NDArray[np.int64]:
    """Return a permutation of 0 … count − 1 that depends on nothing but the words: indices by hash."""
    keys = hash64(*words, np.arange(count, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _as_uint64(word: Word) -> UInt64s:
    if isinstance(word, str):
        word = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    if isinstance(word, int):
        return np.asarray(word % 2**64, dtype=np.uint64)
    return word.astype(np.uint64)


def _mix(state: UInt64s) -> UInt64s:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return np.asarray(state ^ (state >> np.uint64(31)))
