"""One rank for all matrices of an adapter, by zeros: what servers need that know one rank only."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from flexlora_ds.peft_format import LoraAdapter, LoraMatrix

SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for `max_lora_rank`."""


def padded(adapter: LoraAdapter) -> LoraAdapter:
    """The same ΔW with all matrices at the largest rank, and a scale of 1."""
    pad = nn.functional.pad
    rank = max(matrix.rank for matrix in adapter.matrices.values())
    matrices = {
        name: LoraMatrix(
            pad(m.scale * m.B.float(), (0, rank - m.rank)), pad(m.A.float(), (0, 0, 0, rank - m.rank)), 1.0
        )
        for name, m in adapter.matrices.items()
    }
    return replace(adapter, matrices=matrices, default_rank=rank, default_alpha=float(rank))


def server_rank(rank: int) -> int | None:
    """The smallest rank a server can be set to allow that holds `rank`; None above the largest."""
    return next((allowed for allowed in SERVER_RANKS if allowed >= rank), None)
