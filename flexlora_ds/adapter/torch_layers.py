"""Torch's own attention and transformer layers, which read the weights of linear layers instead of calling them."""

from __future__ import annotations

from torch import nn

from flexlora_ds.adapter.layer import AdaptedLinear


def read_not_called(model: nn.Module) -> set[nn.Module]:
    """Linear layers whose weight alone is used: an adapter on them would never be computed."""
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def call_adapted_layers(model: nn.Module) -> None:
    """Let torch's encoder layers call what is adapted in them.

    In evaluation they give all their weights to one kernel, adapters left out, unless their activation is another than
    relu and gelu. That attribute decides nothing else. The encoder around them packs padded rows for that kernel only.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_adapters(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds_adapters(module):
            module.use_nested_tensor = False


def _holds_adapters(module: nn.Module) -> bool:
    return any(isinstance(inside, AdaptedLinear) for inside in module.modules())
