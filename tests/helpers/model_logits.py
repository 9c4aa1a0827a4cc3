"""Logits of a tiny model on fixed tokens, and how far two sets of them are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IDS = torch.randint(0, 420, (3, 20), generator=torch.Generator().manual_seed(3))
"""Tokens that every vocabulary of `tests.helpers.zoo` has, [3, 20]."""


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """In evaluation mode, [rows, positions, vocabulary] of `ids` [rows, positions]."""
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
