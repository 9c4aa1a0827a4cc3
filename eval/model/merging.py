"""An adapter merged into the model that it was attached to, for faster steps; the logits must stay what they were."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.exports.merging import untie
from flexlora_ds.exports.probe import logits_apart, most_apart, probe_logits


def merge_adapter(model: Any) -> Any:
    """The base of a PEFT model with its adapter merged; a layer whose weight others share gets its own first.

    Raises:
        UserError: the adapter is of a kind that cannot be merged.
        RunError: the merged model's logits are not those of the unmerged one.
    """
    if not hasattr(model, "merge_and_unload"):
        raise UserError("this kind of adapter cannot be merged", "--merge", "leave --merge out")
    expected = probe_logits(model)
    if not bool(torch.isfinite(expected).all()):
        raise RunError("the model with its adapter gives logits that are not finite", "--merge")
    untie(model, _adapted(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise UserError(
                f"the adapter cannot be merged: {error}", "--merge", "leave --merge out"
            ) from error
    dtype = next(merged.parameters()).dtype
    apart = logits_apart(probe_logits(merged), expected, dtype)
    if not apart <= most_apart(dtype):
        raise RunError(
            f"merged, the model's logits are {apart:.2g} of their norm apart from those of the unmerged adapter "
            f"(limit {most_apart(dtype):.2g})",
            "--merge",
            "leave --merge out",
        )
    return merged


def _adapted(model: Any) -> list[tuple[Any, str]]:
    """Where PEFT keeps the layers that it adapts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [(layer, "base_layer") for layer in layers if "base_layer" in layer._modules]
