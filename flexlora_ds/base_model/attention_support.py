"""Which attention kernels a model's class can compute with, under transformers' names."""

from __future__ import annotations

from typing import Any


def supported_attention(model: Any) -> frozenset[str]:
    """`eager`, which every model has, `sdpa` and `flash_attention_2` where all of a model's parts have it.

    Not flash attention where transformers would fetch a kernel from the hub in its place: that is code of others.

    Args:
        model: from transformers; its values may be on the meta device.
    """
    parts = [part for part in model.modules() if hasattr(part, "_supports_sdpa")]
    found = {"eager"}
    if all(part._supports_sdpa for part in parts):
        found.add("sdpa")
    if all(part._supports_flash_attn and _takes_flash_2(part) for part in parts):
        found.add("flash_attention_2")
    return frozenset(found)


def _takes_flash_2(part: Any) -> bool:
    listed = getattr(part, "_compatible_flash_implementations", None)
    return listed is None or "flash_attention_2" in listed
