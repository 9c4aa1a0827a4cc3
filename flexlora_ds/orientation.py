"""Which way round a layer stores its weight: decided by the layer's type, for a square matrix shows nothing."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is [in, out], as transformers' Conv1D (GPT-2) stores it, and not [out, in]."""
    conv1d = conv1d_type()
    return conv1d is not None and isinstance(layer, conv1d)


def conv1d_type() -> type[Any] | None:
    """transformers' Conv1D; None where transformers is not imported, for then no model has one."""
    module = sys.modules.get("transformers.pytorch_utils")
    found: type[Any] | None = getattr(module, "Conv1D", None)
    return found
