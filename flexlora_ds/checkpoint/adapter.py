"""The adapter inside a checkpoint: for a run that was stopped, or one step of it that is wanted later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_ds.checkpoint.state import Checkpoint, open_checkpoint
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError
from flexlora_ds.peft_format import AdapterFactors, LoraAdapter, lora_of

NOTES = "adapter"
"""Under this name a run says in its checkpoints what `adapter_notes` gives."""


def adapter_notes(
    config: FlexLoRAConfig,
    base_model: str,
    prompt: str | None,
    *,
    prompt_date: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """What an adapter needs beside its tensors; JSON. The last two are as in `write_peft_adapter`."""
    return {
        "config": config.to_dict(),
        "base_model": base_model,
        "prompt": prompt,
        "prompt_date": prompt_date,
        "fan_in_fan_out": fan_in_fan_out,
    }


def read_checkpoint_adapter(folder: Path) -> LoraAdapter:
    """The adapter of a FlexLoRA checkpoint, from its fp32 masters; every byte is checked first.

    Raises:
        DamagedError, RunError: as `open_checkpoint`; or it holds no adapter of this method.
    """
    checkpoint = open_checkpoint(folder)
    notes = checkpoint.run.get(NOTES)
    if not isinstance(notes, dict) or not checkpoint.ranks:
        raise RunError(
            "the checkpoint holds no FlexLoRA adapter",
            str(folder),
            "finish its run and export that with --run",
        )
    config = FlexLoRAConfig.from_dict(notes["config"])
    return lora_of(
        masters_of(checkpoint),
        config,
        notes["base_model"],
        prompt=notes["prompt"],
        prompt_date=notes.get("prompt_date"),
        fan_in_fan_out=bool(notes.get("fan_in_fan_out")),
    )


def masters_of(checkpoint: Checkpoint) -> dict[str, AdapterFactors]:
    """P, λ and Q of every matrix, fp32, by the matrices' names."""
    masters: dict[str, Tensor] = {}
    for label, value in checkpoint.tensors():
        parameter, _, key = label.rpartition(":")
        if key == "master":
            masters[parameter] = value
    return {
        name: AdapterFactors(masters[f"{name}.P"], masters[f"{name}.lam"], masters[f"{name}.Q"])
        for name in checkpoint.ranks
    }
