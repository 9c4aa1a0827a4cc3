"""The records that a run held out, and their loss under any adapter, by the run's own data and loss.

Adapters are compared in fp32, on the base weights as the run rounded them. In bf16 the rounding of a whole forward pass
moves the loss of some hundred target tokens by 2 %, as much as adapters differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexlora_ds.adapter.inject import inject_adapters
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.adapter import masters_of
from flexlora_ds.checkpoint.files import checkpoints_in
from flexlora_ds.checkpoint.state import open_checkpoint, set_ranks
from flexlora_ds.errors import RunError
from flexlora_ds.files.reading import read_text
from flexlora_ds.peft_format import AdapterFactors, LoraAdapter, write_adapter
from flexlora_ds.peft_reading.attach import attach_adapter
from launch.data.batches import MicroBatch
from launch.data.prepare import load_tokenizer_of, prepare_data, share_batches
from launch.distributed.process import Process
from launch.engine.build import load_base
from launch.model.token_loss import head_of, token_loss
from launch.options.train_options import TrainOptions
from launch.planning.settle import settle

SAME = 1e-4
"""How far two computations of one loss may be apart, as a share of it: sums in another order, no more."""


class HeldOut:
    """The held-out records of a run, and the base model as the run loads it."""

    def __init__(self, run: Path) -> None:
        path = run / "options.yaml"
        options = TrainOptions.from_yaml(read_text(path, "name a finished run"), str(path))
        self._settled = settle(options, 1)
        self._options, vocabulary = self._settled.options, self._settled.skeleton.vocabulary
        self._run = run
        self._process = Process(0, 1, torch.device("cpu"), torch.get_num_threads())
        tokenizer = load_tokenizer_of(self._options)
        data = prepare_data(self._options, tokenizer, vocabulary)
        pad, packed = vocabulary.padding_id(tokenizer), self._settled.computation.packed
        layout = self._settled.layout
        batches = share_batches(self._options, data, layout, self._process, pad, packed=packed).validation
        if batches is None:
            raise RunError("the run held no records out", str(run), "train it with --val_size")
        self._batches = batches
        self._base = load_base(self._settled, self._process).float()

    def loss(self, adapter: LoraAdapter) -> float:
        """Σ token losses / target tokens in fp32, the adapter attached by PEFT, in evaluation mode."""
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder, "adapter"), adapter)
            adapted = attach_adapter(self._base, str(Path(folder, "adapter")))
        loss = self._loss(adapted)
        adapted.unload()
        return loss

    def whole_loss(self, adapter: LoraAdapter) -> float:
        """`loss` of the run's whole adapter, checked against the run.

        Raises:
            RunError: the run's adapter, in the run's own form and precision, does not give the validation loss that the
                run logged last; or in fp32 not that of `adapter`.
        """
        found = self.loss(adapter)
        if self._options.traits.changes_ranks:
            own, exact = self._of_layers()
            self._require_same(exact, found, "its layers in fp32 give")
        else:
            own = self._of_peft()
        self._require_same(own, self._logged(), "its adapter gives")
        return found

    def _of_layers(self) -> tuple[float, float]:
        """With the layers that were trained: in the run's precision, and from the masters in fp32."""
        checkpoint = open_checkpoint(checkpoints_in(self._run / "checkpoints")[-1])
        masters = masters_of(checkpoint)
        model = load_base(self._settled, self._process)
        inject_adapters(model, self._options.to_flexlora_config())
        set_ranks(model, checkpoint.ranks)
        context = forward_context(model)

        def name_rows(batch: MicroBatch) -> None:
            context.row_keys = batch.row_keys

        _write(model, masters)
        as_trained = self._loss(model, name_rows)
        _write(model.float(), masters)
        return as_trained, self._loss(model, name_rows)

    def _of_peft(self) -> float:
        """With PEFT's layers, in the run's precision."""
        dtype = TORCH_DTYPES[self._settled.computation.dtype]
        model = attach_adapter(load_base(self._settled, self._process), str(self._run / "adapter"))
        for parameter in model.parameters():  # and no buffer: positions stay in fp32
            parameter.data = parameter.data.to(dtype)
        return self._loss(model)

    @torch.no_grad()
    def _loss(self, model: Any, before: Callable[[MicroBatch], None] = lambda batch: None) -> float:
        """`before` is called with every batch that the model is about to see."""
        model.eval()
        head, device = head_of(model), self._process.device
        total = 0.0
        for batch in self._batches:
            before(batch)
            total += float(token_loss(model, batch, device, head))
        return total / self._batches.target_tokens

    def _logged(self) -> float:
        lines = (self._run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        return float(json.loads(lines[-1])["loss"])

    def _require_same(self, found: float, expected: float, what: str) -> None:
        if not abs(found - expected) <= SAME * expected:
            raise RunError(
                f"{what} the validation loss {found:.6f} where {expected:.6f} is expected",
                str(self._run),
                "measure with the version of the code that trained it",
            )


@torch.no_grad()
def _write(model: Any, masters: dict[str, AdapterFactors]) -> None:
    """The factors into the layers, rounded to the layers' precision."""
    for name, factors in masters.items():
        layer = model.get_submodule(name)
        for key in ("P", "lam", "Q"):
            getattr(layer, key).copy_(getattr(factors, key))
