"""All layers of a packed micro-batch as one node: when a length is recorded, replayed, given up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, inject_adapters
from flexlora_ds.adapter.layer import ForwardContext, forward_context
from launch.model import layer_stack
from launch.model.compiled_blocks import compile_blocks
from launch.model.compiled_blocks import layer_stack as layer_stack_of
from launch.model.layer_stack import LayerStack, Triple
from launch.model.packed_inputs import pack_inputs, rounded_length
from tests.helpers.rerun import Rerun
from tests.helpers.tiny import tiny_llama

WIDTH = 8


class Layer(nn.Module):
    """h + tanh(h) Qᵀ λ Pᵀ + a number of the position; no example looks at another."""

    def __init__(self) -> None:
        super().__init__()
        self.P, self.lam, self.Q = (nn.Parameter(torch.randn(*s)) for s in ((WIDTH, 2), (2,), (2, WIDTH)))

    @property
    def triples(self) -> list[Triple]:
        return [(self.P, self.lam, self.Q)]

    def run(self, hidden: Tensor, inputs: dict[str, Any], adapters: Any) -> Tensor:
        ((P, lam, Q),) = adapters
        return hidden + torch.tanh(hidden) @ Q.T * lam @ P.T + inputs["position_ids"].unsqueeze(-1)


@pytest.fixture
def stack() -> LayerStack:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(3)]
    context = ForwardContext(row_keys=torch.arange(7))
    made = LayerStack(layers, layers, context)
    made.alike, made.recorder = True, Rerun()
    return made


def arguments(tokens: int) -> dict[str, Any]:
    ends = torch.tensor([0, 3, tokens], dtype=torch.int32)
    return {
        "position_ids": torch.arange(tokens)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": tokens,
        "max_length_k": tokens,
        "use_cache": False,
    }


def passed(stack: LayerStack, tokens: int = 7, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The output and all gradients of one pass, checked against the layers in plain torch."""
    torch.manual_seed(seed)
    hidden, push = torch.randn(1, tokens, WIDTH), torch.randn(1, tokens, WIDTH)
    stack.context.row_keys = torch.arange(tokens)
    output = stack.compute(0, hidden, arguments(tokens))
    assert output is not None
    for place in range(1, len(stack.layers)):
        assert stack.passes(place, output)
    plain = hidden
    for layer in stack.layers:
        plain = layer.run(plain, arguments(tokens), layer.triples)  # type: ignore[operator]
    parameters = [p for layer in stack.layers for p in layer.parameters()]
    expected = torch.autograd.grad(plain, parameters, push)
    found = torch.autograd.grad(output, parameters, push)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(found, expected)
    return output, list(found)


def test_a_length_is_recorded_at_its_third_pass_and_replayed(stack: LayerStack) -> None:
    replays = []
    for step in range(5):
        passed(stack, 7 + step, seed=step)  # all rounded to one length
        replays.append(stack.replays)
    assert replays == [0, 0, 1, 2, 3]
    assert stack.recordings == 1 and stack.recorder.recorded == 2  # type: ignore[union-attr]
    passed(stack, 200)
    assert stack.replays == 3, "another length"


def test_moved_parameters_are_recorded_anew(stack: LayerStack) -> None:
    for _ in range(4):
        passed(stack)
    assert stack.replays == 2
    layer: Any = stack.layers[1]
    layer.P.data, layer.lam.data, layer.Q.data = torch.randn(WIDTH, 3), torch.randn(3), torch.randn(3, WIDTH)
    passed(stack)
    assert stack.replays == 2 and stack.recorder.forgotten == 1  # type: ignore[union-attr]
    passed(stack), passed(stack)
    assert stack.replays == 3


def test_gradients_outlive_the_next_replay(stack: LayerStack) -> None:
    for _ in range(3):
        _, first = passed(stack)
    kept = [g.clone() for g in first]
    passed(stack, seed=9)
    assert stack.replays == 2
    torch.testing.assert_close(first, kept)


