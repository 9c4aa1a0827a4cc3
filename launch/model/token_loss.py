"""The loss of a micro-batch as a sum over its target tokens; nothing is predicted where there is none."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data.batches import MicroBatch
from launch.data.examples import IGNORED
from launch.model.head_loss import HeadLoss, head_loss_of


@dataclass(frozen=True)
class Head:
    """How a model's output head is asked for the losses."""

    losses: HeadLoss | None = None
    """It computes them itself; None: it gives logits."""
    at_positions: bool = False
    """It gives logits at chosen positions only (`logits_to_keep`, transformers)."""


def head_of(model: Any) -> Head:
    """The cheapest way that a model offers, however wrapped."""
    if hasattr(model, "get_base_model"):  # PEFT hands what it does not know on to the model it wraps
        model = model.get_base_model()
    return Head(head_loss_of(model), "logits_to_keep" in inspect.signature(model.forward).parameters)


def token_loss(model: Any, batch: MicroBatch, device: torch.device, head: Head) -> Tensor:
    """Σ over the target tokens of −ln p(token), in fp32: a scalar that keeps its graph.

    A micro-batch without targets gives 0 with a graph, so that every process runs the same collectives.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device, non_blocking=True),
        "use_cache": False,
        **who_sees_whom(batch, device),
    }
    if head.losses is None:
        return _loss_of_logits(model, inputs, batch.labels, device, at_positions=head.at_positions)
    following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    rows = (following != IGNORED).nonzero().squeeze(1)
    targets = following[rows].to(device, non_blocking=True)
    with head.losses.expecting(rows.to(device, non_blocking=True), targets):
        losses: Tensor = model(**inputs).logits
    return losses.sum()


def _loss_of_logits(
    model: Any, inputs: dict[str, Any], labels: Tensor, device: torch.device, *, at_positions: bool
) -> Tensor:
    """By transformers' logits, of the columns of the batch in which there is a target."""
    wanted = (labels[:, 1:] != IGNORED).any(0)
    if not at_positions or not bool(wanted.any()):
        wanted = torch.ones_like(wanted)
    positions = wanted.nonzero().squeeze(1)
    targets = labels[:, positions + 1].to(device)
    if at_positions:
        logits = model(**inputs, logits_to_keep=positions.to(device)).logits
    else:
        logits = model(**inputs).logits[:, positions.to(device)]
    flat = logits.float().reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")


def who_sees_whom(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """The padding mask; or the boundaries of packed examples, in the forms that attentions take."""
    if batch.segment_lengths is None:
        return {"attention_mask": batch.attention_mask.to(device, non_blocking=True)}
    ends = F.pad(torch.tensor(batch.segment_lengths).cumsum(0), (1, 0)).to(
        device, torch.int32, non_blocking=True
    )
    longest = max(batch.segment_lengths)
    return {
        "position_ids": batch.position_ids.to(device, non_blocking=True),
        "segment_lengths": batch.segment_lengths,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
