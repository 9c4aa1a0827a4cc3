"""What the tests of the trainer share in plain torch, in their own process: a tiny run of eight steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexlora_ds import (
    FlexLoRAConfig,
)
from flexlora_ds.integrations.transformers import FlexLoRATrainer
from tests.helpers import tiny

STEPS = 8


def configuration(**options: Any) -> FlexLoRAConfig:
    """Two changes, after steps 3 and 5 of eight."""
    calendar = {"adjust_start": 1, "adjust_freeze": 2, "adjust_interval": 2, "schedule": "constant"}
    return FlexLoRAConfig(
        **{"rank": 4, "dropout": 0.1, "target_modules": "all-linear", **calendar, **options}
    )


def arguments(out: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(str(out), **{**given, **options})


def language(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids, mask, labels = tiny.collate([row["ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sentences(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = language(rows)
    return {**batch, "labels": torch.tensor([row["ids"][0] % 3 for row in rows])}


def trainer_of(
    model: nn.Module,
    out: Path,
    config: FlexLoRAConfig | None = None,
    collate: Callable[..., Any] = language,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    given = {"train_dataset": [{"ids": ids} for ids in tiny.records(24)], "data_collator": collate}
    return FlexLoRATrainer(
        model, arguments(out, **options), flexlora=config or configuration(), **{**given, **(more or {})}
    )


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def told(trainer: Any) -> list[dict[str, Any]]:
    """The rank changes without the time that they took."""
    return [{**change, "seconds": 0} for change in trainer.rank_life.changes]


def classifier(seed: int = 0) -> Any:
    from transformers import LlamaForSequenceClassification

    config = tiny.tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)
