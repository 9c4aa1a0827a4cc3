"""The adapted layer's one node against its plain form: values, gradients in every branch, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.adapter.function import adapted_linear
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.dropout.apply import SeededDropout
from flexlora_ds.dropout.mask import keep_mask
from tests.helpers import tiny
from tests.helpers.adapted_layers import adapted_layer, output_and_gradients, seeded_normal

OUT, IN, RANK, ROWS = 5, 7, 3, 6
SCALE = 0.7


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {
        "x": (2, 3, IN),
        "weight": (OUT, IN),
        "bias": (OUT,),
        "P": (OUT, RANK),
        "lam": (RANK,),
        "Q": (RANK, IN),
    }
    return {
        name: seeded_normal(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())
    }


def drop(p: float = 0.4) -> SeededDropout:
    return SeededDropout(torch.arange(50, 50 + ROWS), 9, p)


def dense(t: dict[str, Tensor], dropped: SeededDropout | None) -> Tensor:
    """The formula with the whole update formed."""
    x = t["x"] if dropped is None else t["x"] * keep_mask(dropped.row_keys, 9, IN, dropped.p).view(2, 3, IN)
    update = SCALE * t["P"] @ torch.diag(t["lam"]) @ t["Q"]
    return F.linear(t["x"], t["weight"], t["bias"]) + x @ update.T


@pytest.mark.parametrize("dropped", [None, drop()], ids=["", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(
    "trained",
    [("x", "P", "lam", "Q"), ("P", "lam", "Q"), ("x",), ("x", "P"), ("lam",), ("x", "Q")],
    ids=" ".join,
)
def test_gradients_are_numerical_ones(
    trained: tuple[str, ...], bias: bool, dropped: SeededDropout | None
) -> None:
    given = inputs()
    free = {name: given[name].requires_grad_() for name in trained}

    def function(*values: Tensor) -> Tensor:
        t = {**given, **dict(zip(free, values, strict=True))}
        b = t["bias"] if bias else None
        return adapted_linear(t["x"], t["weight"], b, t["P"], t["lam"], t["Q"], SCALE, dropped)

    assert torch.autograd.gradcheck(function, tuple(free.values()))
    expected = dense({**given, "bias": given["bias"] * bias}, dropped)
    torch.testing.assert_close(function(*free.values()), expected, rtol=1e-12, atol=1e-12)


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max |Δ| / max |expected|, over output and gradients."""
    assert actual.keys() == expected.keys() == {"y", "x", "P", "lam", "Q"}
    return max(
        float((actual[n].double() - e.double()).abs().max() / e.double().abs().max())
        for n, e in expected.items()
    )


BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_both_forms_agree_in_every_precision(dtype: torch.dtype, p: float) -> None:
    """In low precision both are measured against float64, so that neither's rounding counts as the other's fault."""
    layer, x = adapted_layer(dtype, p), seeded_normal(2, 16, 48, dtype=dtype)
    node, plain = output_and_gradients(layer, x, plain=False), output_and_gradients(layer, x, plain=True)
    assert torch.equal(node["y"], plain["y"])
    assert {n: t.dtype for n, t in node.items()} == {n: t.dtype for n, t in plain.items()}
    exact = output_and_gradients(layer.double(), x.double(), plain=True)
    assert largest_error(node, exact) < max(BOUNDS[dtype], 1.2 * largest_error(plain, exact))
    assert largest_error(node, exact) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "adapter", "autocast"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=["fp32 on bf16", "bf16 on fp32", "autocast", "autocast on bf16"],
)
def test_mixed_dtypes(base: torch.dtype, adapter: torch.dtype, autocast: bool, p: float) -> None:
    layer, x = adapted_layer(base, p), seeded_normal(2, 16, 48, dtype=base)
    for q in (layer.P, layer.lam, layer.Q):
        q.data = q.data.to(adapter)
    around = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else nullcontext
    found = output_and_gradients(layer, x, plain=False, around=around)
    assert found["y"].dtype == (torch.bfloat16 if autocast else base)
    assert found["x"].dtype == base and all(found[n].dtype == adapter for n in ("P", "lam", "Q"))
    exact = output_and_gradients(layer.double(), x.double(), plain=True)
    assert largest_error(found, exact) < 4e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept_is_x_and_the_r_wide_activation(autocast: bool) -> None:
    layer = adapted_layer(torch.float32, 0.3)
    x = seeded_normal(2, 16, 48, dtype=torch.float32).requires_grad_()
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    for p in layer.parameters():
        kept.pop(p.data_ptr(), None)
    assert layer.context.row_keys is not None
    kept.pop(layer.context.row_keys.data_ptr())
    assert sorted(t.numel() for t in kept.values()) == [2 * 16 * 8, 2 * 16 * 48]