def test_a_pass_whose_backward_pass_is_to_come_keeps_its_recording(stack: LayerStack) -> None:
    for _ in range(3):
        passed(stack)
    stack.context.row_keys = torch.arange(7)
    open_pass = stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7))
    assert stack.replays == 2
    passed(stack, seed=4)
    assert stack.replays == 2, "computed beside it"
    del open_pass
    passed(stack)
    assert stack.replays == 3


def test_a_second_backward_pass_is_an_error(stack: LayerStack) -> None:
    for _ in range(4):
        output = passed_by(stack)
        output.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="runs once"):
            output.sum().backward()  # type: ignore[no-untyped-call]


def test_what_cannot_be_recorded_is_computed(stack: LayerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    monkeypatch.setattr(stack.recorder, "record", refuse)
    passed(stack), passed(stack)
    with pytest.warns(UserWarning, match="not replayed, which is slower: operation not permitted"):
        passed(stack)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            passed(stack)
    assert stack.replays == 0


def test_without_room_nothing_is_recorded(stack: LayerStack) -> None:
    stack.recorder = Rerun(room=-1)
    for _ in range(5):
        passed(stack)
    assert stack.replays == 0 and stack.recorder.recorded == 0


def test_so_many_and_no_more(stack: LayerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_stack, "MOST", 2)
    for _ in range(4):
        for tokens in (7, 130, 260):
            passed(stack, tokens)
    assert stack.recordings == 2 and stack.replays == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s, a: setattr(s.context, "row_keys", None),
        lambda s, a: setattr(s.context, "penalty", object()),
        lambda s, a: setattr(s.layers[0], "gradient_checkpointing", True),
        lambda s, a: s.layers[1].register_forward_hook(lambda *_: None),
        lambda s, a: s.layers[1].register_full_backward_hook(lambda *_: None),
        lambda s, a: s.layers[1].register_full_backward_pre_hook(lambda *_: None),
        lambda s, a: s.layers[2].eval(),
        lambda s, a: setattr(s.layers[0], "more", nn.Parameter(torch.ones(1))),
        lambda s, a: s.layers[0].Q.requires_grad_(False),
        lambda s, a: setattr(s.layers[2].lam, "data", s.layers[2].lam.double()),
        lambda s, a: a.update(attention_bias=torch.ones(1)),
        lambda s, a: a.pop("cu_seq_lens_q"),
        lambda s, a: setattr(s, "alike", False),
        lambda s, a: setattr(s, "alike", None),
    ],
)
def test_other_passes_are_left_to_the_layers(stack: LayerStack, spoil: Callable[..., Any]) -> None:
    given = arguments(7)
    assert stack.compute(0, torch.randn(1, 7, WIDTH), given) is not None
    spoil(stack, given)
    assert stack.compute(0, torch.randn(1, 7, WIDTH), given) is None


def test_another_weight_that_is_trained_from_now_on_gets_its_gradient(stack: LayerStack) -> None:
    layer: Any = stack.layers[1]
    layer.norm = nn.Parameter(torch.ones(1), requires_grad=False)
    for _ in range(4):
        passed_by(stack)
    assert stack.replays == 2
    layer.norm.requires_grad_(True)
    assert stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7)) is None


def test_another_parameter_in_the_same_place_gets_the_gradient(stack: LayerStack) -> None:
    for _ in range(4):
        passed(stack)
    layer: Any = stack.layers[1]
    layer.P = nn.Parameter(layer.P.data)
    passed(stack)


def test_a_parameter_that_its_layer_does_not_use_gets_no_gradient(stack: LayerStack) -> None:
    layer: Any = stack.layers[1]
    unused = tuple(nn.Parameter(torch.randn(2)) for _ in range(3))
    layer.unused = nn.ParameterList(unused)
    layer.__class__ = type(
        "WithMore",
        (Layer,),
        {
            "triples": property(lambda self: [(self.P, self.lam, self.Q), unused]),
            "run": lambda self, hidden, inputs, adapters: Layer.run(self, hidden, inputs, adapters[:1]),
        },
    )
    for _ in range(4):
        passed_by(stack).sum().backward()
        assert all(p.grad is None for p in unused) and layer.P.grad is not None
    assert stack.replays == 2


