"""Merging an adapter into weights that no other layer uses.

A weight that two layers share (a tied output head) would carry one layer's update into the other. Such a layer gets a
copy of its own first.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.orientation import is_transposed
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: LoraAdapter) -> None:
    """Add every ΔW to a plain model's weights, in fp32, rounded once; a tied head is untied, in its configuration too.

    Raises:
        UserError: the model has no such layer, or one of another shape; or two of its layers share a weight in a way
            that a saved model cannot be without.
    """
    weights = {name: adapted_weight(model, name, matrix) for name, matrix in adapter.matrices.items()}
    _require_separable(model, untie(model, [_place(model, name) for name in weights]))
    for name, matrix in adapter.matrices.items():
        layer = model.get_submodule(name)
        weight, delta = layer.get_parameter("weight"), matrix.delta()
        weight.copy_(weight.float() + (delta.t() if is_transposed(layer) else delta))
        require_within(name, weight)


def require_within(name: str, merged: Tensor) -> None:
    """Raise RunError where a weight with its update is beyond what its dtype holds."""
    if not bool(torch.isfinite(merged).all()):
        kind = str(merged.dtype).removeprefix("torch.")
        raise RunError(
            f"{name} with its update is not finite in {kind}", mend="give a wider --dtype, such as bf16"
        )


def untie(model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> list[nn.Module]:
    """Give the layers at `places` (a parent and its attribute) parameters that nothing else in the model uses.

    Returns:
        The layers that shared something before, as they were.
    """
    reached = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    used = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shared = []
    for parent, attribute in places:
        layer = parent.get_submodule(attribute)
        if reached[id(layer)] > 1:
            shared.append(layer)
            setattr(parent, attribute, copy.deepcopy(layer))
        elif any(used[id(p)] > 1 for p in layer.parameters(recurse=False)):
            shared.append(layer)
            for name, p in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    return shared


def _require_separable(model: Any, untied: list[nn.Module]) -> None:
    """Say in the configuration that head and embeddings are two; nothing else that is shared can be saved apart."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer in untied:
        if not any(layer is end for end in ends):
            raise UserError(
                f"the adapter changes a {type(layer).__name__} whose weight another layer shares, and a saved "
                f"{type(model).__name__} cannot hold them apart",
                mend="export it with --to peft",
            )
    if untied:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def adapted_weight(model: nn.Module, name: str, matrix: LoraMatrix) -> Tensor:
    """The layer's weight, [out, in] or, where the layer stores it so, [in, out]."""
    try:
        layer = model.get_submodule(name)
        weight: Tensor = layer.get_parameter("weight")
    except AttributeError:
        raise UserError(
            f"the base model has no {name}, which the adapter adapts", mend="name its base with --base"
        ) from None
    shape = (matrix.B.shape[0], matrix.A.shape[1])
    found = tuple(reversed(weight.shape)) if is_transposed(layer) else tuple(weight.shape)
    if found != shape:
        raise UserError(
            f"{name} is {shape} in the adapter, {found} in the base model", mend="name its base with --base"
        )
    return weight
