"""A model that reads each layer's weights from its files when the layer computes, and drops them after it.

For a few logits of a model of any size. A weight that is read in another way than by its own layer's forward pass is
NaN, and so are the logits then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.base_model.blueprint import StoredModel, build
from flexlora_ds.base_model.source import ModelSource, one_line_errors
from flexlora_ds.base_model.stored_names import Places, tie
from flexlora_ds.files.tensor_stream import TensorReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Place = tuple[Path, str]
"""The file and the name in it."""


def streamed_model(source: ModelSource, stored: StoredModel, places: Places, dtype: torch.dtype) -> Any:
    """The model in evaluation mode, of whose weights none is in memory.

    Args:
        places: of `stored`, which is one to one.
        dtype: of the weights when they are read.
    """
    with one_line_errors(source, "model"):
        model = _without_weights(stored.config, dtype, places)
    files = {name: (path, name) for path, shapes in stored.shards.items() for name in shapes}
    tensors = model.state_dict(keep_vars=True)
    found = {id(tensors[place]): files[name] for name, place in places.names.items()}
    for module in list(model.modules()):
        for name, buffer in module._buffers.items():
            if id(buffer) in found:
                module._buffers[name] = _read(found[id(buffer)], dtype)
        _stream(module, {n: found[id(p)] for n, p in module._parameters.items() if p is not None}, dtype)
    return model.eval()


def _without_weights(config: Any, dtype: torch.dtype, places: Places) -> PreTrainedModel:
    """Parameters on the meta device, and buffers with their values (rotary frequencies)."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights():
        model = build(config, dtype, None)
    return tie(model, places.untied)


def _stream(module: nn.Module, places: Mapping[str, _Place], dtype: torch.dtype) -> None:
    if not places:
        return
    # On the CPU, for PEFT puts its own parameters beside a layer's weight; one element each.
    nothing = torch.full((), float("nan"), dtype=dtype)
    empty = {
        name: nn.Parameter(nothing.expand(p.shape), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    }

    def load(module: nn.Module, inputs: Any) -> None:
        for name, place in places.items():
            module._parameters[name] = nn.Parameter(_read(place, dtype), requires_grad=False)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(empty)

    module._parameters.update(empty)
    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def _read(place: _Place, dtype: torch.dtype) -> Tensor:
    path, name = place
    with TensorReader(path) as file:
        values = file.whole(name)
    return values.to(dtype) if values.is_floating_point() else values
