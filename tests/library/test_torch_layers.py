"""Torch's own transformer layers, which read the weights of their linear layers in place of calling them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexlora_ds import (
    adapters,
    inject_adapters,
    start_from_gradient,
)
from flexlora_ds.errors import UserError
from tests.helpers.own_loop import config


class Encoder(nn.Module):
    """Torch's own transformer layers; a plain module, which names no embedding."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return y


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_layers_compute_their_adapters_in_evaluation_too(
    activation: str, padded: bool
) -> None:
    """Beside the same layers with the update in their weights."""
    torch.manual_seed(0)
    model = Encoder(activation)
    merged = copy.deepcopy(model)
    names = inject_adapters(model, config())
    assert names == [f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)]
    for name, layer in adapters(model).items():
        layer.lam.data.fill_(0.7)
        update = layer.scaling * layer.P @ torch.diag(layer.lam) @ layer.Q
        merged.get_submodule(name).weight.data += update.detach()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    for training in (True, False):
        with torch.no_grad():
            found, expected = model.train(training)(x, padding), merged.train(training)(x, padding)
        kept = slice(None) if padding is None else ~padding
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_the_output_of_torchs_attention_cannot_be_adapted() -> None:
    with pytest.raises(
        UserError,
        match=r"'out_proj' matches no linear layer that can be adapted; this model has linear1, linear2",
    ):
        inject_adapters(Encoder(), config(target_modules="out_proj"))


def test_a_plain_module_begins_with_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(7, 6)
    dense = copy.deepcopy(model)
    dense(x).square().sum().backward()
    inject_adapters(model, config())
    start = start_from_gradient(model, config(), lambda: [model(x).square().sum()])
    for name, sigma in start.sigma.items():
        weight: Any = dense.get_submodule(name).weight
        assert sigma == pytest.approx(torch.linalg.svdvals(weight.grad)[:2].tolist(), rel=1e-4)