def run_llama(
    p: float, keys: bool, *, plain: bool = False, wrap: Callable[[nn.Module], Any] | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of a tiny Llama whose every linear layer is adapted."""
    config = FlexLoRAConfig(rank=4, dropout=p, target_modules=("all-linear",))
    model = tiny.adapted_llama(config).train()
    context = forward_context(model)
    ids = torch.arange(1, 41).view(4, 10)
    context.row_keys, context.plain = (ids * 7 if keys else None), plain
    run = model if wrap is None else wrap(model)
    torch.manual_seed(3)
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 3 * 14
    return {"loss": loss.detach(), **grads}


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("keys", [True, False], ids=["seeded", "torch's generator"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, keys: bool) -> None:
    expected = run_llama(0.3, keys)
    found = run_llama(0.3, keys, wrap=partial(checkpointed, reentrant=reentrant))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(run_llama(0.0, keys)["loss"], expected["loss"])


def test_torch_compile_traces_it_whole() -> None:
    """Forward and backward in one graph each; the numbers are those of eager mode."""
    expected = run_llama(0.3, True)
    found = run_llama(0.3, True, wrap=partial(torch.compile, backend="aot_eager", fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


class Observed(nn.Linear):
    """A linear layer of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Linear:
    base = nn.Linear(IN, OUT)
    base.register_forward_hook(lambda module, args, y: 2 * y)
    return base


@pytest.mark.parametrize("make", [partial(Observed, IN, OUT), hooked], ids=["subclass", "hook"])
def test_a_base_with_a_forward_of_its_own_is_called(make: Callable[[], nn.Linear]) -> None:
    model = nn.Sequential(make())
    inject_adapters(model, FlexLoRAConfig(rank=2, dropout=0.0, target_modules=(".*",)))
    layer, x = adapters(model)["0"], torch.randn(4, IN)
    torch.testing.assert_close(model(x), 2 * F.linear(x, layer.base.weight, layer.base.bias))
    assert [n for n, _ in model.named_parameters()] == ["0.P", "0.lam", "0.Q", "0.base.weight", "0.base.bias"]


def test_an_ordinary_base_keeps_its_names() -> None:
    """What was `0.weight` before adapters were put on is `0.weight` after."""
    model = nn.Sequential(nn.Linear(IN, OUT))
    before = dict(model.named_parameters())
    inject_adapters(model, FlexLoRAConfig(rank=2, target_modules=(".*",)))
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert set(after) - set(before) == {"0.P", "0.lam", "0.Q"}


def test_a_base_that_is_trained_too_gets_its_gradient() -> None:
    layer = adapted_layer(torch.float64, 0.0)
    assert layer.weight is not None
    layer.weight.requires_grad_()
    x = seeded_normal(2, 16, 48)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.reshape(-1, 48).sum(0).expand(40, 48))


def test_torch_func_sees_through_it() -> None:
    """Gradients of each record, along directions, and with other values for every parameter, the base's too."""
    from torch.func import functional_call, grad, jvp, vmap

    layer = adapted_layer(torch.float64, 0.0, IN + 1, OUT + 3)
    x = seeded_normal(ROWS, layer.in_features, seed=1)
    values = {name: p.detach() * 1.1 for name, p in layer.named_parameters()}
    trained = {name: values[name] for name in ("P", "lam", "Q")}

    def loss(trained: dict[str, Tensor], row: Tensor) -> Tensor:
        found: Tensor = functional_call(layer, {**values, **trained}, (row,)).square().sum()
        return found

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    update = layer.scaling * leaves["P"] @ torch.diag(leaves["lam"]) @ leaves["Q"]
    of_rows = (x @ (leaves["weight"] + update).T + leaves["bias"]).square().sum(1)
    each = vmap(grad(loss), (None, 0))(trained, x)
    along = jvp(lambda t: vmap(loss, (None, 0))(t, x), (trained,), (trained,))[1]
    for row in range(ROWS):
        expected = torch.autograd.grad(of_rows[row], [leaves[n] for n in trained], retain_graph=True)
        for name, value in zip(trained, expected, strict=True):
            assert torch.allclose(each[name][row], value), name
        slope = sum((value * trained[name]).sum() for name, value in zip(trained, expected, strict=True))
        assert torch.allclose(along[row], torch.as_tensor(slope))
