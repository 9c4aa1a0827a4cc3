"""A finished run as its own command would find it, and the loss of adapters on records that were not trained on.

Adapters are compared in fp32, on the base weights as the run rounded them. In bf16 the rounding of a whole forward pass
moves the loss of some hundred target tokens by 2 %, as much as adapters differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexlora_ds.files.reading import read_text
from flexlora_ds.peft_reading.attach import attach_adapter
from launch.data.batches import MicroBatch, ProcessShare, ValidationBatches
from launch.data.examples import Examples
from launch.data.prepare import Data, load_tokenizer_of, prepare_data, share_batches
from launch.distributed.process import Process
from launch.engine.build import load_base
from launch.model.token_loss import head_of, token_loss
from launch.options.train_options import TrainOptions
from launch.planning.settle import settle


class FinishedRun:
    """The decisions, the records and the base model of a run of one process, on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Raise UserError where there are no options of a run, or its records or model are gone."""
        path = folder / "options.yaml"
        options = TrainOptions.from_yaml(read_text(path, "name a finished run"), str(path))
        self.folder = folder
        self.settled = settle(options, 1)
        self.options = self.settled.options
        self.data = self._share()

    def batches(self, examples: Examples) -> ValidationBatches:
        """These examples in micro-batches of the run's size, packed where the run packs."""
        share = ProcessShare(micro_batch_size=self.settled.layout.micro_batch_size)
        return ValidationBatches(examples, share, self._pad, padding_free=self.settled.computation.packed)

    def base(self) -> Any:
        """The base model in the run's precision, a new one at every call."""
        return load_base(self.settled, _process())

    def _share(self) -> Data:
        tokenizer, vocabulary = load_tokenizer_of(self.options), self.settled.skeleton.vocabulary
        self._pad = vocabulary.padding_id(tokenizer)
        data = prepare_data(self.options, tokenizer, vocabulary)
        packed, layout = self.settled.computation.packed, self.settled.layout
        return share_batches(self.options, data, layout, _process(), self._pad, packed=packed)


class ExactBase:
    """A base model in fp32, for one adapter after another."""

    def __init__(self, model: Any) -> None:
        """`model` is turned into fp32 in place: its weights stay as they were rounded."""
        self._model = model.float()

    def loss(self, adapter: Path, batches: ValidationBatches) -> float:
        """Σ token losses / target tokens of a PEFT adapter's folder, attached by PEFT, in evaluation mode."""
        adapted = attach_adapter(self._model, str(adapter))
        loss = mean_loss(adapted, batches)
        adapted.unload()
        return loss


@torch.no_grad()
def mean_loss(
    model: Any, batches: ValidationBatches, before: Callable[[MicroBatch], None] = lambda batch: None
) -> float:
    """Σ token losses / target tokens in evaluation mode; `before` sees every batch just before the model does."""
    model.eval()
    head, device = head_of(model), _process().device
    total = 0.0
    for batch in batches:
        before(batch)
        total += float(token_loss(model, batch, device, head))
    return total / batches.target_tokens


def _process() -> Process:
    return Process(0, 1, torch.device("cpu"), torch.get_num_threads())
