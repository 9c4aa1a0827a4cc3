"""Statistics that a model gathers in training (batch normalisation): of the base, or of a module that is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flexlora_ds.errors import RunError


def keep_statistics(model: nn.Module, whole: Sequence[str]) -> None:
    """Let the base's statistics stay as they are, for an adapter is loaded upon the base as it was.

    Args:
        whole: full names of the modules that are trained whole; theirs are gathered as ever.
    """
    inside = tuple(f"{name}." for name in whole)
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and name not in whole and not name.startswith(inside):
            module.momentum = 0.0


def buffers_of(model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor]:
    """What is saved of these modules beside their parameters, by full name: copies on the CPU."""
    found = {}
    for name in whole:
        module = model.get_submodule(name)
        parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
        for key, value in module.state_dict().items():
            if key not in parameters and torch.is_tensor(value):
                found[f"{name}.{key}"] = value.detach().cpu().clone()
    return found


def write_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put back what `buffers_of` gave.

    Raises:
        RunError: the model has no such buffer.
    """
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise RunError(
                f"the checkpoint holds {name} of shape {list(value.shape)}, and the model has none",
                mend="use the model that it was written with",
            )
        buffers[name].copy_(value)
