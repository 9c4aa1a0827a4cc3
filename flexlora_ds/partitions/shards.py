"""Where each parameter's training state lies, at every ZeRO stage, as one kind of map.

A parameter's piece is the run of its elements that this process holds, inside one flat tensor per state key. At stage
0 the piece is the whole parameter; at stages 1 and 2 it is the overlap of the parameter with this process's slice of
the flat group; at stage 3 it is this process's slice of the parameter itself (the last one may be padded). At every
stage the processes hold a parameter in the order of their ranks, so that a whole is their pieces in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
"""The key of the fp32 master weight, beside the optimizer's own keys (`exp_avg`, `exp_avg_sq`, `age`, …)."""

BUCKET_ELEMENTS = 1 << 24
"""How many elements one collective makes whole at most: 64 MiB of fp32, far below a layer's activations."""


@dataclass(frozen=True)
class SliceBounds:
    """How `numel` elements are shared out: process k holds those of its slice, [k · width, (k + 1) · width).

    The elements begin at `begin` of what is sliced (the flat group at stages 1 and 2, the parameter itself at stage 3).
    """

    begin: int
    numel: int
    width: int

    def run(self, process: int) -> tuple[int, int]:
        """The first element and the number of elements that a process holds; (0, 0) for none."""
        first = min(max(process * self.width - self.begin, 0), self.numel)
        last = min(max((process + 1) * self.width - self.begin, 0), self.numel)
        return (first, last - first) if last > first else (0, 0)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter, kept at `offset` of flat tensor `flat`."""

    flat: int
    offset: int
    start: int
    length: int
    bounds: SliceBounds


@dataclass
class Shards:
    """The training state that this process holds, and how to make whole tensors of it.

    `flat_tensors`: one dict per flat tensor, key -> 1-d fp32 tensor; `scalars`: per flat tensor, the state that is not
    per element (the step); `pieces`, `shapes`: by parameter; `rank`: this process within `group`; `replicated`: every
    process holds everything.
    """

    flat_tensors: list[dict[str, Tensor]]
    scalars: list[dict[str, Any]]
    pieces: dict[nn.Parameter, Piece]
    shapes: dict[nn.Parameter, tuple[int, ...]]
    device: torch.device
    group: Any = None
    world_size: int = 1
    rank: int = 0
    replicated: bool = False
    masters_are_parameters: bool = False
    low_precision: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The master's key first, then the optimizer's per-element states; the same on every process."""
        names = {key for flat in self.flat_tensors for key in flat}
        return [MASTER, *sorted(names - {MASTER})]

    def local(self, p: nn.Parameter, key: str) -> Tensor:
        """This process's piece of a parameter's state, a 1-d view."""
        piece = self.pieces[p]
        return self.flat_tensors[piece.flat][key].narrow(0, piece.offset, piece.length)

    def read(self, params: Iterable[nn.Parameter], key: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Whole tensors of one key, bucket by bucket; collective: every process asks for the same parameters.

        Yields (parameter, fp32 tensor of its shape on the engine's device). A yielded tensor may be a view of the
        state itself where this process holds all of it: clone before changing it.
        """
        for bucket in _buckets(params, self.shapes):
            if self.replicated or self.world_size == 1:
                for p in bucket:
                    yield p, self.local(p, key).view(self.shapes[p]).to(self.device)
                continue
            held = [[self.pieces[p].bounds.run(k)[1] for p in bucket] for k in range(self.world_size)]
            totals = [sum(lengths) for lengths in held]
            # On the wire a gather pads every process's share to the largest, a sum moves the whole twice.
            gather = self.world_size * max(totals) <= 2 * sum(totals)
            yield from self._gathered(bucket, key, held) if gather else self._summed(bucket, key)

    def _gathered(
        self, bucket: list[nn.Parameter], key: str, held: list[list[int]]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every process's pieces in one message, put together; `held`: elements by process and parameter."""
        from deepspeed import comm

        largest = max(sum(lengths) for lengths in held)
        own = [self.local(p, key) for p in bucket]
        padding = own[0].new_zeros(largest - sum(held[self.rank]))
        sent = torch.cat([*own, padding]).to(self.device)
        received = sent.new_empty(self.world_size * largest)
        comm.all_gather_into_tensor(received, sent, group=self.group)
        shares = received.view(self.world_size, largest)
        rows = [share[: sum(lengths)].split(lengths) for share, lengths in zip(shares, held, strict=True)]
        for i, p in enumerate(bucket):
            pieces = [row[i] for row in rows if row[i].numel()]
            yield p, (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(self.shapes[p])

    def _summed(self, bucket: list[nn.Parameter], key: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each process puts its piece into zeros; the sum over processes is the whole, exactly (x + 0 = x)."""
        from deepspeed import comm

        sizes = [_numel(self.shapes[p]) for p in bucket]
        whole = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        views = torch.split(whole, sizes)
        for p, view in zip(bucket, views, strict=True):
            piece = self.pieces[p]
            view.narrow(0, piece.start, piece.length).copy_(self.local(p, key))
        comm.all_reduce(whole, group=self.group)
        for p, view in zip(bucket, views, strict=True):
            yield p, view.view(self.shapes[p])

    def write(self, p: nn.Parameter, key: str, whole: Tensor) -> None:
        """Write a whole tensor into this process's piece; no communication.

        A master also goes, rounded, into the parameter that the model computes with.
        """
        self.write_all(key, {p: whole})

    @torch.no_grad()
    def write_all(self, key: str, wholes: Mapping[nn.Parameter, Tensor]) -> None:
        """`write` of many, which a GPU copies in a few kernels."""
        copies = [copy for p, whole in wholes.items() for copy in self._copies(p, key, whole)]
        copy_all([to for to, _ in copies], [values for _, values in copies])

    def in_place(self, p: nn.Parameter) -> Tensor | None:
        """The master itself in its parameter's shape, where this process has all of it on the engine's device."""
        alone = self.replicated or self.world_size == 1
        if not alone or p in self.low_precision:
            return None
        master = self.local(p, MASTER)
        return master.view(self.shapes[p]) if master.device == self.device else None

    def _copies(self, p: nn.Parameter, key: str, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is written where, for one whole tensor."""
        piece = self.pieces[p]
        own = whole.reshape(-1).narrow(0, piece.start, piece.length)
        yield self.local(p, key), own
        if key != MASTER or self.masters_are_parameters:
            return
        if p in self.low_precision:  # stage 3: the partition, and the gathered copy of a persistent parameter
            yield self.low_precision[p].narrow(0, 0, piece.length), own
            if p.numel() != whole.numel():
                return
        yield p.data, whole.view(p.shape)


def copy_all(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """`to[i].copy_(values[i])` for all i, in a few kernels on a GPU, where only equal dtypes go together."""
    by_dtype: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for place, value in zip(to, values, strict=True):
        places, sources = by_dtype.setdefault((place.dtype, value.dtype), ([], []))
        places.append(place)
        sources.append(value)
    for places, sources in by_dtype.values():
        torch._foreach_copy_(places, sources)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _buckets(
    params: Iterable[nn.Parameter], shapes: Mapping[nn.Parameter, tuple[int, ...]]
) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    total = 0
    for p in params:
        n = _numel(shapes[p])
        if bucket and total + n > BUCKET_ELEMENTS:
            yield bucket
            bucket, total = [], 0
        bucket.append(p)
        total += n
    if bucket:
        yield bucket


def split_state(state: Mapping[str, Any], like: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state of one flat tensor -> (per-element states, the rest), told apart by shape."""
    elements = {
        k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == like.shape and v.dim() > 0
    }
    return elements, {k: v for k, v in state.items() if k not in elements}
