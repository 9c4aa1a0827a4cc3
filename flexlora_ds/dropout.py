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


def _mix(h: Tensor) -> Tensor:
    """A bijection of int32 values that changes half the bits for each bit changed; in place.

    torch shifts signed integers arithmetically: the mask makes the shift logical.
    """
    h = h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_MULTIPLIER_1)
    h = h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(_MULTIPLIER_2)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def keep_mask(
    row_keys: Tensor, matrix_key: int, features: int, p: float, dtype: torch.dtype = torch.bool
) -> Tensor:
    """Mask [rows, features] in `dtype`: true or 1 where a feature is kept, which happens with probability 1 − p.

    `row_keys` is int64 [rows]. One 32-bit hash serves two neighbouring features, 16 bits each, so p is resolved to
    1/65536. Multiply by a mask of the values' own dtype: on a CPU a boolean one is several times slower.
    """
    pairs = (features + 1) // 2
    rows = row_keys ^ matrix_key
    rows = rows * _GOLDEN
    rows = (rows >> 32).to(torch.int32)
    columns = _mix(torch.arange(1, pairs + 1, device=row_keys.device, dtype=torch.int32))
    bits = _mix(rows.unsqueeze(1) ^ columns.unsqueeze(0)).view(torch.int16)
    threshold = round(p * 65536) - 32768
    # In place: torch vectorises a comparison on a CPU only where its result has its operands' dtype.
    return bits[:, :features].ge_(threshold).to(dtype)
