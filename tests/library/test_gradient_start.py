"""`start_from_gradient` without DeepSpeed: what it leaves as it is, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora_ds import (
    FlexLoRAConfig,
    TorchEngine,
    adapters,
    build_optimizer,
    inject_adapters,
    start_from_gradient,
)
from flexlora_ds.errors import UserError
from tests.helpers import tiny

CONFIG = FlexLoRAConfig(rank=4, dropout=0.0, target_modules="all-linear")
ROWS = tiny.records(6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny.collate(ROWS)[0]).logits
    return found


def start(model: Any, *, engine: bool) -> Any:
    def losses() -> Iterator[Tensor]:
        yield tiny.token_loss(model, ROWS)

    trained = TorchEngine(model, build_optimizer(model, CONFIG, lr=1e-3)) if engine else model
    return start_from_gradient(trained, CONFIG, losses)


@pytest.mark.parametrize("engine", [False, True])
def test_a_model_computes_the_same_behind_a_start_or_it_is_refused(engine: bool) -> None:
    """Its output is compared to the bit: with λ = 0 the start is free, with one λ that is not it would not be."""
    model: Any = tiny.tiny_llama()
    inject_adapters(model, CONFIG)
    before = logits(model)
    assert len(start(model, engine=engine).sigma) == len(adapters(model))
    assert torch.equal(logits(model), before)
    name, layer = list(adapters(model).items())[3]
    layer.lam.data[2] = 0.5
    before = logits(model)
    with pytest.raises(
        UserError, match=rf"^λ is not 0 in {name}: with other P and Q .*; call it before"
    ) as refusal:
        start(model, engine=engine)
    assert "\n" not in str(refusal.value)
    assert torch.equal(logits(model), before)
