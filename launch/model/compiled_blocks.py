"""Whole decoder layers compiled by torch: one code for all of them, for any length and any ranks.

On a GPU a step of short records is over before Python has asked for all of its operations. A layer compiled as one
graph, forward and backward, asks for a fraction of them, and for none from autograd's nodes in Python.

What differs between layers (weights, adapters, the keys of their dropout) is the code's input. Rank dimensions are left
open and equal ranks are not taken for one number, so that a rank change compiles nothing. A compiler takes the size 1
for a constant: a matrix of rank 1 is handed over with a second direction of zeros, which changes neither its output
nor its gradients.

Evaluation, generation, autocast, and packed batches whose attention goes through them one by one take a layer as it is.
So do batches whose gradients are looked at. Their layers are computed twice: kept as they are they would take more
memory than compiled ones, for which a run's micro-batch is chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexlora_ds.adapter.layer import AdaptedLinear, ForwardContext, Handed
from flexlora_ds.devices import is_out_of_memory
from flexlora_ds.dropout.apply import columns_of
from flexlora_ds.errors import UserError
from flexlora_ds.rounding import round_up
from flexlora_ds.terminal.command import one_line
from launch.model.layer_stack import LayerStack, Triple
from launch.model.packed_attention import PACKED_VARLEN

_LONGEST_IN = 128
"""The attention gets the length of the longest segment rounded up to a multiple of this."""
_OFFSET = 64
_GRAPHS = 64
"""At most so many for one layer's code; a model needs two, with an attention mask and without."""


_OfMatrix: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def compile_blocks(
    model: nn.Module,
    backend: str | Callable[..., Any] = "inductor",
    *,
    or_plain: bool = False,
    replayed: bool = False,
) -> int:
    """Compile every decoder layer of an adapted model in place; returns how many there are.

    After `inject_adapters`, before `deepspeed.initialize`, at ZeRO-0, 1 or 2: ZeRO-3 gathers weights in hooks inside a
    layer. The first training step compiles.

    Args:
        or_plain: try the first layer by itself, and where it cannot be compiled, warn and take all layers as they are.
        replayed: on a GPU, replay packed micro-batches of rounded lengths that come again (`launch.model.layer_stack`).

    Raises:
        UserError: the model has no decoder layers, or one of them holds a linear layer that is not torch's own;
            with `or_plain` a warning, and none is compiled.
    """
    compiled = torch.compile(_body, fullgraph=True, dynamic=True, backend=backend)
    shared = _Shared(compiled, untried=or_plain)
    try:
        blocks = {layer: CompiledBlock(layer, shared) for layer in decoder_layers(model)}
    except UserError as error:
        if not or_plain:
            raise
        shared.give_up(error)
        return 0
    for place, (layer, block) in enumerate(blocks.items()):
        layer.forward, block.place = block, place
    if replayed:
        shared.stack = _stack_of([*blocks.values()])
    return len(blocks)


def layer_stack(model: nn.Module) -> LayerStack | None:
    """What replays a model's layers, where that was asked for."""
    forward = getattr(decoder_layers(model)[0], "forward", None)
    return forward.shared.stack if isinstance(forward, CompiledBlock) else None


def layers_compiled(model: nn.Module) -> bool | None:
    """Whether a model's layers run compiled; None: no pass has tried them yet."""
    shared = _shared_of(model)
    return None if shared is not None and shared.untried else shared is not None and not shared.plain


def give_up_compiled(model: nn.Module, reason: str) -> None:
    """Take the layers as they are from now on, and warn, where they run compiled."""
    shared = _shared_of(model)
    if shared is not None and not shared.plain:
        shared.give_up(RuntimeError(reason))


def _shared_of(model: nn.Module) -> _Shared | None:
    forwards = (vars(module).get("forward") for module in model.modules())
    return next((f.shared for f in forwards if isinstance(f, CompiledBlock)), None)


