"""Attention over examples that lie end to end: each attends to itself alone, without a mask as wide as the batch.

transformers' flash attention takes the boundaries as they are; its `sdpa` would compute the whole square of the batch
under a block-diagonal mask, which for 16 examples is 16 times the work. Here `sdpa` runs example by example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PACKED_SDPA = "packed_sdpa"
"""The name under which transformers finds `packed_sdpa`, once registered."""


def register_packed_sdpa() -> str:
    """Make `attn_implementation="packed_sdpa"` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, _mask)
    return PACKED_SDPA


def packed_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every segment [1, heads, Σ lengths, size] -> [1, Σ lengths, heads, size].

    Without `segment_lengths` (a padded batch) it is transformers' `sdpa`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segment_lengths is None:
        mask = _band(query, sliding_window) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **others)  # type: ignore[no-any-return]
    parts = zip(*(torch.split(t, list(segment_lengths), dim=2) for t in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, _band(q, sliding_window), **others)[0] for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sliding window; None, which means causal, where it covers the segment."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=query.device)
    distance = at[:, None] - at[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _mask(*args: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """sdpa's mask of a padded batch; none where nothing is padded."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **others)  # type: ignore[no-any-return]
