"""The batches of a run's first steps, for what looks at the gradient before the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora_ds.terminal.counted import counted
from launch.data.batches import MicroBatch
from launch.data.prepare import Data
from launch.model.token_loss import head_of, token_loss
from launch.options.train_options import TrainOptions

Before = Callable[[MicroBatch, torch.device], object]
"""`Method.before_forward`."""


@dataclass(frozen=True)
class FirstBatches:
    """`init_batches` global batches, or as many as the records fill, as one batch."""

    data: Data
    device: torch.device
    asked: int
    batch_size: int

    @classmethod
    def of(cls, options: TrainOptions, data: Data, device: torch.device) -> FirstBatches:
        """Those of a run."""
        return cls(data, device, options.init_batches, options.batch_size)

    @property
    def count(self) -> int:
        """How many global batches there are."""
        return min(self.asked, max(1, len(self.data.tokenised.train) // self.batch_size))

    @property
    def records(self) -> int:
        """How many records, over all processes."""
        return self.count * self.batch_size

    @property
    def micro_batches(self) -> int:
        """How many losses this process has."""
        return self.count * self.data.train.accumulation

    def losses(self, model: Any, before: Before | None = None) -> Iterator[Tensor]:
        """This process's part of the mean loss per target token, micro-batch by micro-batch.

        `before` is called with each micro-batch before the model sees it.
        """
        head = head_of(model)
        for step in range(1, self.count + 1):
            batch = self.data.train.batch(step)
            for micro_batch in batch.micro_batches:
                if before is not None:
                    before(micro_batch, self.device)
                loss = token_loss(model, micro_batch, self.device, head)
                yield loss / (batch.target_tokens * self.count)

    def shortage(self) -> list[str]:
        """What is to be said where the records fill fewer batches than asked for."""
        if self.count == self.asked:
            return []
        return [
            f"the records fill {counted(self.count, 'batch', 'batches')}, fewer than init_batches {self.asked}"
        ]
