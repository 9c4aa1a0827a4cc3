"""New directions along the gradient of the batch just trained on, at the price of thin products in its own backward.

The step before a rank change is due is sketched in one pass. So nothing has to be kept from step to step, a resumed run
collects what the uninterrupted one did, and no batch is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_shapes
from flexlora_ds.adapter.layer import AdaptedLinear, adapters, forward_context, gaussian
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.gradient.agreement import is_usable, of_first_process, summed
from flexlora_ds.gradient.collect import FoldedProducts
from flexlora_ds.gradient.sketch import Growth, growth_of, one_pass_factors, outside_of, sketch_width
from flexlora_ds.partitions import MASTER, live_shards, loss_scale
from flexlora_ds.rounding import ceil_div
from flexlora_ds.seeds import generator

FOLDS = 4
"""Parts of a step's records, for the estimate on fresh ones: fewer say less of the spread, more cost memory."""


class StepSketch:
    """Collects the gradients of one training step, and makes directions of them."""

    def __init__(self, engine: Any, config: FlexLoRAConfig) -> None:
        self._engine = engine
        self._config = config
        self._of_living = config.importance == "growth"
        self._context = forward_context(engine.module)
        self._context.renew = self._begin_again
        self._step = 0
        self._layers: dict[str, AdaptedLinear] = adapters(engine.module)
        self._shapes = linear_shapes(engine.module, list(self._layers))
        self._columns: dict[str, int] = {}
        self._left: dict[str, Tensor] = {}
        self._products: FoldedProducts | None = None
        self._scale = 1.0
        self._places: tuple[tuple[int, int, int], Tensor] | None = None

    def begin(self, step: int) -> None:
        """Collect from now on, over the micro-batches of `step`; collective where the living directions are priced."""
        self._step = step
        right, left = {}, {}
        masters = _whole(self._engine, list(self._layers.values())) if self._of_living else {}
        for name, (out, width) in self._shapes.items():
            k = ceil_div(sketch_width(1, out, width), FOLDS)
            self._columns[name] = k
            right[name] = self._factor(step, name, "right", k, width)
            if masters:
                right[name] = torch.cat([right[name], masters[self._layers[name].Q]])
            left[name] = self._factor(step, name, "left", 2 * FOLDS * k + 1, out).T
        self._left = {name: masters[layer.P] for name, layer in self._layers.items()} if masters else {}
        self._products = FoldedProducts(self._shapes, right, left, FOLDS, self._folds_of)
        self._context.observer = self._products
        self._scale = loss_scale(self._engine) * self._engine.world_size

    def _begin_again(self) -> None:
        """Where P and Q were written between `begin` and the step, as a start from the gradient does."""
        if self._products is not None and self._context.observer is self._products:
            self.begin(self._step)

    def end(self) -> None:
        """Collect no more; what was collected stays until the next `begin`."""
        self._context.observer = None

    def growths(self, names: Sequence[str]) -> dict[str, Growth]:
        """The best new direction of each matrix whose gradient was finite and not zero; collective.

        p and q are orthogonal to the matrix's other directions; σ, `fresh` and `error` are those of ∂L/∂W.
        """
        assert self._products is not None, "begin(step) comes before the step"
        masters = _whole(self._engine, [self._layers[name] for name in names])
        found = {}
        for name in names:  # one at a time: the products of all matrices together are some hundred megabytes
            growth = self._growth(name, masters[self._layers[name].P], masters[self._layers[name].Q])
            if growth is not None:
                found[name] = growth
        return self._of_first_process(found)

    def _growth(self, name: str, p: Tensor, q: Tensor) -> Growth | None:
        assert self._products is not None
        sketch = self._products.of_right(name)[:, :, : self._columns[name]]
        summed_up = summed({"sketch": sketch, "co_sketch": self._products.of_left(name)})
        if not all(is_usable(value) for value in summed_up.values()):
            return None
        columns = torch.cat(list(summed_up["sketch"]), 1)
        factors = one_pass_factors(columns, summed_up["co_sketch"], self._products.left[name])
        return growth_of(*outside_of(*factors, p, q))

    def living(self) -> dict[str, Tensor]:
        """pᵢᵀ G qᵢ of every direction that the step began with, by part of its records, [parts, r]; collective.

        Float64 on the CPU. Times the scale s it is ∂L/∂λ, before any clipping. Only with `importance: growth`.
        """
        assert self._products is not None and self._left, "begin(step) comes before the step"
        along = {
            name: torch.einsum("aor,or->ar", self._products.of_right(name)[:, :, self._columns[name] :], P)
            for name, P in self._left.items()
        }
        return {name: value.double().cpu() / self._scale for name, value in summed(along).items()}

    def _of_first_process(self, found: Mapping[str, Growth]) -> dict[str, Growth]:
        """Without the loss's scale, and the same to the bit on every process."""
        left = of_first_process({name: growth.left for name, growth in found.items()})
        right = of_first_process({name: growth.right for name, growth in found.items()})
        numbers = of_first_process(
            {
                name: torch.tensor([growth.sigma, growth.fresh, growth.error], dtype=torch.float64).to(
                    growth.left.device
                )
                / self._scale
                for name, growth in found.items()
            }
        )
        return {name: Growth(left[name], right[name], *numbers[name].tolist()) for name in found}

    def _folds_of(self, x: Tensor) -> Tensor:
        """The part of the records that each row of a layer's input [..., in] belongs to.

        As the trainer says (`ForwardContext.row_folds`), else by place.
        """
        rows = x.numel() // x.shape[-1]
        said = self._context.row_folds
        if said is not None and said.numel() == rows:
            return said
        engine, records = self._engine, len(x) if x.dim() > 2 else 0
        micro_step = engine.micro_steps % engine.gradient_accumulation_steps()
        key = (rows, records, micro_step)
        if self._places is None or self._places[0] != key:
            first = (micro_step * engine.world_size + engine.global_rank) * records
            self._places = key, folds_by_place(rows, records, first, x.device)
        return self._places[1]

    def _factor(self, step: int, name: str, role: str, rows: int, width: int) -> Tensor:
        rng = generator(self._config.seed, "sketch", step, name, role)
        return gaussian(rows, width, 1.0, rng).to(self._engine.device)


def folds_by_place(rows: int, records: int, first: int, device: torch.device) -> Tensor:
    """The part of the records that each row is in, int64 [rows]: the records in turn, or without records in runs.

    Args:
        records: how many records of equal length the rows are; 0 where rows do not tell (an expert's tokens).
        first: the number of the first of them in the global batch.
    """
    places = torch.arange(rows, device=device)
    return (places // (rows // records) + first) % FOLDS if records else places * FOLDS // rows


def _whole(engine: Any, layers: Sequence[AdaptedLinear]) -> Mapping[nn.Parameter, Tensor]:
    wanted = [p for layer in layers for p in (layer.P, layer.Q)]
    return {p: value.clone() for p, value in live_shards(engine).read(wanted, MASTER)}
