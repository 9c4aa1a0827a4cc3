"""PEFT's PiSSA and OLoRA: LoRA that begins with a part of the base's own weights, which leaves the base.

| method | W, [out, in] | A₀ and B₀, over the scale s | |
|---|---|---|---|
| `pissa` | U Σ Vᵀ | √Σ Vᵀ and U √Σ of the r leading triples | Meng et al. 2024, arXiv 2404.02948 |
| `olora` | Q R | the first r rows of R and columns of Q, not over s | Büyükakyüz 2024, arXiv 2406.01775 |

PEFT (0.21) computes both. Its product is taken out in fp32 of A₀ and B₀ as they are trained, in the model's dtype;
PEFT takes it out before it rounds them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexlora_ds.errors import UserError
from flexlora_ds.orientation import LayerShape, is_transposed
from launch.engine.methods.changed_base import ChangedBase, lora_layers, pair_of, take_out, whole_base
from launch.engine.methods.protocol import Beginning
from launch.options.train_options import TrainOptions


class WeightStart(ChangedBase):
    """What the two share."""

    @abstractmethod
    def factorise(self, layer: Any) -> None:
        """Let PEFT write A₀ and B₀ of the layer's weight, which it changes."""

    def begin(self, model: nn.Module, beginning: Beginning) -> nn.Module:
        """Factorise one weight after another."""
        wrapped = self.wrapped(model)
        for _, layer in lora_layers(wrapped):
            with whole_base(layer):
                self._begin_layer(layer)
        self.remarks.append(f"{type(self).__name__} from the base's own weights")
        return wrapped

    @torch.no_grad()
    def _begin_layer(self, layer: Any) -> None:
        from deepspeed import comm

        base, pair = layer.get_base_layer().weight, pair_of(layer)
        original, dtypes = base.detach().clone(), [p.dtype for p in pair]
        self.factorise(layer)
        for p, dtype in zip(pair, dtypes, strict=True):
            p.data = p.data.to(dtype).contiguous()
            # Process 0's for all: another processor's linear algebra may flip a sign.
            comm.broadcast(p.data, 0)
        base.data = original
        take_out(layer)


class PiSSA(WeightStart):
    """The leading singular triples of every weight."""

    def factorise(self, layer: Any) -> None:
        """By the exact singular value decomposition."""
        layer.pissa_init("default", "pissa")


class OLoRA(WeightStart):
    """The beginning of every weight's QR factorisation."""

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Refuse what PEFT would factorise the wrong way round.

        Raises:
            UserError: a layer stores its weight as [in, out].
        """
        for name in self.matrices:
            if is_transposed(model.get_submodule(name)):
                raise UserError(
                    f"method olora takes weights that are [out, in]; {name} is a Conv1D, [in, out]",
                    self.options.place("method"),
                    "choose pissa",
                )
        return super().wrapped(model)

    def factorise(self, layer: Any) -> None:
        """By torch's QR."""
        layer.olora_init("default")


def require_rank(options: TrainOptions, stage: int, shapes: Mapping[str, LayerShape]) -> None:
    """See that every weight has as many singular triples as the rank.

    Raises:
        UserError: one has fewer.
    """
    for name, shape in shapes.items():
        if options.rank > min(shape):
            raise UserError(
                f"method {options.method} takes rank = {options.rank} directions of {name}, which has {min(shape)}",
                options.place("rank"),
                "lower rank",
            )
