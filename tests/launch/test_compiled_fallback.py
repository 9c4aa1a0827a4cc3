"""Compiled layers that nobody asked for never end a run: where the first cannot be compiled, all run as they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from flexlora_ds import FlexLoRAConfig
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.adapter.penalty import PenaltyGradient
from flexlora_ds.errors import UserError
from launch.model.compiled_blocks import compile_blocks
from tests.helpers import tiny

ROWS = torch.arange(24).view(2, 12)


def without_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("Python.h: no such file\nand more lines")


def without_backward_pass(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=as_it_is, bw_compiler=without_compiler)(graph, inputs)


def without_kernels(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    def kernels(arguments: list[Any]) -> Any:
        return without_compiler(graph, arguments)

    def compiles(traced: Any, examples: Any) -> Any:
        return make_boxed_func(lambda *arguments: kernels([*arguments]))

    from functorch.compile import make_boxed_func

    return aot_autograd(fw_compiler=compiles, bw_compiler=as_it_is)(graph, inputs)


def as_it_is(graph: Any, inputs: Any) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(graph.forward)


def model() -> Any:
    torch.manual_seed(0)
    config = FlexLoRAConfig(rank=2, dropout=0.0, target_modules="all-linear")
    made: Any = tiny.adapted_llama(config, "fp32", layers=3).train()
    made.set_attn_implementation("sdpa")
    return made


def trained(model: Any) -> tuple[float, list[torch.Tensor]]:
    loss = model(input_ids=ROWS, labels=ROWS).loss
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", [without_compiler, without_backward_pass, without_kernels])
def test_layers_that_cannot_be_compiled_run_as_they_are_after_one_warning(backend: Any) -> None:
    torch._dynamo.reset()
    loss, gradients = trained(model())
    compiled = model()
    assert compile_blocks(compiled, backend, or_plain=True) == 3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, others = trained(compiled)
        compiled.zero_grad()
        trained(compiled)
    texts = [str(w.message) for w in said if "not compiled" in str(w.message)]
    assert len(texts) == 1 and "Python.h" in texts[0] and "\n" not in texts[0], texts
    assert found == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_the_trial_of_the_first_layer_takes_no_penalty_from_its_matrices(form: str) -> None:
    """A matrix gets it once in an update, and the trial runs backward within the first."""
    torch._dynamo.reset()
    gradients = []
    for backend in (None, "eager"):
        made = model()
        for name, p in made.named_parameters():
            if name.endswith(".lam"):
                p.data.fill_(0.3)
        forward_context(made).penalty = PenaltyGradient(form, lambda: 0.5)
        if backend is not None:
            assert compile_blocks(made, backend, or_plain=True) == 3
        gradients.append(trained(made)[1])
        assert backend is None or not made.model.layers[0].forward.shared.plain
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_layers_of_which_one_is_not_torchs_own_run_as_they_are_unless_compiled_ones_were_asked_for() -> None:
    class Other(torch.nn.Linear):
        """As a quantised base has them."""

    other = model()
    matrix = other.model.layers[1].mlp.up_proj
    matrix.base, matrix.weight, matrix.bias = Other(32, 64), None, None
    with pytest.warns(UserWarning, match="not compiled, which is slower: compile blocks cannot look into"):
        assert compile_blocks(other, or_plain=True) == 0
    assert not any("forward" in vars(layer) for layer in other.model.layers)
    with pytest.raises(UserError, match="cannot look into"):
        compile_blocks(other)


def test_layers_that_were_asked_for_are_compiled_or_refused() -> None:
    compiled = model()
    compile_blocks(compiled, without_compiler)
    with pytest.raises(RuntimeError, match=r"Python\.h"):
        trained(compiled)


def test_a_failure_after_the_first_layer_is_a_failure() -> None:
    compiled = model()
    calls: list[int] = []

    def breaks_at_the_second_graph(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return without_compiler(graph, inputs) if len(calls) > 1 else graph.forward

    compile_blocks(compiled, breaks_at_the_second_graph, or_plain=True)
    trained(compiled)
    padded = torch.ones_like(ROWS)
    padded[1, 6:] = 0
    with pytest.raises(RuntimeError, match=r"Python\.h"):
        compiled(input_ids=ROWS, attention_mask=padded)
