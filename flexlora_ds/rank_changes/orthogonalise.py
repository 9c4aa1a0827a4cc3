"""The decoupled regulariser under a live engine: it reads every P and Q from the fp32 masters, and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.orthogonality import decoupled_step, gram
from flexlora_ds.partitions import BUCKET_ELEMENTS, MASTER, Shards, copy_all, live_shards, whereabouts
from flexlora_ds.rank_changes.spectra import Grams, Master, grams_of, read_masters


class Orthogonaliser:
    """`orthogonalise` of an engine's adapters after every step; what it reads and writes is looked up once.

    Between two rank changes masters stay where they are. Where this process holds all of them, a step is a handful of
    kernels on a GPU for all matrices, and next to nothing of the host.
    """

    def __init__(
        self, engine: Any, layers: Mapping[str, AdaptedLinear], *, stacked: bool | None = None
    ) -> None:
        self._engine, self._layers, self._stacked = engine, layers, stacked
        self.forget()

    def forget(self) -> None:
        """Let go of the masters, before ranks change: their memory is to be freed then."""
        self._where: tuple[Any, ...] = ()
        self._shards: Shards | None = None
        self._held: list[_Held] | None = None

    @torch.no_grad()
    def step(self, eta: float, *, with_grams: bool = False) -> dict[str, Grams] | None:
        """`orthogonalise` with strength `eta`."""
        where = whereabouts(self._engine)
        if self._shards is None or where != self._where:
            self._where, self._shards = where, _of_masters(live_shards(self._engine))
            self._held = _held(self._shards, self._layers, stacked=self._stacked)
        if self._held is None:
            return orthogonalise(
                self._shards, self._layers, eta, with_grams=with_grams, stacked=self._stacked
            )
        found: dict[nn.Parameter, Tensor] = {}
        for held in self._held:
            changed = _changed(held.masters, eta, tall=held.tall)
            copy_all(held.masters, changed)
            if held.computed_with:
                copy_all(held.computed_with, changed)
            if with_grams:
                grams = (gram(matrix, tall=held.tall).double() for matrix in changed)
                found |= dict(zip(held.parameters, grams, strict=True))
        return grams_of(self._layers, found) if with_grams else None


def _of_masters(shards: Shards) -> Shards:
    """Without the optimizer's states: who loads others in their place is to free these."""
    return replace(shards, flat_tensors=[{MASTER: flat[MASTER]} for flat in shards.flat_tensors])


@dataclass(frozen=True)
class _Held:
    """P or Q of one shape that are computed together."""

    tall: bool
    parameters: list[nn.Parameter]
    masters: list[Tensor]
    computed_with: list[Tensor]
    """The rounded copies, where the masters are not themselves what the model computes with."""


def _held(shards: Shards, layers: Mapping[str, AdaptedLinear], *, stacked: bool | None) -> list[_Held] | None:
    """All P and Q in place; None where this process does not hold every master whole."""
    places: list[Master] = []
    for layer in layers.values():
        for tall, p in ((True, layer.P), (False, layer.Q)):
            master = shards.in_place(p)
            if master is None:
                return None
            places.append((tall, p, master))
    together = shards.device.type == "cuda" if stacked is None else stacked
    return [
        _Held(
            tall,
            [p for _, p, _ in group],
            [master for _, _, master in group],
            [] if shards.masters_are_parameters else [p.data for _, p, _ in group],
        )
        for tall, group in _of_one_shape(iter(places), together=together)
    ]


@torch.no_grad()
def orthogonalise(
    shards: Shards,
    layers: Mapping[str, AdaptedLinear],
    eta: float,
    *,
    with_grams: bool = False,
    stacked: bool | None = None,
) -> dict[str, Grams] | None:
    """The decoupled regulariser on the masters: P ← P − η P(PᵀP − I), Q ← Q − η (QQᵀ − I)Q, after the step.

    Every process computes the same from the whole masters and writes its own part, so it is exact at every stage.

    Args:
        with_grams: return the Gram matrices of what was written, which `read_grams` would read all masters again for.
        stacked: compute matrices of one shape together, a handful of kernels for all; None does so on a GPU. On a CPU
            the copies cost more than the calls.
    """
    together = shards.device.type == "cuda" if stacked is None else stacked
    found: dict[nn.Parameter, Tensor] = {}
    for tall, group in _of_one_shape(read_masters(shards, layers), together=together):
        changed = _changed([whole for _, _, whole in group], eta, tall=tall)
        written = {p: matrix for (_, p, _), matrix in zip(group, changed, strict=True)}
        shards.write_all(MASTER, written)
        if with_grams:
            found |= {p: gram(matrix, tall=tall).double() for p, matrix in written.items()}
    return grams_of(layers, found) if with_grams else None


def _changed(wholes: list[Tensor], eta: float, *, tall: bool) -> Sequence[Tensor]:
    if len(wholes) == 1:
        return [decoupled_step(wholes[0], eta, tall=tall)]
    return decoupled_step(torch.stack(wholes), eta, tall=tall).unbind()


def _of_one_shape(masters: Iterator[Master], *, together: bool) -> Iterator[tuple[bool, list[Master]]]:
    """Groups of one kind and shape, of a bucket's size in all at a time; every one by itself unless `together`."""
    waiting: dict[tuple[bool, torch.Size], list[Master]] = {}
    elements = 0
    for master in masters:
        tall, _, whole = master
        if not together:
            yield tall, [master]
            continue
        waiting.setdefault((tall, whole.shape), []).append(master)
        elements += whole.numel()
        if elements >= BUCKET_ELEMENTS:
            yield from ((kind, group) for (kind, _), group in waiting.items())
            waiting, elements = {}, 0
    yield from ((kind, group) for (kind, _), group in waiting.items())
