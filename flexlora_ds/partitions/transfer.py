"""Carry every training state out of an old layout into the one that a rebuild has made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexlora_ds.partitions.layout import allocate, flat_masters, live_shards, stage_of
from flexlora_ds.partitions.shards import Piece, Shards


class Edit(Protocol):
    """How one parameter changes."""

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The new shape."""

    def __call__(self, whole: Tensor, key: str) -> Tensor:
        """The new whole tensor of state `key` (fp32), the same on every process."""


@torch.no_grad()
def write_back(engine: Any, edits: Mapping[nn.Parameter, Edit], old: Shards) -> None:
    """Carry every key into the engine's present layout, one key at a time; collective.

    What stays in the same process is copied there. Only the resized parameters, and at stages 1 and 2 those that
    another process holds now in part, are made whole.
    """
    for key in old.keys:
        allocate(engine, key)
    new = live_shards(engine)
    kept = [p for p in old.pieces if p not in edits and _stays(old, new, p)]
    runs = _runs((old.pieces[p], new.pieces[p]) for p in kept)
    staying = set(kept)
    moved = [p for p in old.pieces if p not in staying]
    for key in old.keys:
        for run in runs:
            run.copy(old, new, key)
        for p, whole in old.read(moved, key):
            new.write(p, key, edits[p](whole, key) if p in edits else whole)
    _write_scalars(engine, old, new)


def _stays(old: Shards, new: Shards, p: nn.Parameter) -> bool:
    """Whether every process holds the same elements of a parameter as before."""
    one, other = old.pieces[p].bounds, new.pieces[p].bounds
    return one == other or all(one.run(k) == other.run(k) for k in range(old.world_size))


@dataclass
class _Run:
    """Elements that are contiguous in both layouts."""

    source: Piece
    target: Piece
    length: int

    def copy(self, old: Shards, new: Shards, key: str) -> None:
        """Copy one key's elements."""
        source = old.flat_tensors[self.source.flat][key].narrow(0, self.source.offset, self.length)
        target = new.flat_tensors[self.target.flat][key].narrow(0, self.target.offset, self.length)
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)

    def goes_on_with(self, source: Piece, target: Piece) -> bool:
        """Whether these pieces follow at once in both layouts."""
        return (self.source.flat, self.target.flat) == (source.flat, target.flat) and (
            self.source.offset + self.length,
            self.target.offset + self.length,
        ) == (source.offset, target.offset)


def _runs(pieces: Iterable[tuple[Piece, Piece]]) -> list[_Run]:
    """Pieces by old and new place, joined where they follow each other in both."""
    runs: list[_Run] = []
    for source, target in pieces:
        if not source.length:
            continue
        if runs and runs[-1].goes_on_with(source, target):
            runs[-1].length += source.length
        else:
            runs.append(_Run(source, target, source.length))
    return runs


def _write_scalars(engine: Any, old: Shards, new: Shards) -> None:
    """The step and whatever else is not per element: each flat takes it from the first parameter in it."""
    first: dict[int, nn.Parameter] = {}
    for p, piece in new.pieces.items():
        first.setdefault(piece.flat, p)
    for i, master in enumerate(flat_masters(engine)):
        scalars = old.scalars[old.pieces[first[i]].flat]
        state = engine.basic_optimizer.state
        if scalars or master in state:
            state[master].update({k: v.clone() if torch.is_tensor(v) else v for k, v in scalars.items()})
    if stage_of(engine) in (1, 2) and len(old.keys) > 1:
        engine.optimizer._lazy_init_hp_params_optimizer_state()
