"""A LoRA that begins with A₀ and B₀ other than zero, on a base from which their product is taken out.

So the first output is the base's without dropout, up to the rounding of W − s B₀A₀ in the base's dtype. A checkpoint
keeps A₀ and B₀, which say what the base has become. The adapter that is saved belongs on the base as it was loaded:
ΔW = s (B A − B₀ A₀), a LoRA of twice the rank at the same scale, as PEFT converts such adapters itself
(`path_initial_model_for_weight_conversion`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.errors import UserError
from launch.engine.methods.peft_lora import PeftLoRA
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions


class ChangedBase(PeftLoRA):
    """What such methods share; each says how A₀ and B₀ are found (`begin`)."""

    def __init__(self, options: TrainOptions) -> None:
        super().__init__(options)
        self._initial: dict[str, Tensor] = {}

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """A₀ and B₀ by the names of the parameters: they say what the base has become."""
        return self._initial

    @abstractmethod
    def begin(self, model: nn.Module, beginning: Beginning) -> nn.Module:
        """The model wrapped, with A₀ and B₀ in its layers and their product taken out of its base; collective."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Begin, or as the checkpoint's run began.

        Raises:
            UserError: a layer shares its weight with another, which would change with it.
        """
        self.matrices = match_modules(linear_names(model), self.options.target_modules)
        _require_own_weights(model, self.matrices, self.options.method)
        if beginning.constants:
            wrapped = self.wrapped(model)
            _begin_as_before(wrapped, beginning.constants)
        else:
            wrapped = self.begin(model, beginning)
        self._initial = {
            name: p.detach().to("cpu", copy=True) for name, p in wrapped.named_parameters() if p.requires_grad
        }
        return wrapped

    def on_the_base(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """s (B A − B₀ A₀) as a LoRA of twice the rank, at the same scale: what was trained, on the base as it was."""
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.init_lora_weights, config.lora_ga_config = True, None
        initial = {name.replace(".default.", "."): value.float() for name, value in self._initial.items()}
        return {
            name: torch.cat([value, initial[name]], 0)
            if ".lora_A." in name
            else torch.cat([value, -initial[name]], 1)
            for name, value in tensors.items()
        }


def lora_layers(wrapped: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers with a LoRA, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)]


def pair_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r] of such a layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def whole_base(layer: Any) -> AbstractContextManager[Any]:
    """While active, the layer's own weight is whole, also under ZeRO-3; process 0's is every one's after it."""
    import deepspeed

    weights = [layer.get_base_layer().weight]
    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
    return found


@torch.no_grad()
def take_out(layer: Any) -> None:
    """W becomes W − s B A, computed in fp32 and rounded once."""
    A, B = pair_of(layer)
    base = layer.get_base_layer().weight
    offset = layer.scaling["default"] * (B.float() @ A.float())
    base.copy_(base.float() - (offset.T if layer.fan_in_fan_out else offset))


@torch.no_grad()
def _begin_as_before(wrapped: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Write A₀ and B₀, and take their product out of the base once more."""
    named = dict(wrapped.named_parameters())
    for name, value in constants.items():
        named[name].copy_(value)
    for _, layer in lora_layers(wrapped):
        if pair_of(layer)[1].any():  # else it began as plain LoRA, beside an unchanged base
            with whole_base(layer):
                take_out(layer)


def _require_own_weights(model: nn.Module, matrices: list[str], method: str) -> None:
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in matrices:
        if owners[id(model.get_submodule(name).weight)] > 1:
            raise UserError(
                f"method {method} changes {name}, whose weight another layer shares",
                "target_modules",
                "leave it out",
            )
