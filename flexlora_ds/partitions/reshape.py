"""What a parameter remembers of its old shape."""

from __future__ import annotations

import torch
from torch import nn


def reset_gradient_accumulator(p: nn.Parameter) -> None:
    """Drop the autograd node that remembers the old shape; a graph that somebody still holds keeps it alive.

    `Variable.set_data` forgets it only where dtype or device changes, so the dtype changes for a moment.
    """
    data = p.data
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    p.data = torch.empty(0, dtype=other, device=data.device)
    p.data = data
