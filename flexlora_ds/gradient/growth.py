"""New directions along the gradient of the batch just trained on, at the price of thin products in its own backward.

The step before a rank change is due is sketched in one pass. So nothing has to be kept from step to step, a resumed run
collects what the uninterrupted one did, and no batch is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_shapes
from flexlora_ds.adapter.layer import AdaptedLinear, adapters, forward_context, gaussian
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.gradient.agreement import is_usable, of_first_process, summed
from flexlora_ds.gradient.collect import GradientProducts
from flexlora_ds.gradient.sketch import leading_triples, one_pass_factors, outside_of, sketch_width
from flexlora_ds.partitions import MASTER, live_shards, loss_scale
from flexlora_ds.seeds import generator


@dataclass(frozen=True)
class NewPair:
    """One direction for a matrix: unit vectors orthogonal to its others."""

    p: Tensor
    """[out, 1], fp32."""
    q: Tensor
    """[1, in], fp32."""
    sigma: float
    """The singular value of ∂L/∂W outside of the matrix's other directions."""


class StepSketch:
    """Collects the gradients of one training step, and makes directions of them."""

    def __init__(self, engine: Any, config: FlexLoRAConfig) -> None:
        self._engine = engine
        self._config = config
        self._context = forward_context(engine.module)
        self._layers: dict[str, AdaptedLinear] = adapters(engine.module)
        self._shapes = linear_shapes(engine.module, list(self._layers))
        self._products: GradientProducts | None = None
        self._scale = 1.0

    def begin(self, step: int) -> None:
        """Collect from now on, over the micro-batches of `step`."""
        right, left = {}, {}
        for name, (out, width) in self._shapes.items():
            k = sketch_width(1, out, width)
            right[name] = self._factor(step, name, "right", k, width)
            left[name] = self._factor(step, name, "left", 2 * k + 1, out).T
        self._products = GradientProducts(self._shapes, right=right, left=left)
        self._context.observer = self._products
        self._scale = loss_scale(self._engine) * self._engine.world_size

    def end(self) -> None:
        """Collect no more; what was collected stays until the next `begin`."""
        self._context.observer = None

    def pairs(self, names: Sequence[str]) -> dict[str, NewPair]:
        """A direction for each of these matrices whose gradient was finite and not zero; collective."""
        assert self._products is not None, "begin(step) comes before the step"
        left = self._products.left
        sketches = summed({name: self._products.of_right[name] for name in names})
        co_sketches = summed({name: self._products.of_left[name] for name in names})
        masters = _whole(self._engine, [self._layers[name] for name in names])
        p, q, sigma = {}, {}, {}
        for name in names:
            if not (is_usable(sketches[name]) and is_usable(co_sketches[name])):
                continue
            layer = self._layers[name]
            factors = one_pass_factors(sketches[name], co_sketches[name], left[name])
            triples = leading_triples(*outside_of(*factors, masters[layer.P], masters[layer.Q]), 1)
            p[name], q[name] = triples.left, triples.right
            sigma[name] = float(triples.sigma[0]) / self._scale
        p, q = of_first_process(p), of_first_process(q)
        return {name: NewPair(p[name], q[name], sigma[name]) for name in p}

    def _factor(self, step: int, name: str, role: str, rows: int, width: int) -> Tensor:
        rng = generator(self._config.seed, "sketch", step, name, role)
        return gaussian(rows, width, 1.0, rng).to(self._engine.device)


def _whole(engine: Any, layers: Sequence[AdaptedLinear]) -> Mapping[nn.Parameter, Tensor]:
    wanted = [p for layer in layers for p in (layer.P, layer.Q)]
    return {p: value.clone() for p, value in live_shards(engine).read(wanted, MASTER)}
