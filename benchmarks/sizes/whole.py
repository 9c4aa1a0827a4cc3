"""The records that a run held out, their loss under any adapter, and whether that is the loss which the run logged."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out import ExactBase, FinishedRun, mean_loss
from flexlora_ds.adapter.inject import inject_adapters
from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.adapter import masters_of
from flexlora_ds.checkpoint.files import checkpoints_in
from flexlora_ds.checkpoint.state import open_checkpoint, set_ranks
from flexlora_ds.errors import RunError
from flexlora_ds.peft_format import AdapterFactors, LoraAdapter, write_adapter
from flexlora_ds.peft_reading.attach import attach_adapter
from launch.data.batches import MicroBatch

SAME = 1e-4
"""How far two computations of one loss may be apart, as a share of it: sums in another order, no more."""


class HeldOut:
    """The held-out records of a run, and the base model as the run loads it."""

    def __init__(self, folder: Path) -> None:
        self._run = FinishedRun(folder)
        batches = self._run.data.validation
        if batches is None:
            raise RunError("the run held no records out", str(folder), "train it with --val_size")
        self._batches = batches
        self._base = ExactBase(self._run.base())

    def loss(self, adapter: LoraAdapter) -> float:
        """Σ token losses / target tokens in fp32, the adapter attached by PEFT, in evaluation mode."""
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder, "adapter"), adapter)
            return self._base.loss(Path(folder, "adapter"), self._batches)

    def whole_loss(self, adapter: LoraAdapter) -> float:
        """`loss` of the run's whole adapter, checked against the run.

        Raises:
            RunError: the run's adapter, in the run's own form and precision, does not give the validation loss that the
                run logged last; or in fp32 not that of `adapter`.
        """
        found = self.loss(adapter)
        if self._run.options.traits.changes_ranks:
            own, exact = self._of_layers()
            self._require_same(exact, found, "its layers in fp32 give")
        else:
            own = self._of_peft()
        self._require_same(own, self._logged(), "its adapter gives")
        return found

    def _of_layers(self) -> tuple[float, float]:
        """With the layers that were trained: in the run's precision, and from the masters in fp32."""
        checkpoint = open_checkpoint(checkpoints_in(self._run.folder / "checkpoints")[-1])
        masters = masters_of(checkpoint)
        model = self._run.base()
        inject_adapters(model, self._run.options.to_flexlora_config())
        set_ranks(model, checkpoint.ranks)
        context = forward_context(model)

        def name_rows(batch: MicroBatch) -> None:
            context.row_keys = batch.row_keys

        _write(model, masters)
        as_trained = mean_loss(model, self._batches, name_rows)
        _write(model.float(), masters)
        return as_trained, mean_loss(model, self._batches, name_rows)

    def _of_peft(self) -> float:
        """With PEFT's layers, in the run's precision."""
        dtype = TORCH_DTYPES[self._run.settled.computation.dtype]
        model = attach_adapter(self._run.base(), str(self._run.folder / "adapter"))
        for parameter in model.parameters():  # and no buffer: positions stay in fp32
            parameter.data = parameter.data.to(dtype)
        return mean_loss(model, self._batches)

    def _logged(self) -> float:
        lines = (self._run.folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        return float(json.loads(lines[-1])["loss"])

    def _require_same(self, found: float, expected: float, what: str) -> None:
        if not abs(found - expected) <= SAME * expected:
            raise RunError(
                f"{what} the validation loss {found:.6f} where {expected:.6f} is expected",
                str(self._run.folder),
                "measure with the version of the code that trained it",
            )


@torch.no_grad()
def _write(model: Any, masters: dict[str, AdapterFactors]) -> None:
    """The factors into the layers, rounded to the layers' precision."""
    for name, factors in masters.items():
        layer = model.get_submodule(name)
        for key in ("P", "lam", "Q"):
            getattr(layer, key).copy_(getattr(factors, key))
