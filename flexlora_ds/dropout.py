"""Dropout whose mask is a pure function of (row key, matrix, feature).

A row key names one token of the run: (seed, step, record, position in the record). The mask of a token is then the
same whatever the micro-batch, the padding, the process or the device it is computed on, which is what makes a run's
losses independent of how its batch is cut, and a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Odd 32-bit multipliers of a published integer finaliser (C. Wellons, "hash-prospector": lowbias32).
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def name_key(name: str) -> int:
    """A signed 64-bit key of a matrix's name, the same in every process and Python run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _fold(h: Tensor) -> Tensor:
    """h ⊕ (h ≫ 16) of int32 values; linear in ⊕. torch shifts arithmetically: the mask makes the shift logical."""
    return h ^ ((h >> 16) & 0xFFFF)


def _scramble(h: Tensor) -> Tensor:
    """What follows the fold in a mixing of int32 values that changes half the bits for each bit changed; in place.

    The middle shift stays arithmetic: it makes one value of two, which no statistic of a mask shows, in a pass less.
    """
    h = h.mul_(_MULTIPLIER_1)
    h = h.bitwise_xor_(h >> 15).mul_(_MULTIPLIER_2)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def keep_mask(
    row_keys: Tensor, matrix_key: int, features: int, p: float, dtype: torch.dtype = torch.bool
) -> Tensor:
    """Mask [rows, features] in `dtype`: true or 1 where a feature is kept, which happens with probability 1 − p.

    `row_keys` is int64 [rows]. One 32-bit hash serves four neighbouring features, 8 bits each. A row's limit for them
    is one of the two neighbours of 256 p, drawn so that p holds to 1/65536. Multiply by a mask of the values' own
    dtype: on a CPU a boolean one is several times slower.
    """
    rows = (row_keys ^ matrix_key) * _GOLDEN
    seeds = _fold((rows >> 32).to(torch.int32)).unsqueeze(1)
    columns = torch.arange(1, (features + 3) // 4 + 1, device=row_keys.device, dtype=torch.int32)
    bits = _scramble(seeds ^ _fold(_scramble(_fold(columns)))).view(torch.int8)[:, :features]
    # In place: torch vectorises a comparison on a CPU only where its result has its operands' dtype.
    return _compare(bits, (rows >> 16) & 0xFFFF, p).to(dtype)


def _compare(bits: Tensor, draws: Tensor, p: float) -> Tensor:
    """1 where a byte counted from −128 is at least its row's limit, in place; `draws` [rows] of 65,536 choose it."""
    whole, part = divmod(round(p * 65536), 256)
    limits = whole - 128 + (draws < part * 256).to(torch.int16)
    if p < 0.5:
        return bits.ge_(limits.to(torch.int8).unsqueeze(1))
    return bits.gt_((limits - 1).to(torch.int8).unsqueeze(1))  # a limit of 128 is no int8
