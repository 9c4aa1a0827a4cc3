"""Narrowing the last layer changes no wanted logit, and is left alone where it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eval.model.language_model import LanguageModel
from eval.model.last_layer import LastLayer, agrees
from tests.helpers import eval_tiny

IDS = torch.randint(2, 400, (3, 12), generator=torch.Generator().manual_seed(1))


def widths(model: Any, lm: LanguageModel, keep: int) -> dict[str, int]:
    """How many positions each part of the last layer computes."""
    seen: dict[str, int] = {}
    last = model.model.layers[-1]
    parts = {"q": last.self_attn.q_proj, "k": last.self_attn.k_proj, "down": last.mlp.down_proj}
    hooks = [
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.shape[1]}))
        for name, part in parts.items()
    ]
    lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1), keep=keep)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("keep", [1, 4])
def test_only_the_wanted_positions_are_computed(keep: int) -> None:
    model = eval_tiny.make_model(seed=3)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    lm = LanguageModel(model, eval_tiny.make_tokenizer())
    ours, _ = lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1), keep=keep)
    assert torch.allclose(ours, plain[:, -keep:], atol=1e-4)
    assert widths(model, lm, keep) == {"q": 12, "k": 12, "down": keep}  # q is filled up with zeros
    assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-4)  # nothing is left behind


class _Mixes(nn.Module):
    """An MLP that looks at other positions."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.cumsum(1))  # type: ignore[no-any-return]


def test_a_layer_that_mixes_positions_is_left_alone() -> None:
    model = eval_tiny.make_model(seed=3)
    model.model.layers[-1].mlp = _Mixes(model.model.layers[-1].mlp)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits[:, -1]
    assert not agrees(model, LastLayer(model), IDS)
    lm = LanguageModel(model, eval_tiny.make_tokenizer())
    ours, _ = lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1))
    assert torch.allclose(ours[:, 0], plain, atol=1e-4)
