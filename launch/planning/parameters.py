"""How many parameters a method trains, from the shapes of what it adapts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.engine.methods.adalora_calendar import initial_rank
from launch.model.skeleton import Skeleton
from launch.options.train_options import TrainOptions

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of every adapted linear layer, by module name in the order of the model."""


@dataclass(frozen=True)
class Parameters:
    """What one matrix [out, in] adds: so many numbers for each of its directions, and so many beside them."""

    beside_out_and_in: int = 0
    """Of each direction: λ or E."""
    rows: int = 0
    """For every row of the weight, whatever the rank: DoRA's lengths."""

    def of_rank(self, shapes: Shapes, rank: float) -> float:
        """Of all matrices at one rank."""
        return self.of_ranks(shapes, dict.fromkeys(shapes, rank))

    def of_ranks(self, shapes: Shapes, ranks: Mapping[str, float]) -> float:
        """Of all matrices, each at its own rank."""
        return sum(
            ranks[name] * (out + into + self.beside_out_and_in) + self.rows * out
            for name, (out, into) in shapes.items()
        )


_LORA = Parameters()
_OTHERS: Mapping[str, Parameters] = {
    "flexlora": Parameters(beside_out_and_in=1),
    "adalora": Parameters(beside_out_and_in=1),
    "dora": Parameters(rows=1),
}


def parameters_of(method: str) -> Parameters:
    """How a method with a rank counts."""
    return _OTHERS.get(method, _LORA)


def rank_at_start(options: TrainOptions) -> int:
    """The rank of every matrix before the first step."""
    return initial_rank(options.rank) if options.method == "adalora" else options.rank


def trained_at_start(options: TrainOptions, skeleton: Skeleton) -> int:
    """What the optimizer holds before the first step."""
    if options.traits.trains_base:
        return skeleton.parameters
    if skeleton.file_parameters is not None:
        return skeleton.file_parameters
    ranks = {**dict.fromkeys(skeleton.shapes, rank_at_start(options)), **skeleton.ranks}
    return int(parameters_of(options.method).of_ranks(skeleton.shapes, ranks))