def _stack_of(blocks: list[CompiledBlock]) -> LayerStack | None:
    """None where the layers share no one context, of parts that were adapted by themselves."""
    contexts = {id(block.context): block.context for block in blocks if block.matrices}
    if len(contexts) != 1:
        return None
    return LayerStack([block.layer for block in blocks], blocks, *contexts.values())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, in order."""
    found = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if not found:
        raise UserError("compile blocks finds no decoder layers in this model", mend="leave compile false")
    return found


class CompiledBlock:
    """The forward pass of one decoder layer in training: it hands the layer's own tensors to the code of all layers."""

    def __init__(self, layer: nn.Module, shared: _Shared) -> None:
        self.layer, self.shared, self.place = layer, shared, 0
        self.matrices = [m for m in layer.modules() if isinstance(m, AdaptedLinear)]
        self.names: list[tuple[Tensor, Tensor]] = []
        for place, matrix in enumerate(self.matrices):
            if matrix.weight is None:
                raise UserError(
                    f"compile blocks cannot look into {matrix.name}", mend="choose compile pieces or false"
                )
            matrix.place = place
        for p in layer.parameters():
            if not p.requires_grad:
                torch._dynamo.mark_static(p)
        self.context = self.matrices[0].context if self.matrices else ForwardContext()

    def __call__(self, hidden_states: Tensor, **others: Any) -> Any:
        layer: Any = self.layer
        stack = self.shared.stack
        if stack is not None and stack.passes(self.place, hidden_states):
            return hidden_states
        inputs = None if self.shared.plain else self._inputs(hidden_states, others)
        if inputs is None:
            return self._as_it_is(layer, hidden_states, others)
        if self.shared.untried and not self._runs(layer, hidden_states, inputs):
            return self._as_it_is(layer, hidden_states, others)
        if stack is None:
            return self._computed(layer, hidden_states, inputs)
        output = stack.compute(self.place, hidden_states, inputs)
        if output is None:
            output = self._computed(layer, hidden_states, inputs)
            stack.watch(self.place, hidden_states, others, output)
        return output

    def _runs(self, layer: Any, hidden_states: Tensor, inputs: dict[str, Any]) -> bool:
        """Whether this layer is compiled and runs, forward and backward; if not, all are taken as they are from now on.

        What becomes of a backward pass that cannot be compiled is said in it alone, when it is too late to do without.
        """
        entering = hidden_states.detach().requires_grad_()
        # A matrix gets its penalty once in an update, and this pass is none.
        penalty, self.context.penalty = self.context.penalty, None
        try:
            output = self._computed(layer, entering, inputs)
            output = output if isinstance(output, Tensor) else output[0]
            torch.autograd.grad(output, entering, torch.zeros_like(output))
        except Exception as error:  # a compiler, and the kernels that it made, fail in many ways
            if is_out_of_memory(error):
                raise
            self.context.handed = None
            self.shared.give_up(error)
            return False
        finally:
            self.context.penalty = penalty
        self.shared.untried = False
        return True

    def _as_it_is(self, layer: Any, hidden_states: Tensor, others: dict[str, Any]) -> Any:
        forward = partial(type(layer).forward, layer, **others)
        observed = self.context.observer is not None and layer.training and torch.is_grad_enabled()
        if not observed or getattr(layer, "gradient_checkpointing", False):
            return forward(hidden_states)
        return checkpoint(forward, hidden_states, use_reentrant=False)

    def _computed(self, layer: Any, hidden_states: Tensor, inputs: dict[str, Any]) -> Any:
        if not hidden_states.requires_grad:  # the first layer, which is to run the code of the others
            hidden_states = hidden_states.detach().requires_grad_()
        if getattr(layer, "gradient_checkpointing", False) and _checkpoints_itself(type(layer)):
            return layer._gradient_checkpointing_func(partial(self.run, inputs=inputs), hidden_states)
        return self.run(hidden_states, inputs)

    def _inputs(self, hidden_states: Tensor, others: dict[str, Any]) -> dict[str, Any] | None:
        """What the compiled code takes of a call's arguments; None: it does not take this call."""
        here = hidden_states.device.type
        if not self.layer.training or not torch.is_grad_enabled() or torch.is_autocast_enabled(here):
            return None
        if others.get("past_key_values") is not None or self.context.observer is not None:
            return None
        inputs = {name: _no_view(value) for name, value in others.items() if value is not None}
        if inputs.pop("segment_lengths", None) is not None:
            attention = getattr(getattr(self.layer, "self_attn", None), "config", None)
            if getattr(attention, "_attn_implementation", None) != PACKED_VARLEN:
                return None
            if hidden_states.dtype not in (torch.bfloat16, torch.float16):
                return None
            for name in ("max_length_q", "max_length_k"):
                inputs[name] = round_up(inputs[name], _LONGEST_IN)
        return inputs

    def run(
        self, hidden_states: Tensor, inputs: dict[str, Any], adapters: Sequence[Triple] | None = None
    ) -> Any:
        """The compiled code on arguments as `_inputs` gives them.

        Args:
            adapters: what stands for P, λ and Q of every matrix; None: they themselves.
        """
        row_keys = self._row_keys(hidden_states)
        tensors = self._tensors(hidden_states.device, self.triples if adapters is None else adapters)
        with _open_sizes():
            output = self.shared.compiled(self.layer, self.context, row_keys, tensors, hidden_states, inputs)
        penalty = self.context.penalty
        if penalty is not None:
            for matrix in self.matrices:
                output = penalty.attach(output, matrix.P, matrix.Q)
        return output

    def _row_keys(self, hidden_states: Tensor) -> Tensor | None:
        if not any(matrix.dropout > 0 for matrix in self.matrices):
            return None
        keys, shape = self.context.row_keys, hidden_states.shape[:-1]
        if keys is None:
            limit = torch.iinfo(torch.int64)
            return torch.randint(limit.min, limit.max, shape, device=hidden_states.device)
        if keys.numel() != shape.numel():
            raise ValueError(f"{shape.numel()} input rows, but {keys.numel()} row keys")
        keys = keys.reshape(shape).detach()
        return (
            keys
            if keys.is_contiguous() and keys.storage_offset() == 0
            else keys.clone(memory_format=torch.contiguous_format)
        )

    @property
    def triples(self) -> list[Triple]:
        """P, λ and Q of every matrix."""
        return [(m.P, m.lam, m.Q) for m in self.matrices]

    def _tensors(self, device: torch.device, adapters: Sequence[Triple]) -> list[_OfMatrix]:
        if not self.names or self.names[0][0].device != device:
            self.names = [
                (torch.tensor([m.key], device=device), columns_of(m.in_features, device))
                for m in self.matrices
            ]
        inside = self.shared.lie_inside(self.matrices)
        return [
            (*names, _handed(P, 1, inside), _handed(lam, 0, inside), _handed(Q, 0, inside))
            for names, (P, lam, Q) in zip(self.names, adapters, strict=True)
        ]