def test_layers_left_out_at_the_end_are_an_error(stack: LayerStack) -> None:
    for _ in range(4):
        output = stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7))
        assert output is not None and stack.passes(1, output)
        with pytest.raises(RuntimeError, match="left out its last decoder layers; set cuda_graphs false"):
            output.sum().backward()  # type: ignore[no-untyped-call]
    earlier = passed_by(stack)
    stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7))  # an error ends this one
    earlier.sum().backward()  # type: ignore[no-untyped-call]


def passed_by(stack: LayerStack) -> Tensor:
    """The output of a pass that went by all layers."""
    output = stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7))
    assert output is not None and all(stack.passes(place, output) for place in (1, 2))
    return output


def test_something_between_the_layers_is_an_error(stack: LayerStack) -> None:
    output = stack.compute(0, torch.randn(1, 7, WIDTH), arguments(7))
    assert output is not None
    with pytest.raises(RuntimeError, match="set cuda_graphs false"):
        stack.passes(1, output * 2)


def test_layers_share_the_context_of_those_that_are_adapted() -> None:
    model = tiny_llama("bf16", layers=3)
    inject_adapters(model, FlexLoRAConfig(rank=2, target_modules=[r".*layers\.[12]\..*q_proj"]))
    compile_blocks(model, "eager", replayed=True)
    found = layer_stack_of(model)
    assert found is not None and found.context is forward_context(model)
    parts: Any = tiny_llama("bf16", layers=3)
    for part in parts.model.layers:  # each has row keys of its own
        inject_adapters(part, FlexLoRAConfig(rank=2, target_modules=["q_proj"]))
    compile_blocks(parts, "eager", replayed=True)
    assert layer_stack_of(parts) is None


@pytest.mark.parametrize("fault", ["none", "another tensor", "other arguments", "a tuple", "skipped"])
def test_layers_are_alike_where_each_takes_what_the_one_before_gives(stack: LayerStack, fault: str) -> None:
    stack.alike = None
    others, hidden = arguments(7), torch.randn(1, 7, WIDTH)
    for place in range(3):
        output: Any = torch.randn(1, 7, WIDTH)
        spoiled = place == 1
        given = others if not (spoiled and fault == "other arguments") else {**others, "use_cache": True}
        seen = hidden.clone() if spoiled and fault == "another tensor" else hidden
        if not (spoiled and fault == "skipped"):
            result = (output,) if spoiled and fault == "a tuple" else output
            stack.watch(place, seen, given, result)
        hidden = output
    assert stack.alike is (fault == "none")


def test_the_filler_is_a_segment_of_its_own() -> None:
    found = pack_inputs(torch.ones(1, 7, WIDTH), torch.arange(7), arguments(7))
    assert found is not None and found.tokens == 7
    assert found.hidden.shape == (1, 128, WIDTH) and not found.hidden[:, 7:].any()
    assert found.others["cu_seq_lens_q"].tolist() == [0, 3, 7, 128]
    assert found.others["cu_seq_lens_k"] is found.others["cu_seq_lens_q"], "one tensor, as it was"
    assert found.others["max_length_q"] >= 121
    assert found.row_keys is not None and found.row_keys.shape == (128,)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 128), (128, 128), (129, 256), (1570, 1664), (4096, 4096), (4097, 4352)]
)
def test_lengths_are_rounded_by_a_sixteenth_at_most(tokens: int, expected: int) -> None:
    assert rounded_length(tokens) == expected
    assert all(n <= rounded_length(n) <= max(n + 127, n * 17 / 16) for n in range(1, 70_000, 37))
