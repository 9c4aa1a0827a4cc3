"""What a decision looks at, read from the fp32 masters of a live engine: λ, Gram matrices, sensitivities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.importance import direction_sensitivity, exact_spectrum
from flexlora_ds.orthogonality import gram
from flexlora_ds.partitions import MASTER, Shards


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


@dataclass(frozen=True)
class MatrixView:
    """One adapted matrix as a decision looks at it: whole values on the CPU, the same on every process."""

    name: str
    shape: tuple[int, int]
    """(out, in)."""
    lam: Tensor
    """λ, [r], fp32."""
    grams: Grams
    mature: Tensor
    """The directions that count and may be pruned (`grace`), a boolean [r]."""
    sensitivity: Tensor | None = None
    """Score of each direction, [r], where the metric is `sensitivity`."""

    @cached_property
    def exact(self) -> Tensor:
        """The true singular values of P diag(λ) Q, [r], descending, float64."""
        return exact_spectrum(self.grams.p, self.grams.q, self.lam)

    def mature_exact(self) -> Tensor:
        """The true singular values of the mature directions alone."""
        keep = self.mature
        return exact_spectrum(self.grams.p[keep][:, keep], self.grams.q[keep][:, keep], self.lam[keep])


def read_matrices(
    shards: Shards,
    layers: Mapping[str, AdaptedLinear],
    mature: Mapping[str, list[bool]],
    *,
    grams: Mapping[str, Grams] | None = None,
    with_sensitivity: bool = False,
) -> dict[str, MatrixView]:
    """What a decision looks at, matrix by matrix, in module order; collective.

    Args:
        mature: the directions at least `grace` changes old.
        grams: the Gram matrices of the masters as they are now, where they are known already.
    """
    lambdas = read_lambdas(shards, layers)
    known = grams or read_grams(shards, layers)
    sensitivities = read_sensitivities(shards, layers) if with_sensitivity else {}
    return {
        name: MatrixView(
            name,
            (layer.out_features, layer.in_features),
            lambdas[name],
            known[name],
            torch.tensor(mature[name]),
            sensitivities.get(name),
        )
        for name, layer in layers.items()
    }


def read_lambdas(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """λ of every matrix, [r], fp32 on the CPU; one small collective."""
    whole = [value for _, value in shards.read([layer.lam for layer in layers.values()], MASTER)]
    flat = torch.cat(whole).cpu()
    return dict(zip(layers, torch.split(flat, [len(value) for value in whole]), strict=True))


def read_grams(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> dict[str, Grams]:
    """The Gram matrices of every matrix; P and Q pass by in buckets and are never all whole at once."""
    masters = read_masters(shards, layers)
    return grams_of(layers, {p: gram(whole, tall=tall).double() for tall, p, whole in masters})


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


Master = tuple[bool, nn.Parameter, Tensor]
"""Whether it is a P, which is tall; the parameter; its master."""


def read_masters(shards: Shards, layers: Mapping[str, AdaptedLinear]) -> Iterator[Master]:
    """All P and Q, whole, bucket by bucket."""
    tall = {layer.P for layer in layers.values()}
    for p, whole in shards.read([q for layer in layers.values() for q in (layer.P, layer.Q)], MASTER):
        yield p in tall, p, whole


def grams_of(layers: Mapping[str, AdaptedLinear], found: Mapping[nn.Parameter, Tensor]) -> dict[str, Grams]:
    """Gram matrices by matrix and on the CPU; one copy from the device for all."""
    flat = torch.cat([gram.reshape(-1) for gram in found.values()]).cpu()
    parts = torch.split(flat, [gram.numel() for gram in found.values()])
    on_cpu = {p: part.view(found[p].shape) for p, part in zip(found, parts, strict=True)}
    return {name: Grams(on_cpu[layer.P], on_cpu[layer.Q]) for name, layer in layers.items()}
