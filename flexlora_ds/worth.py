"""What directions are worth: the rise of a loss when they are taken out of a live model for a moment.

|λ| says little of it, for useful directions may stay smaller than their elders. Leaving out a part and measuring the
loss again is the oldest measure of its worth (optimal brain damage, LeCun et al. 1990, approximates it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flexlora_ds.adapter.layer import adapters
from flexlora_ds.errors import UserError
from flexlora_ds.partitions import MASTER, live_shards

Directions = Mapping[str, Sequence[int]]
"""By matrix, the indices of some of its directions."""


@contextmanager
def without(engine: Any, directions: Directions) -> Iterator[None]:
    """The model without these directions while the context lasts: their λ is 0; collective, at any ZeRO stage.

    Afterwards, also after an error, every bit of the masters and of what the model computes with is as before. The
    optimizer's state is never touched.

    Raises:
        UserError: a matrix or a direction that the model has not.
    """
    layers = adapters(engine.module)
    for name, indices in directions.items():
        if name not in layers or any(not 0 <= i < layers[name].rank for i in indices):
            there = f"it has {layers[name].rank}" if name in layers else "there is no such matrix"
            raise UserError(
                f"no direction {list(indices)} of {name}", there, "take those of RankController.births"
            )
    shards = live_shards(engine)
    read = shards.read([layers[name].lam for name in directions], MASTER)
    whole = {p: value.clone() for p, value in read}
    reduced = {p: value.clone() for p, value in whole.items()}
    for name, indices in directions.items():
        lam = reduced[layers[name].lam]
        lam[torch.tensor(list(indices), dtype=torch.long, device=lam.device)] = 0.0
    shards.write_all(MASTER, reduced)
    try:
        yield
    finally:
        shards.write_all(MASTER, whole)


def rises_without(
    engine: Any, groups: Iterable[Directions], validate: Callable[[], float], loss: float | None = None
) -> list[float]:
    """By how much the loss rises without each group of directions; collective.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage.
        groups: one validation each; a direction may be in several.
        validate: a loss that is the same on every process.
        loss: that of the whole model; None computes it first.
    """
    whole = validate() if loss is None else loss
    rises = []
    for group in groups:
        with without(engine, group):
            rises.append(validate() - whole)
    return rises


def by_birth(births: Mapping[str, Sequence[tuple[int, int]]]) -> dict[int, dict[str, list[int]]]:
    """The living directions that were born after the start: by step of their change, by matrix, their indices.

    Args:
        births: `RankController.births`.
    """
    found: dict[int, dict[str, list[int]]] = {}
    for name, of_matrix in births.items():
        for index, (step, _) in enumerate(of_matrix):
            if step:
                found.setdefault(step, {}).setdefault(name, []).append(index)
    return dict(sorted(found.items()))


def together(groups: Iterable[Directions]) -> dict[str, list[int]]:
    """Several groups as one."""
    joined: dict[str, set[int]] = {}
    for group in groups:
        for name, indices in group.items():
            joined.setdefault(name, set()).update(indices)
    return {name: sorted(indices) for name, indices in joined.items()}
