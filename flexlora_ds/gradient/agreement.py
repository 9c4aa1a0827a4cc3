"""Tensors by name that all processes share: their sum, or those of process 0. One message each, none in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def summed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes; collective."""
    if _alone():
        return dict(values)
    return _in_one_message(values, dist.all_reduce)


def of_first_process(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of process 0; collective. Another processor's linear algebra may flip a sign."""
    if _alone():
        return dict(values)
    return _in_one_message(values, lambda flat: dist.broadcast(flat, 0))


def _in_one_message(values: Mapping[str, Tensor], send: Callable[[Tensor], object]) -> dict[str, Tensor]:
    if not values:
        return {}
    flat = torch.cat([value.reshape(-1) for value in values.values()])
    send(flat)
    parts = torch.split(flat, [value.numel() for value in values.values()])
    return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}


def is_usable(product: Tensor) -> bool:
    """Whether a product with a gradient says anything: finite, and not zero."""
    return bool(torch.isfinite(product).all()) and bool(product.any())
