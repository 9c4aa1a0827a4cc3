"""The decoupled regulariser under a live engine: it reads every P and Q from the fp32 masters, and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.orthogonality import decoupled_step, gram
from flexlora_ds.partitions import BUCKET_ELEMENTS, MASTER, Shards
from flexlora_ds.rank_changes.spectra import Grams, Master, grams_of, read_masters


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
    return grams_of(layers, found) if with_grams else None


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