def _no_view(value: Any) -> Any:
    """A tensor without what it is a view of, whose sizes the compiled code would look at, too."""
    return value.detach() if isinstance(value, Tensor) and value._is_view() else value


@dataclass
class _Shared:
    """What the layers of a model share."""

    compiled: Callable[..., Any]
    untried: bool = False
    """Whether a layer is to be tried first, because nobody has asked for compiled ones."""
    inside: bool | None = None
    plain: bool = False
    """Whether none can be compiled, and all are taken as they are."""
    stack: LayerStack | None = None
    """What replays them, where that was asked for."""

    def give_up(self, error: Exception) -> None:
        """Take all layers as they are."""
        self.plain, self.untried = True, False
        cause = getattr(error, "inner_exception", error)
        reason = one_line(str(cause), 200) or type(cause).__name__
        warnings.warn(
            f"decoder layers are not compiled, which is slower: {reason}; `compile: false` is silent",
            stacklevel=2,
        )

    def lie_inside(self, matrices: list[AdaptedLinear]) -> bool:
        """Whether parameters lie in a buffer of many, as ZeRO keeps them; decided at the first call."""
        if self.inside is None:
            self.inside = any(p.storage_offset() > 1 for m in matrices for p in (m.P, m.lam, m.Q))
        return self.inside


def _handed(p: Tensor, dimension: int, inside: bool) -> Tensor:
    """A parameter as the compiled code takes it: of at least two directions, and where others begin in a buffer.

    The code holds for offsets from 2 on, or for 0 alone: the one parameter at a buffer's beginning is copied.
    """
    narrow = p.shape[dimension] == 1
    if not narrow and (p.storage_offset() > 1 if inside else p.storage_offset() == 0):
        return p
    found: Tensor = _Copied.apply(p, dimension, 1 if narrow else 0, _OFFSET if inside else 0)  # type: ignore[no-untyped-call]
    return found


class _Copied(torch.autograd.Function):
    """A parameter with further directions of zeros, behind an offset; a Parameter and no view, as the code's others."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, dimension: int, more: int, offset: int) -> Tensor:
        ctx.dimension, ctx.rank = dimension, p.shape[dimension]
        shape = list(p.shape)
        shape[dimension] += more
        room = p.new_zeros(offset + math.prod(shape))
        whole = room[offset:].view(shape)
        whole.narrow(dimension, 0, ctx.rank).copy_(p)
        return torch.Tensor._make_subclass(nn.Parameter, whole.detach(), False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.narrow(ctx.dimension, 0, ctx.rank), None, None, None


@contextmanager
def _open_sizes() -> Iterator[None]:
    """Where the compiler, if it has to run, leaves ranks open and every size a number of its own."""
    from torch._dynamo import config as dynamo
    from torch.fx.experimental import _config as shapes

    graphs = dynamo.patch(force_parameter_static_shapes=False, specialize_float=True, recompile_limit=_GRAPHS)
    with graphs, shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def _body(
    layer: nn.Module,
    context: ForwardContext,
    row_keys: Tensor | None,
    of_matrices: list[_OfMatrix],
    hidden_states: Tensor,
    inputs: dict[str, Any],
) -> Any:
    """What is compiled: the layer's own forward pass."""
    if row_keys is not None and row_keys.shape != hidden_states.shape[:-1]:
        raise ValueError("one row key for every input row")  # the compiler learns that the sizes are equal
    context.handed = Handed(row_keys, of_matrices)
    output = _own_forward(type(layer))(layer, hidden_states, **inputs)
    context.handed = None
    return output


def _own_forward(kind: Any) -> Callable[..., Any]:
    """The layer's forward pass without the activation checkpointing that transformers puts around it."""
    forward: Callable[..., Any] = kind.forward.__wrapped__ if _checkpoints_itself(kind) else kind.forward
    return forward


def _checkpoints_itself(kind: Any) -> bool:
    return hasattr(kind, "gradient_checkpointing") and hasattr(kind.forward, "__wrapped__")
