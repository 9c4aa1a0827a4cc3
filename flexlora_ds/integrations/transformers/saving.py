"""A trainer's adapter on disk: in PEFT's format, among whatever else lies in its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.integrations.transformers.model import base_name_of, task_of_adapter
from flexlora_ds.peft_format import ADAPTER_FILES
from flexlora_ds.saving import save_adapter

CHANGES_FILE = "ranks.jsonl"
"""Beside an adapter: one line for each rank change that led to it."""
_PART = ".adapter.part"


def save_adapter_files(trainer: Any, folder: Path) -> None:
    """Write the adapter, the tokenizer and the rank changes into `folder`; collective, process 0 writes.

    Each file appears whole, and what else is in the folder is not touched: other processes may be writing there.
    """
    engine = trainer.rank_life.require_engine()
    part = folder / _PART
    save_adapter(
        engine,
        part,
        trainer.flexlora,
        base_model=base_name_of(trainer.model),
        modules_to_save=trainer.modules_to_save,
        task_type=task_of_adapter(trainer.model, trainer.modules_to_save),
    )
    if engine.global_rank != 0:
        return
    for name in ADAPTER_FILES:
        if (part / name).exists():
            (part / name).replace(folder / name)
    part.rmdir()
    lines = [json.dumps(change, allow_nan=False) + "\n" for change in trainer.rank_life.changes]
    write_text_atomically(folder / CHANGES_FILE, "".join(lines))
    tokenizer = trainer.processing_class
    if tokenizer is None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
