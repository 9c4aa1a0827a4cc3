"""What runs inside the test processes of `distributed/test_trainer.py`: `launch`'s data in the trainers of others."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from tests.helpers import tiny

TORCH = "torch"
"""In place of a ZeRO stage: no DeepSpeed, as if it were not installed; alone, or in DistributedDataParallel."""


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train as `launch` would with these words, in another loop: losses, and ranks after each change.

    Keys of `case`: `arguments`, the words after `launch/train.py`; `out`; `stage`; `trainer`, `Trainer` or
    `SFTTrainer`; `gas`, micro-steps of an update; `resume`, a checkpoint; `arguments_more`, for the trainer;
    `init_adapter`, a LoRA that the model goes on from.
    """
    torch.set_num_threads(1)
    world, plain = int(os.environ["WORLD_SIZE"]), case["stage"] == TORCH
    if not plain:
        tiny.start()  # DeepSpeed's communication: a run without it may have begun torch's
    data = LaunchData.of(case["arguments"])
    block = without_deepspeed() if plain else nullcontext()
    with fresh_accelerate(launched=world > 1 or not plain), block:
        trainer = make_trainer(case, data, world)
        trainer.train(resume_from_checkpoint=case.get("resume"))
        changes = trainer.rank_life.changes
        found = {
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "ranks": [change["ranks"] for change in changes],
            "noise": [change["noise"] for change in changes],
            "market": [change["market"] for change in changes],
            "deepspeed": trainer.is_deepspeed_enabled,
            "ddp": trainer.rank_life.engine.__dict__.get("ddp") is not None,
        }
        del trainer
        gc.collect()
    return found


@dataclass(frozen=True)
class LaunchData:
    """What `launch` makes of its words: options, tokenizer, and the records of all steps in its order."""

    options: Any
    tokenizer: Any
    padding_id: int
    rows: Any

    @classmethod
    def of(cls, arguments: list[str]) -> LaunchData:
        """For one process, whose order is that of any number."""
        from launch.data.prepare import load_tokenizer_of, prepare_data
        from launch.options.train_options import parse_options
        from launch.planning.settle import settle

        settled = settle(parse_options(arguments), 1)
        options, vocabulary = settled.options, settled.skeleton.vocabulary
        tokenizer = load_tokenizer_of(options)
        rows = rows_in_order(options, prepare_data(options, tokenizer, vocabulary).train)
        return cls(options, tokenizer, vocabulary.padding_id(tokenizer), rows)


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Whoever imports DeepSpeed meanwhile fails, as where it is not installed."""
    known = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["deepspeed"]
        if known is not None:
            sys.modules["deepspeed"] = known


@contextmanager
def fresh_accelerate(*, launched: bool) -> Iterator[None]:
    """Accelerate and the Trainer as in a new process: both keep what the last run was in global state.

    `launched`: as a launcher starts it; else as `python` does, where the Trainer begins no communication.
    """
    from accelerate.state import AcceleratorState, GradientState

    with patch.dict(os.environ):
        of_launcher = () if launched else ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        for name in [n for n in os.environ if n.startswith("ACCELERATE_") or n in of_launcher]:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_trainer(case: dict[str, Any], data: LaunchData, world: int) -> Any:
    """A trainer over the records in `launch`'s order, with its learning rate and steps."""
    from transformers import AutoModelForCausalLM

    from flexlora_ds import inject_adapters, start_from_adapter
    from flexlora_ds.integrations.transformers import FlexLoRAMixin, FlexLoRATrainer

    arguments = training_arguments(data.options, case, world)
    model = AutoModelForCausalLM.from_pretrained(str(data.options.model), dtype=torch.float32)
    config = data.options.to_flexlora_config()
    if "init_adapter" in case:
        inject_adapters(model, config)
        start_from_adapter(model, config, case["init_adapter"])
    common = {
        "train_dataset": data.rows,
        "data_collator": Padding(data.padding_id),
        "flexlora": config,
    }
    if "scores" in case:
        scores = iter(case["scores"])
        common |= {
            "eval_dataset": data.rows.select(range(4)),
            "compute_metrics": lambda _: {"score": next(scores)},
        }
    if case["trainer"] == "Trainer":
        return FlexLoRATrainer(model, arguments, **common)
    from trl import SFTTrainer

    made = type("FlexLoRASFTTrainer", (FlexLoRAMixin, SFTTrainer), {})
    return made(model, arguments, processing_class=data.tokenizer, **common)


def rows_in_order(options: Any, examples: Any) -> Any:
    """The records of all steps, one after the other, as `launch` takes them."""
    from datasets import Dataset

    from launch.data.batches import ProcessShare, TrainingBatches

    batches = TrainingBatches(
        examples, options.batch_size, options.seed, ProcessShare(1, 0, options.batch_size), 0
    )
    order = [int(i) for step in range(1, options.max_steps + 1) for i in batches.batch(step).indices]
    chosen = [examples[i] for i in order]
    return Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in chosen], "labels": [list(row.labels) for row in chosen]}
    )


class Padding:
    """Pads on the right, as `launch` does."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: list[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        padded = {"input_ids": self._pad, "labels": -100}
        made = {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in padded.items()
        }
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {**made, "attention_mask": torch.tensor(mask)}


def training_arguments(options: Any, case: dict[str, Any], world: int) -> Any:
    """The Trainer's arguments that mean the same as `launch`'s options."""
    from transformers import TrainingArguments

    gas = case.get("gas", 1)
    common = {
        "output_dir": case["out"],
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch_size // (world * gas),
        "gradient_accumulation_steps": gas,
        "learning_rate": options.lr,
        "lr_scheduler_type": options.lr_schedule,
        "warmup_steps": options.warmup_steps,
        "max_grad_norm": options.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": False,
        "deepspeed": None if case["stage"] == TORCH else deepspeed_settings(case["stage"]),
        **case.get("arguments_more", {}),
    }
    if case["trainer"] == "Trainer":
        return TrainingArguments(**common)
    from trl import SFTConfig

    return SFTConfig(
        **common,
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """A configuration with small buckets, whose sizes the Trainer fills in."""
    auto = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        **dict.fromkeys(auto, "auto"),
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20000,
            "allgather_bucket_size": 20000,
            "stage3_prefetch_bucket_size": 2000,
            "stage3_param_persistence_threshold": 100,
        },
    }
