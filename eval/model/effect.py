"""Whether an adapter does anything: a few logits of the model, without it and with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlora_ds.exports.probe import probe_logits

PROBES = 8
"""Places of random texts whose logits are looked at."""


def probe(model: Any) -> Tensor:
    """The logits, fp32 [PROBES, vocabulary]; the model is in evaluation mode afterwards."""
    logits = probe_logits(model)
    return logits[:, -PROBES // len(logits) :].flatten(0, 1)


def effect_of(before: Tensor, after: Tensor) -> str:
    """What is to be said of an adapter by the probes without it and with it.

    An adapter of zeros adds zeros, and changes not a bit.
    """
    changed = PROBES
    if before.shape == after.shape:
        changed = int(torch.ne(before, after).any(-1).sum())
    if changed:
        return f"the adapter changes the answers: {changed} of {PROBES} probe logits differ"
    return (
        f"warning: the adapter changes no answer: 0 of {PROBES} probe logits differ; "
        "it was not trained, or holds zeros: expect the results of the base"
    )
