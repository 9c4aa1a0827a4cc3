"""One way to train, in an engine of its own: how it takes a step, and what the step took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import AdaLoRA, FrozenBase, PlainSVD
from benchmarks.shapes import SHAPES, copy_sharing_weights
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.partitions.fewer_launches import spare_launches
from launch.data.batch_layout import batch_layout
from launch.data.batches import MicroBatch, collate, pack
from launch.data.examples import Example
from launch.distributed.process import world_size_of_environment
from launch.engine.adam import adam_settings
from launch.engine.ds_config import resolve_ds_config
from launch.engine.ds_json import read_ds_json
from launch.engine.methods.flexlora import FlexLoRA
from launch.engine.methods.peft_lora import PeftLoRA
from launch.model.compiled_blocks import compile_blocks
from launch.model.head_loss import install_head_loss
from launch.model.liger import apply_liger
from launch.model.token_loss import Head, head_of, token_loss
from launch.options.train_options import TrainOptions

STEPS = 10**6  # of the schedules: nothing ends during a measurement


@dataclass(frozen=True)
class Kind:
    """A contender before it is built."""

    name: str
    method: Callable[[TrainOptions], Any]
    changes: bool = False
    """Ranks change every k steps."""
    packed: bool = False
    """Examples are packed; all others pad to a multiple of 8."""
    full_logits: bool = False
    """Logits at every position, as transformers' own loss computes them; all others where there are targets."""
    liger: bool = False
    """The base's element-wise pieces as Liger's kernels."""
    stock: bool = False
    """DeepSpeed looks at gradients one by one, as it comes."""
    compiled: bool = False
    """Every decoder layer compiled whole; not beside `liger`."""
    replayed: bool = False
    """Compiled layers replayed as CUDA graphs where a length comes again."""


LORA = "PEFT LoRA"
KINDS = (
    Kind("frozen base", FrozenBase),
    Kind(LORA, PeftLoRA),
    Kind("PEFT AdaLoRA", AdaLoRA),
    Kind("plain SVD form", PlainSVD),
    Kind("FlexLoRA fixed ranks", FlexLoRA),
    Kind("FlexLoRA rank changes", FlexLoRA, changes=True),
    Kind("FlexLoRA packed", FlexLoRA, packed=True),
    Kind("reference recipe", PeftLoRA, full_logits=True),
)
"""The last is PEFT LoRA under full logits: with `FlexLoRA packed` it makes the comparison of the two recipes."""


@dataclass
class Took:
    """What each counted step took; lists over steps."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads of the process: what a busy machine leaves as it is."""
    input: list[float] = field(default_factory=list)
    """Seconds in which the records become a batch; a training run does it beside the step (`launch.data.prefetch`)."""
    after_update: list[float] = field(default_factory=list)
    """Seconds in `after_step`: the regulariser, and a rank change where there is one."""
    changes: list[float] = field(default_factory=list)
    """Seconds of each rank change."""
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Contender:
    """An engine around a model that shares its frozen weights with the others."""

    def __init__(
        self, kind: Kind, base: Any, options: TrainOptions, change_every: int, device: torch.device
    ) -> None:
        import deepspeed

        self.kind, self.device, self.took = kind, device, Took()
        calendar = {
            "adjust_start": 0,
            "adjust_freeze": 0,
            "adjust_interval": change_every,
            "schedule": "constant",
        }
        options = options.replace(**(calendar if kind.changes else {"adjust_size": 0}))
        self.method = kind.method(options)
        copy = copy_sharing_weights(base)
        install_head_loss(copy)
        if kind.liger:
            apply_liger(copy)
        model = self.method.adapt(copy).train()
        if kind.compiled:
            compile_blocks(model, replayed=kind.replayed)
        world_size = world_size_of_environment()
        source, layout = read_ds_json(options.ds), batch_layout(options, world_size)
        assert options.dtype != "auto"
        config = resolve_ds_config(
            source, options, layout, options.dtype, hidden_size=base.config.hidden_size
        )
        optimizer = self.method.optimizer(model, adam_settings(source, options))
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if not kind.stock:
            spare_launches(self.engine)
        self.method.attach(self.engine, STEPS, None)
        self.head = Head() if kind.full_logits else head_of(self.engine.module)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad
        )

    def step(self, number: int, rows: list[Example], *, counted: bool) -> None:
        """One update on these records, from the records to the end of what follows the update."""
        started, cpu = self._now(), time.process_time()
        batch = self.batch_of(rows, number)
        batched = time.perf_counter()
        loss = self.update(batch)
        updated = self._now()
        change = self.method.after_step(number)
        ended, cpu_ended = self._now(), time.process_time()
        if not counted:
            return
        took = self.took
        took.seconds.append(ended - started)
        took.cpu_seconds.append(cpu_ended - cpu)
        took.input.append(batched - started)
        took.after_update.append(ended - updated)
        took.tokens.append(batch.tokens)
        took.losses.append(float(loss.detach()))
        if change is not None:
            took.changes.append(change.seconds)

    def update(self, batch: MicroBatch) -> Tensor:
        """Forward and backward pass and the optimizer's step; the loss, for which nothing has waited."""
        self.method.before_forward(batch, self.device)
        loss = token_loss(self.engine, batch, self.device, self.head) / batch.target_tokens
        self.engine.backward(self._regularised(loss))
        self.engine.step()
        return loss.detach()

    def batch_of(self, rows: list[Example], number: int) -> MicroBatch:
        """The records as this contender takes them."""
        if self.kind.packed:
            return pack(rows, seed=0, step=number)
        return collate(rows, pad_token_id=0, seed=0, step=number)

    def _regularised(self, loss: Tensor) -> Tensor:
        term = self.method.regulariser() if hasattr(self.method, "regulariser") else None
        return loss if term is None else loss + term

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def options_of(
    shape: str, stage: int, dtype: str, rank: int, dropout: float, train_on_inputs: bool, batch_size: int
) -> TrainOptions:
    """The training command's own options for a setting."""
    assert shape in SHAPES and dtype in TORCH_DTYPES
    return TrainOptions(
        model=shape,
        ds=f"ds_configs/zero{stage}.json",
        dtype=dtype,  # type: ignore[arg-type]
        rank=rank,
        alpha=2.0 * rank,
        dropout=dropout,
        train_on_inputs=train_on_inputs,
        batch_size=batch_size,
        micro_batch_size=batch_size,
    )
