"""Begin with the directions along which the loss falls fastest, without changing the model's output.

With λ = 0 a direction (p, q) learns through ∂L/∂λ = s · pᵀ G q alone, G = ∂L/∂W. Among unit vectors that is largest
for the top singular pair of G, where it is s · σ₁ (LoRA-GA, Wang et al. 2024, starts plain LoRA from the same pairs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_shapes
from flexlora_ds.adapter.layer import AdaptedLinear, adapters, forward_context, gaussian
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.gradient.agreement import is_usable, of_first_process, summed
from flexlora_ds.gradient.collect import GradientProducts, collecting
from flexlora_ds.gradient.sketch import Triples, leading_triples, range_basis, sketch_width
from flexlora_ds.partitions import MASTER, TorchEngine, live_shards
from flexlora_ds.seeds import generator

Losses = Callable[[], Iterable[Tensor]]
"""Called once per pass: yields this process's losses, which sum over processes to the loss of the gradient wanted."""

HALF_SCALE = 1024.0
"""What fp16 losses are multiplied by, so that small gradients do not vanish; the products are divided by it."""


@dataclass(frozen=True)
class GradientStart:
    """What a start from the gradient found."""

    sigma: Mapping[str, list[float]]
    """By matrix, the singular values of ∂L/∂W along its directions, descending."""
    gaussian: tuple[str, ...]
    """The matrices that keep their Gaussian directions: their gradient was zero or not finite."""


def start_from_gradient(engine: Any, config: FlexLoRAConfig, losses: Losses) -> GradientStart:
    """Give every matrix the leading singular pairs of its gradient as P and Q; λ is 0, and stays so. Collective.

    Two passes over the same batches: G Ωᵀ, then Uᵀ G. Before the first step, at any ZeRO stage. No
    parameter gets a gradient and no step is taken. A matrix whose gradient is zero or not finite keeps what it has.

    Args:
        engine: the DeepSpeed engine, or a `TorchEngine`, whose `module` computes the losses; or, in one process, the
            model itself.
        losses: the same losses at every call.

    Raises:
        UserError: a λ is not 0, so that other P and Q would change the model's output; or the model stands alone,
            without an engine, in one of several processes.
    """
    model = _model_of(engine)
    layers = adapters(model)
    _require_zero(engine, layers)
    shapes = linear_shapes(model, list(layers))
    factors = {name: _gaussian_factor(layer, config) for name, layer in layers.items()}
    first = GradientProducts(shapes, right=factors)
    _pass(model, first, losses)
    sketches = summed(first.of_right)
    bases = of_first_process({name: range_basis(s) for name, s in sketches.items() if is_usable(s)})
    second = GradientProducts(shapes, left=bases)
    if bases:
        _pass(model, second, losses)
    scale = _scale(model)
    found = {
        name: leading_triples(bases[name], product / scale, layers[name].rank)
        for name, product in summed(second.of_left).items()
        if is_usable(product)
    }
    _write(engine, layers, found)
    if (renew := forward_context(model).renew) is not None:
        renew()
    sigma = {name: triples.sigma.tolist() for name, triples in found.items()}
    return GradientStart(sigma, tuple(name for name in layers if name not in found))


def _require_zero(engine: Any, layers: Mapping[str, AdaptedLinear]) -> None:
    """UserError naming the first matrix that has learnt something; the same on all processes."""
    names = {layer.lam: name for name, layer in layers.items()}
    wholes = (
        live_shards(engine).read(list(names), MASTER)
        if _has_engine(engine)
        else zip(names, names, strict=True)
    )
    learnt = [names[p] for p, value in wholes if bool(value.any())]
    if learnt:
        more = f", nor in {len(learnt) - 1} more" if len(learnt) > 1 else ""
        raise UserError(
            f"λ is not 0 in {learnt[0]}{more}: with other P and Q the model would compute something else",
            "start_from_gradient",
            "call it before the first step, on adapters that begin anew",
        )


def _gaussian_factor(layer: AdaptedLinear, config: FlexLoRAConfig) -> Tensor:
    """Ω, [k, in]."""
    width = sketch_width(layer.rank, layer.out_features, layer.in_features)
    return gaussian(width, layer.in_features, 1.0, generator(config.seed, "sketch", layer.name)).to(
        layer.P.device
    )


def _pass(model: nn.Module, products: GradientProducts, losses: Losses) -> None:
    """One backward for each of this process's losses."""
    with collecting(model, products):
        for loss in losses():
            (loss * _scale(model)).backward()  # type: ignore[no-untyped-call]


def _scale(model: nn.Module) -> float:
    half = any(layer.P.dtype == torch.float16 for layer in adapters(model).values())
    return HALF_SCALE if half else 1.0


def _write(engine: Any, layers: Mapping[str, AdaptedLinear], found: Mapping[str, Triples]) -> None:
    """Process 0's pairs into the masters of all."""
    left = of_first_process({name: triples.left for name, triples in found.items()})
    right = of_first_process({name: triples.right for name, triples in found.items()})
    pairs = {layers[name].P: left[name] for name in found} | {layers[name].Q: right[name] for name in found}
    if _has_engine(engine):
        live_shards(engine).write_all(MASTER, pairs)
        return
    for p, value in pairs.items():
        p.data.copy_(value)


def _has_engine(engine: Any) -> bool:
    return isinstance(engine, TorchEngine) or hasattr(engine, "zero_optimization_stage")


def _model_of(engine: Any) -> nn.Module:
    if _has_engine(engine):
        model: nn.Module = engine.module
        return model
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            "a model without an engine, in one of several processes", "start_from_gradient", "give the engine"
        )
    bare: nn.Module = engine
    return bare
