"""Batches that compiled layers do not take: the layers run as they are, and keep no more than compiled ones would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora_ds import FlexLoRAConfig
from flexlora_ds.adapter.inject import linear_shapes
from flexlora_ds.adapter.layer import adapters, forward_context
from flexlora_ds.gradient.collect import GradientProducts, collecting
from launch.model.compiled_blocks import compile_blocks
from tests.helpers import tiny

ROWS = torch.arange(24).view(2, 12)
LAYERS = 3


def model(*, compiled: bool = False) -> Any:
    torch.manual_seed(0)
    config = FlexLoRAConfig(rank=2, dropout=0.2, target_modules="all-linear")
    made: Any = tiny.adapted_llama(config, "fp32", layers=LAYERS).train()
    made.set_attn_implementation("sdpa")
    forward_context(made).row_keys = torch.arange(24)
    if compiled:
        compile_blocks(made, "eager")
    return made


def looked_at(made: Any) -> tuple[dict[str, Tensor], int]:
    """Products with the gradient of every matrix, and the bytes that the layers kept for the backward pass."""
    shapes = linear_shapes(made, list(adapters(made)))
    right = {name: torch.eye(width)[:2] for name, (_, width) in shapes.items()}
    products, kept = GradientProducts(shapes, right=right), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with collecting(made, products), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        made(input_ids=ROWS, labels=ROWS).loss.backward()
    return products.of_right, kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_whose_gradients_are_looked_at_are_computed_twice_and_keep_little(checkpointing: bool) -> None:
    """A run begins so, and its micro-batch is chosen for compiled layers."""
    expected, much = looked_at(model())
    made = model(compiled=True)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, kept = looked_at(made)
    assert kept < much / 4
    assert all(torch.equal(expected[name], found[name]) for name in expected)
