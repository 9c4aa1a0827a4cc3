"""What a decision looks at, read from the fp32 masters of a live engine: λ, Gram matrices, sensitivities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.importance import direction_sensitivity
from flexlora_ds.orthogonality import decoupled_step, gram
from flexlora_ds.partitions import BUCKET_ELEMENTS, MASTER, Shards


@dataclass(frozen=True)
class Grams:
    """PᵀP and QQᵀ of one matrix, [r, r], float64 on the CPU."""

    p: Tensor
    q: Tensor

    @property
    def violation(self) -> float:
        """Mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F."""
        eye = torch.eye(len(self.p), dtype=self.p.dtype)
        return float(torch.linalg.norm(self.p - eye) + torch.linalg.norm(self.q - eye)) / 2


def read_lambdas(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """λ of every matrix, [r], fp32 on the CPU; one small collective."""
    whole = [value for _, value in shards.read([layer.lam for layer in layers.values()], MASTER)]
    flat = torch.cat(whole).cpu()
    return dict(zip(layers, torch.split(flat, [len(value) for value in whole]), strict=True))


def read_grams(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> dict[str, Grams]:
    """The Gram matrices of every matrix; P and Q pass by in buckets and are never all whole at once."""
    masters = _read_masters(shards, layers)
    return _grams(layers, {p: gram(whole, tall=tall).double() for tall, p, whole in masters})


def read_sensitivities(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """Score of each direction, [r], from the optimizer's averages (Eqs. 5 and 6)."""
    params = [p for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)]
    scores = {}
    for (p, smooth), (_, uncertain) in zip(
        shards.read(params, "sensitivity"), shards.read(params, "uncertainty"), strict=True
    ):
        scores[p] = smooth * uncertain
    return {
        name: direction_sensitivity(scores[layer.P], scores[layer.lam], scores[layer.Q]).cpu()
        for name, layer in layers.items()
    }


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
    for tall, group in _alike(_read_masters(shards, layers), together=together):
        wholes = [whole for _, _, whole in group]
        changed: Sequence[Tensor] = (
            [decoupled_step(wholes[0], eta, tall=tall)]
            if len(wholes) == 1
            else decoupled_step(torch.stack(wholes), eta, tall=tall).unbind()
        )
        written = {p: matrix for (_, p, _), matrix in zip(group, changed, strict=True)}
        shards.write_all(MASTER, written)
        if with_grams:
            found |= {p: gram(matrix, tall=tall).double() for p, matrix in written.items()}
    return _grams(layers, found) if with_grams else None


Master = tuple[bool, nn.Parameter, Tensor]
"""Whether it is a P, which is tall; the parameter; its master."""


def _read_masters(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> Iterator[Master]:
    """All P and Q, whole, bucket by bucket."""
    tall = {layer.P for layer in layers.values()}
    for p, whole in shards.read([q for layer in layers.values() for q in (layer.P, layer.Q)], MASTER):
        yield p in tall, p, whole


def _alike(masters: Iterator[Master], *, together: bool) -> Iterator[tuple[bool, list[Master]]]:
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


def _grams(layers: Mapping[str, AdaptedLinear], found: Mapping[nn.Parameter, Tensor]) -> dict[str, Grams]:
    """By matrix and on the CPU; one copy from the device for all."""
    flat = torch.cat([gram.reshape(-1) for gram in found.values()]).cpu()
    parts = torch.split(flat, [gram.numel() for gram in found.values()])
    on_cpu = {p: part.view(found[p].shape) for p, part in zip(found, parts, strict=True)}
    return {name: Grams(on_cpu[layer.P], on_cpu[layer.Q]) for name, layer in layers.items()}
