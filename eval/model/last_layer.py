"""Skipping work in a decoder's last layer that no requested logit depends on.

After the last layer's attention nothing flows from one position to another. Where only the logits of the last
positions are requested, its queries, output projection and MLP are needed at those positions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PER_POSITION = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


class LastLayer:
    """Narrows the modules of a model's last layer to the last positions while `only` is open.

    A narrowed module gives zeros at the other positions. `modules` is empty where the model has none of the
    known names. `agrees` checks that narrowing them changes no logit.
    """

    def __init__(self, model: Any) -> None:
        self._keep: int | None = None
        self._width = 0
        self.modules = _per_position(model)
        for module in self.modules:
            module.register_forward_pre_hook(self._narrow)
            module.register_forward_hook(self._widen)

    @contextmanager
    def only(self, keep: int) -> Iterator[None]:
        """Compute the last `keep` positions of the last layer only."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._keep is None:
            return None
        self._width = args[0].shape[1]
        return (args[0][:, -self._keep :], *args[1:])

    def _widen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if self._keep is None:
            return None
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} gives {type(output).__name__}")
        return nn.functional.pad(output, (0, 0, self._width - output.shape[1], 0))


@torch.inference_mode()
def agrees(model: Any, last_layer: LastLayer, probe: Tensor) -> bool:
    """Whether a model gives the same last logits with its last layer narrowed, for token ids [rows, tokens]."""
    plain = _last_logits(model, probe)
    try:
        with last_layer.only(1):
            narrowed = _last_logits(model, probe)
    except (TypeError, RuntimeError, IndexError, AttributeError):
        return False
    rounding = 1e-4 if next(model.parameters()).dtype == torch.float32 else 3e-2
    return bool((plain - narrowed).abs().max() <= rounding * plain.abs().max())


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, -1].float()


def _per_position(model: Any) -> list[nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    found = dict(layers[-1].named_modules())
    return [found[name] for name in _PER_POSITION if name in found]
