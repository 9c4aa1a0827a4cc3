"""All decoder layers of a packed micro-batch as one node of autograd, replayed where a length comes again.

At short records a step on a GPU is over before Python has walked through the layers. When a rounded length comes for
the third time, the layers' forward and backward pass are recorded, and from then on replayed, until a rank change
moves the parameters. What stands before and behind the layers stays as it is.

All gradients leave the node at once. ZeRO fills its buckets in the order in which gradients come, and another process
may replay what this one computes: so the node is there for both.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexlora_ds.adapter.layer import ForwardContext
from flexlora_ds.terminal.command import one_line
from launch.model.cuda_graphs import CudaGraphs, Recorder
from launch.model.packed_inputs import PackedInputs, pack_inputs, pad_tokens

MOST = 32
"""Recordings at a time: each takes some of the host's and the card's memory."""
SEEN = 2
"""Passes of a key before it is recorded: recording takes a pass's time, and a rank change may come soon."""
_BEYOND = 1.25
"""Bytes that a recording takes : bytes that a forward pass keeps."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""P, λ and Q of a matrix."""


class Block(Protocol):
    """A decoder layer that computes with adapters which it is given."""

    @property
    def triples(self) -> list[Triple]:
        """Its own adapters."""

    def run(self, hidden_states: Tensor, inputs: dict[str, Any], adapters: Sequence[Triple]) -> Tensor:
        """Hidden states and other arguments -> hidden states, with `adapters` in place of its own."""


