"""Go on from an adapter: a trained LoRA as P, λ and Q of adapted layers, without a change of what it computes.

ΔW = scale · B A has the decomposition U diag(σ) Vᵀ, from thin QRs of B and Aᵀ and the SVD of their small core. With
P = U, Q = Vᵀ and λ = σ / s, ΔW = s · P diag(λ) Q at the run's own scale s, and P and Q are orthonormal.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear, adapters, require_scale
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.exports.truncation import Size, decomposed, truncate
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.gradient.agreement import of_first_process
from flexlora_ds.orientation import LayerShape
from flexlora_ds.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFactors,
    LoraAdapter,
    LoraMatrix,
    require_finite_adapter,
)
from flexlora_ds.peft_reading.plain import read_peft_adapter

_OTHER = "give the base that it was trained on, or another adapter"


@dataclass(frozen=True)
class AdapterStart:
    """What the adapted layers of a model begin with."""

    ranks: Mapping[str, int]
    """Of the adapter's matrices, by module name."""
    factors: Mapping[str, AdapterFactors] = field(repr=False)
    """P [out, r], λ [r], Q [r, in] of each, fp32; process 0's count, and the others need none."""
    remarks: tuple[str, ...] = ()
    """What was left out, for the log."""
    base_model: str = ""
    """The base that the adapter says it was trained on."""
    prompt: str | None = None
    """The prompt that it was trained with, where that is known."""
    doubts: tuple[str, ...] = ()
    """What its configuration says to no effect; `start_from_adapter` warns of it."""

    def prepare(self, model: nn.Module) -> None:
        """Give the adapters of a model their ranks and values, before `deepspeed.initialize`.

        Values are rounded to the parameters' dtype; `write` gives the engine's masters the exact ones.
        """
        layers = adapters(model)
        for name, rank in self.ranks.items():
            layer = layers[name]
            for p, value in zip(_parameters(layer), self._of(name, rank, layer), strict=True):
                p.data = value.to(p.device, p.dtype)

    def write(self, engine: Any) -> None:
        """Write process 0's values into the fp32 masters; collective, at any ZeRO stage, before the first step."""
        from flexlora_ds.partitions import MASTER, live_shards

        layers = adapters(engine.module)
        shards = live_shards(engine)
        wholes: dict[nn.Parameter, Tensor] = {}
        for name, rank in self.ranks.items():
            parts = dict(zip("PλQ", self._of(name, rank, layers[name]), strict=True))
            shared = of_first_process({part: value.to(engine.device) for part, value in parts.items()})
            wholes |= dict(zip(_parameters(layers[name]), shared.values(), strict=True))
        shards.write_all(MASTER, wholes)

    def _of(self, name: str, rank: int, layer: AdaptedLinear) -> tuple[Tensor, Tensor, Tensor]:
        """A matrix's factors; zeros in a process that has not read the adapter."""
        if name in self.factors:
            return self.factors[name]
        return (
            torch.zeros(layer.out_features, rank),
            torch.zeros(rank),
            torch.zeros(rank, layer.in_features),
        )


def start_from_adapter(
    model: nn.Module, config: FlexLoRAConfig, folder: str | Path, total_rank: int | None = None
) -> AdapterStart:
    """Let the adapters of a model go on from a LoRA in PEFT's format; before `deepspeed.initialize`.

    Matrices that the LoRA does not adapt keep their beginning. Under DeepSpeed call `write(engine)` of what is returned
    next, which gives the fp32 masters the values unrounded.

    Args:
        model: with the adapters of `inject_adapters`.
        total_rank: the most directions of the LoRA to keep, of the largest singular values; None keeps all.

    Raises:
        UserError: more than plain LoRA, or one that does not fit the model. RunError: numbers that are not finite.
    """
    layers = adapters(model)
    require_scale(layers, config)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    start = read_adapter_start(Path(folder), config, shapes, total_rank)
    for doubt in start.doubts:
        warnings.warn(doubt, stacklevel=2)
    start.prepare(model)
    return start


def read_adapter_start(
    folder: Path, config: FlexLoRAConfig, shapes: Mapping[str, LayerShape], total_rank: int | None = None
) -> AdapterStart:
    """An adapter's matrices as P, λ and Q under the scale of `config`.

    Args:
        shapes: (out, in) of every layer that the model adapts.
        total_rank: as in `start_from_adapter`.

    Raises:
        UserError, RunError: as `start_from_adapter`.
    """
    adapter = read_peft_adapter(folder)
    _require_fit(adapter, shapes, folder)
    require_finite_adapter(adapter, str(folder))
    remarks: tuple[str, ...] = ()
    if total_rank is not None:
        _require_enough(total_rank, adapter, config.min_rank)
        smaller = truncate(adapter, Size(total_rank=total_rank, min_rank=config.min_rank))
        adapter, remarks = smaller.adapter, (smaller.line(),)
    factors = {n: factors_of(adapter.matrices[n], config.scaling) for n in shapes if n in adapter.matrices}
    ranks = {name: len(found.lam) for name, found in factors.items()}
    return AdapterStart(ranks, factors, remarks, adapter.base_model, adapter.prompt, adapter.doubts)


def factors_of(matrix: LoraMatrix, scaling: float) -> AdapterFactors:
    """P, λ ≥ 0 and Q, fp32, with ΔW = scaling · P diag(λ) Q; P's columns and Q's rows are orthonormal."""
    found = decomposed(matrix)
    lam = found.sigma / scaling
    return AdapterFactors(*(part.float().contiguous() for part in (found.left, lam, found.right)))


def adapter_fingerprint(folder: Path) -> str:
    """The SHA-256 of an adapter's configuration and weights, in hexadecimal, 64 + 64 digits."""
    return "".join(sha256_of(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def _parameters(layer: AdaptedLinear) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    return layer.P, layer.lam, layer.Q


def _require_fit(adapter: LoraAdapter, shapes: Mapping[str, LayerShape], folder: Path) -> None:
    """UserError naming the first matrix that the model does not adapt, or has in another shape."""
    made_for = f"; it was trained on {adapter.base_model!r}" if adapter.base_model else ""
    for name, matrix in adapter.matrices.items():
        if name not in shapes:
            raise UserError(
                f"the adapter adapts {name}, which is not among the layers to be adapted here{made_for}",
                str(folder),
                f"name it in target_modules, or {_OTHER}",
            )
        shape = (matrix.B.shape[0], matrix.A.shape[1])
        if shape != shapes[name]:
            raise UserError(
                f"{name} is {shape} in the adapter and {shapes[name]} in the base model{made_for}",
                str(folder),
                _OTHER,
            )


def _require_enough(total_rank: int, adapter: LoraAdapter, min_rank: int) -> None:
    least = sum(min(min_rank, matrix.rank) for matrix in adapter.matrices.values())
    if total_rank < least:
        raise UserError(
            f"a budget of {total_rank:,} directions is below rank {min_rank} in every matrix, which is {least:,}",
            mend=f"give at least {least:,}",
        )
