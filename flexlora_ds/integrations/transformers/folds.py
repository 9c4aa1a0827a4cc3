"""Which part of a step's records each row of a layer's input belongs to, for estimates on fresh records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexlora_ds.gradient.growth import FOLDS


def folds_of_rows(inputs: Mapping[str, Any], place: int, device: Any) -> Tensor | None:
    """By row of `input_ids`, flat, int64: its record's number modulo the parts; None where the inputs do not tell.

    Records that follow each other in one row are told apart by positions that begin again at 0.

    Args:
        place: the number of this micro-batch in its global batch.
    """
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        return None
    count, length = ids.shape
    if count == 1 and torch.is_tensor(positions) and positions.shape == ids.shape:
        records = (positions[0] == 0).cumsum(0) - 1 + place
    else:
        records = torch.arange(count, device=ids.device).repeat_interleave(length) + place * count
    return (records % FOLDS).to(device)
