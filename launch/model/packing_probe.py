"""Whether a model keeps packed examples apart, tried on the model itself before its first step.

Its class says whether it takes boundaries. Some take them and do not use them, with one kind of attention or with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.exports.probe import logits_apart, most_apart
from launch.data.batches import MicroBatch
from launch.model.token_loss import who_sees_whom

LENGTHS = (5, 20)
"""The second is longer than the first, so that most tokens are wrong where it sees the first."""


def require_kept_apart(
    model: Any, device: torch.device, dtype: torch.dtype, vocabulary: int, attention: str, place: str
) -> None:
    """Compare the logits of two examples in one row with those of each alone; at ZeRO-3 collective.

    Args:
        model: what is trained, however wrapped.
        vocabulary: the number of token ids.
        attention: the kernels' name, and `place` where packing was asked for, for messages.

    Raises:
        UserError: they differ by more than rounding.
    """
    apart = _logits_apart(model, device, dtype, vocabulary)
    if apart <= most_apart(dtype):
        return
    remedy = "leave padding_free at auto"
    if attention == "eager":
        remedy += ", or choose attention sdpa"
    raise UserError(
        f"the model does not keep packed examples apart under attention {attention}: their logits are {apart:.2g} of "
        "their norm from those of each example alone",
        place,
        remedy,
    )


def _logits_apart(model: Any, device: torch.device, dtype: torch.dtype, vocabulary: int) -> float:
    rng = torch.Generator().manual_seed(0)
    examples = [torch.randint(0, vocabulary, (1, length), generator=rng) for length in LENGTHS]
    trains = model.training
    model.eval()
    with torch.no_grad():
        together = _logits(model, _batch(examples, packed=True), device)
        alone = [_logits(model, _batch([example], packed=False), device) for example in examples]
    model.train(trains)
    return logits_apart(together, torch.cat(alone, dim=1), dtype)


def _logits(model: Any, batch: MicroBatch, device: torch.device) -> Tensor:
    inputs = {"input_ids": batch.input_ids.to(device), "use_cache": False, **who_sees_whom(batch, device)}
    logits: Tensor = model(**inputs).logits
    return logits.float().cpu()


def _batch(examples: Sequence[Tensor], *, packed: bool) -> MicroBatch:
    """Examples [1, length] in one row [1, Σ lengths]."""
    ids = torch.cat(list(examples), dim=1)
    lengths = tuple(example.shape[1] for example in examples)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        row_keys=torch.zeros_like(ids),
        record_ids=tuple(range(len(lengths))),
        tokens=ids.numel(),
        target_tokens=0,
        segment_lengths=lengths if packed else None,
    )
