"""Which way round a layer stores its weight: decided by the layer's type, for a square matrix shows nothing."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

LayerShape = tuple[int, int]
"""(out, in) of a linear map."""


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + b: torch's linear layer, or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def layer_shape(layer: Any) -> LayerShape:
    """(out, in) of such a layer, also while ZeRO-3 holds its weight partitioned."""
    if is_transposed(layer):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is [in, out], as transformers' Conv1D (GPT-2) stores it, and not [out, in]."""
    conv1d = conv1d_type()
    return conv1d is not None and isinstance(layer, conv1d)


def conv1d_type() -> type[Any] | None:
    """transformers' Conv1D; None where transformers is not imported, for then no model has one."""
    module = sys.modules.get("transformers.pytorch_utils")
    found: type[Any] | None = getattr(module, "Conv1D", None)
    return found
