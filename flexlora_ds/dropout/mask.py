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
    seeds, draws = _of_rows(row_keys, matrix_key)
    columns = torch.arange(1, (features + 3) // 4 + 1, device=row_keys.device, dtype=torch.int32)
    bits = _scramble(seeds.unsqueeze(1) ^ _fold(_scramble(_fold(columns)))).view(torch.int8)[:, :features]
    # In place: torch vectorises a comparison on a CPU only where its result has its operands' dtype.
    return _compare(bits, _limits(draws, *split_rate(p)), p).to(dtype)


def dropped(
    values: Tensor,
    row_keys: Tensor,
    matrix_key: Tensor,
    whole: int,
    part: int,
    columns: Tensor | None = None,
) -> Tensor:
    """`values` [rows, features] where `keep_mask` keeps them, else 0: the same bits, in operations of single elements.

    Compiled it is one kernel that writes no mask; every feature computes all of its hash anew. As it stands it is
    slower than `keep_mask`. The numbers that a run's layers differ in are tensors and integers that a compiler leaves
    open: `matrix_key` is int64 [1], and 256 p = `whole` + `part` / 256 (`split_rate`).

    `columns`: 0, 1, … as int32 [features], for compiled code whose number of features is left open. A range made
    inside it would be computed in the width of such a size, int64, where products do not wrap at 32 bits (Inductor's
    Triton code in torch 2.11: `tmp14 = x0`; other bits on an H200).
    """
    seeds, draws = _of_rows(row_keys, matrix_key)
    column = (
        torch.arange(values.shape[1], device=values.device, dtype=torch.int32) if columns is None else columns
    )
    hashes = _scramble(seeds.unsqueeze(1) ^ _fold(_scramble(_fold((column >> 2) + 1))))
    # Signed, the lowest first: as a view of the hashes as int8 has them.
    byte = (hashes << (24 - 8 * (column & 3))) >> 24
    return torch.where(byte >= _limits(draws, whole, part).unsqueeze(1), values, 0)


def split_rate(p: float) -> tuple[int, int]:
    """256 p as its whole part and, in 256ths, the rest."""
    parts = round(p * 65536)
    return parts // 256, parts % 256  # not divmod, which torch's compiler does not know


def _of_rows(row_keys: Tensor, matrix_key: int | Tensor) -> tuple[Tensor, Tensor]:
    """The seed of each row's hashes, int32, and its draw of 65,536."""
    rows = (row_keys ^ matrix_key) * _GOLDEN
    return _fold((rows >> 32).to(torch.int32)), (rows >> 16) & 0xFFFF


def _limits(draws: Tensor, whole: int, part: int) -> Tensor:
    """What a row's bytes, counted from −128, must reach to be kept; int16, for 128 is no int8."""
    return whole - 128 + (draws < part * 256).to(torch.int16)


def _compare(bits: Tensor, limits: Tensor, p: float) -> Tensor:
    """1 where a byte is at least its row's limit, in place."""
    if p < 0.5:  # a limit of 128 is no int8, nor is one below −128
        return bits.ge_(limits.to(torch.int8).unsqueeze(1))
    return bits.gt_((limits - 1).to(torch.int8).unsqueeze(1))
