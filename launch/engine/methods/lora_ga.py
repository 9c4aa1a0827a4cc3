"""PEFT's LoRA-GA: LoRA that begins along the gradient, on a base from which that beginning is taken out.

PEFT (0.21) computes it, at its default settings: G, the mean gradient of the first batches, U S Vᵀ its leading 2r
singular triples; A₀ = Vᵀ's first r rows, B₀ = U S's other r columns (`ArB2r`), times out^¼ / √16 (`stable`). The base
becomes W − s B₀A₀ (Wang, Yu, Li 2024, LoRA-GA, arXiv 2407.05000).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexlora_ds.errors import UserError
from flexlora_ds.orientation import LayerShape
from flexlora_ds.terminal.counted import counted
from launch.engine.first_batches import FirstBatches
from launch.engine.methods.changed_base import ChangedBase, lora_layers, pair_of
from launch.engine.methods.protocol import Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from peft import LoraConfig

GRADIENT = "_peft_loraga_grad"
"""Where PEFT keeps a layer's gradient until it has made A and B of it."""
HALF_SCALE = 1024.0
"""What fp16 losses are multiplied by, so that small gradients do not vanish; the gradients are divided by it."""


def require_possible(options: TrainOptions, stage: int, shapes: Mapping[str, LayerShape]) -> None:
    """See that a run can begin so, before a weight is loaded.

    Raises:
        UserError: ZeRO-3, or a layer that has fewer than 2 · rank singular pairs.
    """
    if stage == 3:
        raise UserError(
            "method lora_ga needs ZeRO-0, 1 or 2: it takes the gradient of whole weights",
            options.place("method"),
            "choose a DeepSpeed JSON of one of these",
        )
    for name, shape in shapes.items():
        if 2 * options.rank > min(shape):
            raise UserError(
                f"method lora_ga takes 2 · rank = {2 * options.rank} singular pairs, {name} has {min(shape)}",
                options.place("rank"),
                "lower rank",
            )


class LoraGA(ChangedBase):
    """PEFT's LoRA-GA, under the same loop, data and loss."""

    def peft_config(self) -> LoraConfig:
        """With PEFT's defaults of LoRA-GA."""
        from peft import LoraGAConfig

        return self.lora_config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def begin(self, model: nn.Module, beginning: Beginning) -> nn.Module:
        """Along the gradient of the first batches."""
        assert beginning.batches is not None, "LoRA-GA begins with the gradient of batches"
        self._estimate(model, beginning.batches)
        wrapped = self.wrapped(model)
        _agree(wrapped)
        return wrapped

    def _estimate(self, model: nn.Module, batches: FirstBatches) -> None:
        """Leave at every layer the gradient of the mean loss, the same on all processes; collective."""
        from peft.tuners.lora.loraga import preprocess_loraga

        half = any(p.dtype == torch.float16 for p in model.parameters())
        scale = HALF_SCALE if half else 1.0
        # PEFT divides a layer's sum by the number of its backward passes.
        weight = scale * batches.micro_batches

        def train_step() -> None:
            for loss in batches.losses(model):
                (loss * weight).backward()  # type: ignore[no-untyped-call]

        with warnings.catch_warnings():
            # The first layer's input needs no gradient; PEFT's hook counts its passes all the same.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            preprocess_loraga(model, self.peft_config(), train_step)
        without = [n for n in self.matrices if not _share_gradient(model.get_submodule(n), scale)]
        self.remarks.append(f"LoRA-GA from the gradient of {counted(batches.records, 'record')}")
        self.doubts += batches.shortage()
        if without:
            self.doubts.append(
                f"no finite gradient but zero: {len(without)} matrices begin as plain LoRA ({without[0]})"
            )


def _share_gradient(layer: Any, scale: float) -> bool:
    """Sum a layer's gradient over the processes, in fp32; False, and no gradient, where it is of no use."""
    from deepspeed import comm

    found = getattr(layer, GRADIENT, None)
    whole = torch.zeros_like(layer.weight, dtype=torch.float32) if found is None else found.float()
    comm.all_reduce(whole)
    usable = bool(torch.isfinite(whole).all()) and bool(whole.any())
    if usable:
        setattr(layer, GRADIENT, whole / scale)
    elif found is not None:
        delattr(layer, GRADIENT)
    return usable


def _agree(wrapped: nn.Module) -> None:
    """Process 0's A₀, B₀ and base for all: another processor's linear algebra may flip a sign."""
    from deepspeed import comm

    with torch.no_grad():
        for _, layer in lora_layers(wrapped):
            for p in (*pair_of(layer), layer.get_base_layer().weight):
                p.data = p.data.contiguous()
                comm.broadcast(p.data, 0)