class LayerStack:
    """The layers of one model, in order, and what is recorded of them."""

    def __init__(self, layers: Sequence[nn.Module], blocks: Sequence[Block], context: ForwardContext) -> None:
        self.layers, self.blocks, self.context = layers, blocks, context
        self.recorder: Recorder | None = None
        self.alike: bool | None = None
        """Whether each layer takes the one before's output and the first one's arguments; None: not yet seen."""
        self.replays, self.recordings = 0, 0
        self.recording_seconds = 0.0
        self._watched: tuple[int, Tensor, Mapping[str, Any]] | None = None
        self._passing: tuple[int, Tensor] | None = None
        self._parameters: list[Tensor] = []
        self._adapters_alone = True
        """Whether they are what is trained in the layers, all of them and nothing else, in one dtype."""
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()
        """How often each key has come since the parameters moved."""
        self.kept = 0
        """Bytes that the largest pass so far kept for its backward pass."""
        self._where: tuple[int, ...] = ()
        self._room: _GradientRoom | None = None
        self._given_up = False
        self._open: weakref.ref[_Replayed] | None = None

    def watch(self, place: int, hidden: Tensor, others: Mapping[str, Any], output: Any) -> None:
        """Learn from one pass, layer by layer, whether the layers follow each other and nothing else."""
        if self.alike is not None:
            return
        follows = place == 0
        if self._watched is not None and place > 0:
            last, before, first = self._watched
            follows = place == last + 1 and hidden is before and _same(others, first)
            others = first
        if not follows or not isinstance(output, Tensor):
            self.alike = False
        elif place + 1 == len(self.layers):
            self.alike = True
        self._watched = None if self.alike is not None else (place, output, others)

    def passes(self, place: int, hidden: Tensor) -> bool:
        """Whether `hidden` is what all layers have computed already, on its way through those behind the first."""
        if place == 0 or self._passing is None:
            self._passing = None
            return False
        last, output = self._passing
        if hidden is not output or place != last + 1:
            raise RuntimeError("something stands between the decoder layers; set cuda_graphs false")
        self._passing = None if place + 1 == len(self.layers) else (place, output)
        return True

    def require_passed(self, node: Any) -> None:
        """Raise where a model left out layers at the end, which the node of its pass has computed."""
        if self._passing is not None and self._passing[1].grad_fn is node:
            raise RuntimeError("the model left out its last decoder layers; set cuda_graphs false")

    def compute(self, place: int, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """In the first layer: the output of the last one; None where the layers are to run one by one."""
        if place or not self.alike or hidden.requires_grad or not self._may():
            return None
        packed = pack_inputs(hidden, self.context.row_keys, inputs)
        if packed is None:
            return None
        if self.recorder is None and hidden.is_cuda:
            self.recorder = CudaGraphs(hidden.device)
        self._renew()
        if not self._adapters_alone:
            return None
        output: Tensor = _Whole.apply(self, packed, *self._parameters)  # type: ignore[no-untyped-call]
        if len(self.layers) > 1:
            self._passing = 0, output
        return output

    def through(self, inputs: PackedInputs) -> Outcome:
        """The last layer's output, with its graph.

        It leads to the parameters' values under other names. A parameter's own place in autograd belongs to the stream
        that it was first used on, and a recording must not make that one wait.
        """
        before, self.context.row_keys = self.context.row_keys, inputs.row_keys
        hidden, adapters = inputs.hidden.detach().requires_grad_(), []
        try:
            for block in self.blocks:
                mine = [(_alias(P), _alias(lam), _alias(Q)) for P, lam, Q in block.triples]
                hidden = block.run(hidden, inputs.others, mine)
                adapters += [t for triple in mine for t in triple]
        finally:
            self.context.row_keys = before
        return Outcome(hidden, adapters)

    @property
    def room(self) -> _GradientRoom:
        """Where recordings leave the gradients, made when the first one needs it."""
        if self._room is None:
            self._room = _GradientRoom(self._parameters)
        return self._room

    def _may(self) -> bool:
        bare = not any(getattr(layer, hooks) for layer in self.layers for hooks in _HOOKS)
        training = all(layer.training for layer in self.layers)  # the first one alone has been asked
        checkpointed = getattr(self.layers[0], "gradient_checkpointing", False)
        seeded = self.context.row_keys is not None  # a recording would draw the same masks again and again
        return bare and training and seeded and not checkpointed and self.context.penalty is None

    def _renew(self) -> None:
        """Give up the recordings where a parameter lies elsewhere than it did: they read and write addresses.

        Another parameter in the same place, or one that is trained from now on, ends them too: it gets a gradient.
        """
        held = [p for layer in self.layers for p in layer.parameters()]
        where = tuple(n for p in held for n in (id(p), p.data_ptr(), p.numel(), p.requires_grad))
        if where == self._where:
            return
        self._where = where
        self._parameters = [t for block in self.blocks for triple in block.triples for t in triple]
        trained = {id(p) for p in held if p.requires_grad}
        one_dtype = len({p.dtype for p in self._parameters}) == 1  # gradients come in one tensor
        self._adapters_alone = one_dtype and trained == {id(p) for p in self._parameters}
        self._forget()

    def _forget(self) -> None:
        if self._recordings and self.recorder is not None:
            self.recorder.forget()
        self._recordings.clear()
        self._seen.clear()
        self._room = None

    def begin(self, inputs: PackedInputs) -> _Computed | _Replayed:
        """A pass, replayed where it can be."""
        recording = self._recording(inputs)
        if recording is None:
            return _Computed(self, inputs)
        self.replays += 1
        replayed = _Replayed(recording, inputs)
        self._open = weakref.ref(replayed)
        return replayed

    def _recording(self, inputs: PackedInputs) -> _Recording | None:
        """One that fits; made if this key has come before and there is room."""
        opened = None if self._open is None else self._open()
        if self._given_up or self.recorder is None or (opened is not None and not opened.done):
            return None
        key = inputs.key
        if (found := self._recordings.get(key)) is not None:
            return found
        self._seen[key] += 1
        if self._seen[key] <= SEEN or len(self._recordings) >= MOST:
            return None
        if not self.recorder.has_room(int(_BEYOND * self.kept)):
            return None
        began = time.perf_counter()
        try:
            made = _Recording(self, inputs, self.recorder)
        except Exception as error:  # of the driver, of kernels that wait for the host: of many kinds
            self._give_up(error)
            return None
        self._recordings[key] = made
        self.recordings += 1
        self.recording_seconds += time.perf_counter() - began
        return made

    def _give_up(self, error: Exception) -> None:
        self._given_up = True
        self._forget()
        reason = one_line(str(error), 200) or type(error).__name__
        warnings.warn(
            f"decoder layers are not replayed, which is slower: {reason}; `cuda_graphs: false` is silent",
            stacklevel=2,
        )


@dataclass
class Outcome:
    """The end of a pass through all layers."""

    output: Tensor
    """[1, rounded tokens, features], with its graph."""
    adapters: list[Tensor]
    """What the graph leads to, in the order of the parameters."""

    def gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of all parameters, for the output's; None for one that its layer does not use."""
        return torch.autograd.grad(self.output, self.adapters, grad, allow_unused=True)


def _alias(p: Tensor) -> Tensor:
    """A parameter of the same memory."""
    return nn.Parameter(p.detach())


class _GradientRoom:
    """The gradients of all trainable parameters in one flat tensor, which all recordings of a model share."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._shapes = [p.shape for p in parameters]
        self._flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
        self.places = self._parts(self._flat)

    def copies(self) -> list[Tensor]:
        """Of all gradients."""
        return self._parts(self._flat.clone())

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Whole(torch.autograd.Function):
    """The node: (layers, inputs, trainable parameters) -> the last layer's hidden states [1, tokens, features]."""

    @staticmethod
    def forward(ctx: Any, stack: LayerStack, inputs: PackedInputs, *parameters: Tensor) -> Tensor:
        ctx.stack, ctx.run = stack, stack.begin(inputs)
        return ctx.run.take_output()  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stack.require_passed(ctx)
        return (None, None, *ctx.run.gradients(grad))


class _Computed:
    """A pass whose kernels are asked for one by one."""

    def __init__(self, stack: LayerStack, inputs: PackedInputs) -> None:
        self._tokens, self._length = inputs.tokens, inputs.hidden.shape[1]
        recorder = stack.recorder
        before = 0 if recorder is None else recorder.kept()
        with torch.enable_grad():
            self._end: Outcome | None = stack.through(inputs)
        if recorder is not None:
            stack.kept = max(stack.kept, recorder.kept() - before)

    def take_output(self) -> Tensor:
        """[1, tokens, features]; not kept, for its node keeps this."""
        assert self._end is not None
        return self._end.output.detach()[:, : self._tokens]

    def gradients(self, grad: Tensor) -> Sequence[Tensor | None]:
        """Of all trainable parameters, for the output's; once."""
        end, self._end = self._end, None
        if end is None:
            raise RuntimeError("the decoder layers' backward pass runs once")
        return end.gradients(pad_tokens(grad, self._length))


class _Recording:
    """The forward and the backward pass for one key, which read and write where they did when they were recorded."""

    def __init__(self, stack: LayerStack, inputs: PackedInputs, recorder: Recorder) -> None:
        self._stack, self.inputs, self.room = stack, inputs.copy(), stack.room
        self.output = torch.empty_like(self.inputs.hidden)
        self.grad = torch.zeros_like(self.inputs.hidden)
        self._end: Outcome | None = None
        self._used: list[bool] = []
        self.forward = recorder.record(self._forward)
        self.backward = recorder.record(self._backward)

    def _forward(self) -> None:
        with torch.enable_grad():
            self._end = self._stack.through(self.inputs)
        self.output.copy_(self._end.output.detach())

    def _backward(self) -> None:
        end, self._end = self._end, None
        assert end is not None
        found = end.gradients(self.grad)
        self._used = [gradient is not None for gradient in found]
        values = [gradient for gradient in found if gradient is not None]
        torch._foreach_copy_([*compress(self.room.places, self._used)], values)

    def gradients(self) -> list[Tensor | None]:
        """Of the last replay, for whoever keeps them longer than until the next; None as in `Outcome`."""
        return [g if used else None for g, used in zip(self.room.copies(), self._used, strict=True)]


class _Replayed:
    """A pass by a recording. Others wait until its backward pass is through, for all share their memory."""

    def __init__(self, recording: _Recording, inputs: PackedInputs) -> None:
        self._recording, self._tokens = recording, inputs.tokens
        self.done = False
        recording.inputs.take(inputs)
        recording.forward()

    def take_output(self) -> Tensor:
        """As of a computed pass."""
        return self._recording.output[:, : self._tokens].clone()

    def gradients(self, grad: Tensor) -> Sequence[Tensor | None]:
        """As of a computed pass."""
        if self.done:
            raise RuntimeError("the decoder layers' backward pass runs once")
        self.done = True
        self._recording.grad.copy_(pad_tokens(grad, self._recording.grad.shape[1]))
        self._recording.backward()
        return self._recording.gradients()


def _same(others: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a layer gets the first one's arguments: the same tensors, not equal ones."""
    if others.keys() != first.keys():
        return False
    return all(
        value is first[name] or (isinstance(value, bool | int) and value == first[name])
        for name, value in others.items()
    )
