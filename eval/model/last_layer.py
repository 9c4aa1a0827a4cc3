"""Skipping work in a decoder's last layer that no requested logit depends on.

After the last layer's attention nothing flows from one position to another. Where only the logits of the last
positions are requested, its queries, output projection and MLP are needed at those positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Compute = Callable[..., tuple[Tensor, Any]]
"""`LanguageModel.compute`."""

_PER_POSITION = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


class LastLayer:
    """Narrows the modules of a model's last layer to the last positions while `only` is open.

    A narrowed module gives zeros at the other positions. `modules` is empty where the model has none of the
    known names. `agrees` checks that narrowing them changes no logit. `remove` leaves the model as it was.
    """

    def __init__(self, model: Any) -> None:
        self._keep: int | None = None
        self._width = 0
        self.modules = _per_position(model)
        self._hooks = [
            hook
            for module in self.modules
            for hook in (
                module.register_forward_pre_hook(self._narrow),
                module.register_forward_hook(self._widen),
            )
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

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
        # Contiguous, as the whole tensor is: experts take a flat view of their input.
        return (args[0][:, -self._keep :].contiguous(), *args[1:])

    def _widen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if self._keep is None:
            return None
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} gives {type(output).__name__}")
        return nn.functional.pad(output, (0, 0, self._width - output.shape[1], 0))


@torch.inference_mode()
def agrees(compute: Compute, last_layer: LastLayer, ids: Tensor) -> bool:
    """Whether narrowing changes no logit in any of the ways in which an evaluation asks, for ids [rows, tokens]."""
    plain = list(_every_use(compute, None, ids))
    try:
        narrowed = list(_every_use(compute, last_layer, ids))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    rounding = 1e-4 if plain[0].dtype == torch.float32 else 3e-2
    return all(
        bool((p.float() - n.float()).abs().max() <= rounding * p.float().abs().max())
        for p, n in zip(plain, narrowed, strict=True)
    )


def _every_use(compute: Compute, narrowing: LastLayer | None, ids: Tensor) -> Iterator[Tensor]:
    """The logits of a prefix alone, of padded rows with one and with more columns wanted, of rows behind the prefix,
    and of a step after these, which reads what they left in the cache.
    """
    rows, tokens = ids.shape
    most = tokens - 1
    ones = torch.ones_like(ids)
    padded = ones.clone()
    for row in range(rows):
        padded[row, : row % most] = 0
    positions = (padded.cumsum(1) - 1).clamp(min=0)
    alone, cache = compute(ids[:1], ones[:1], positions[:1], use_cache=True, keep=1, narrowing=narrowing)
    yield alone
    for keep in (1, most):
        logits, _ = compute(ids, padded, positions, keep=keep, narrowing=narrowing)
        yield logits[:, -1:]
    cache.batch_repeat_interleave(rows)
    mask = torch.cat([ones, padded], dim=1)
    behind, cache = compute(
        ids, mask, tokens + positions, cache=cache, use_cache=True, keep=most, narrowing=narrowing
    )
    yield behind[:, -1:]
    following = torch.cat([mask, ones[:, :1]], dim=1)
    last = tokens + positions[:, -1:] + 1
    yield compute(ids[:, :1], following, last, cache=cache, use_cache=True, keep=1, narrowing=narrowing)[0]


def _per_position(model: Any) -> list[nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    found = dict(layers[-1].named_modules())
    return [found[name] for name in _PER_POSITION if name in found]
