"""Variable-length attention on a CPU, in operations that a compiler sees through; a GPU has torch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from launch.model.packed_attention import Varlen, register_packed_varlen


def register() -> str:
    """Make it what packed examples get; returns the name for transformers."""
    return register_packed_varlen(Varlen(masked))


def masked(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Causal attention within segments, [tokens, heads, size], by the whole square of scores under a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    at = torch.arange(query.shape[0], device=query.device)
    segment = (cu_q[None, :] <= at[:, None]).sum(1)
    seen = (segment[:, None] == segment[None, :]) & (at[:, None] >= at[None, :])
    q, k, v = (t.float().transpose(0, 1) for t in (query, key, value))
    scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
