"""Narrowing the last layer changes no wanted logit, and is left alone where it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eval.model.language_model import LanguageModel
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


class _FlatView(nn.Module):
    """An MLP that takes a flat view of its input, as experts do."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.view(-1, x.shape[-1])).view(x.shape)  # type: ignore[no-any-return]


class _Few(nn.Module):
    """An MLP that is another one for more than two columns, as a kernel for short rows may be."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + (0.1 if 2 < x.shape[1] < 5 else 0.0)  # type: ignore[no-any-return]


class _Short(nn.Module):
    """An MLP that gives nothing for few columns."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[:, : None if x.shape[1] > 4 else 0]  # type: ignore[no-any-return]


def test_a_layer_that_takes_a_flat_view_is_narrowed() -> None:
    model = eval_tiny.make_model(seed=3)
    model.model.layers[-1].mlp = _FlatView(model.model.layers[-1].mlp)
    lm = LanguageModel(model, eval_tiny.make_tokenizer())
    ours, _ = lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1), keep=4)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    assert torch.allclose(ours, plain[:, -4:], atol=1e-4)
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[1]))
    lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1), keep=4)
    assert seen == [4]


@pytest.mark.parametrize("kind", [_Mixes, _Few, _Short])
def test_a_layer_that_narrowing_would_change_is_left_alone(kind: type[nn.Module]) -> None:
    """Whether one column is wanted or several, with a cache or without."""
    model = eval_tiny.make_model(seed=3)
    model.model.layers[-1].mlp = kind(model.model.layers[-1].mlp)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    lm = LanguageModel(model, eval_tiny.make_tokenizer())
    assert lm._last_layer is None
    for keep in (1, 4):
        ours, _ = lm.forward(IDS, torch.ones_like(IDS), torch.arange(12).expand(3, -1), keep=keep)
        assert torch.allclose(ours, plain[:, -keep:], atol=1e-4)
