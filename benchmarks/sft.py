"""TRL's SFTTrainer with adapters whose ranks change and with PEFT's LoRA, in plain torch or under DeepSpeed.

    python -m benchmarks.sft --model MODEL --data FILE [--steps 50] [--methods flexlora,lora] [--ds FILE] [--out DIR]

FILE holds records {instruction, input, output}. The methods see the same batches. The table says how the loss falls,
what a step takes (the median), and by how much the logits of the saved adapter differ from those of the trained model,
where PEFT loads it on a fresh base. It needs the extra `trl`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data_prep.prompt import training_text
from data_prep.records import Record, load_records
from flexlora_ds import FlexLoRAConfig, prepare_extensions
from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.files.text import write_json_atomically
from flexlora_ds.terminal.command import CommandParser, exit_code_of

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
METHODS = ("flexlora", "lora")


def main() -> int:
    """Train by each method, and print the table."""

    def compare() -> None:
        args = parse()
        records = load_records(args.data)
        chosen = random.Random(args.seed).sample(records, min(len(records), args.steps * args.batch_size))
        if args.ds:
            prepare_extensions()
        found = {method: train(args, method, chosen) for method in args.methods.split(",")}
        write_json_atomically(args.out / "figures.json", found)
        print(table(found), end="")

    return exit_code_of(compare)


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="benchmarks.sft", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a hub id, a folder or a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="JSON or JSONL records")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ds", default=None, help="a DeepSpeed JSON of stage 0 to 2; start with torchrun")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    for method in args.methods.split(","):
        if method not in METHODS:
            parser.error(f"{method} is no method: {', '.join(METHODS)}")
    return args


def train(args: argparse.Namespace, method: str, records: list[Record]) -> dict[str, Any]:
    """One run: its losses, seconds a step, rank changes, and how exactly PEFT loads what it saved."""
    tokenizer = load_tokenizer(args.model)
    settings = arguments(args, method)
    model = load_causal_lm(args.model, dtype=torch.float32)
    trainer = trainer_of(args, method, model, tokenizer, settings, records)
    clock = Clock()
    trainer.add_callback(clock.callback)
    trainer.train()
    trainer.save_model()
    changes = trainer.rank_life.changes if method == "flexlora" else []
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": rows,
        "step_seconds": clock.median(),
        "changes": len(changes),
        "moved": sum(len(change["expanded"]) for change in changes),
        "distinct_ranks": len({*changes[-1]["ranks"].values()}) if changes else 1,
        "logits_differ_by": difference(trainer, args.model, tokenizer, records[0]),
    }


def arguments(args: argparse.Namespace, method: str) -> Any:
    """TRL's arguments; before the model is loaded, as DeepSpeed wants it."""
    from trl import SFTConfig

    return SFTConfig(
        str(args.out / method),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=args.steps // 10,
        max_length=256,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=args.ds,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )


def trainer_of(
    args: argparse.Namespace,
    method: str,
    model: Any,
    tokenizer: Any,
    settings: Any,
    records: list[Record],
) -> Any:
    """SFTTrainer with the mixin, or with PEFT's configuration."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTTrainer

    from flexlora_ds.integrations.transformers import FlexLoRAMixin

    class FlexLoRASFTTrainer(FlexLoRAMixin, SFTTrainer):  # type: ignore[misc]
        """TRL's, whose adapters' ranks change."""

    texts = [training_text(record, "alpaca") for record in records]
    rows = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    common = {"args": settings, "train_dataset": rows, "processing_class": tokenizer}
    alpha = 2 * args.rank
    if method == "lora":
        lora = LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        return SFTTrainer(model, peft_config=lora, **common)
    config = FlexLoRAConfig(
        rank=args.rank,
        alpha=alpha,
        dropout=0.0,
        target_modules=TARGETS,
        adjust_start=args.steps // 5,
        adjust_freeze=args.steps // 5,
        adjust_interval=max(1, args.steps // 10),
    )
    return FlexLoRASFTTrainer(model, flexlora=config, **common)


class Clock:
    """The times at which steps end."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        times = self.times = [time.perf_counter()]

        class AtStepEnd(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        self.callback = AtStepEnd()

    def median(self) -> float:
        """Seconds of a step; the first is not counted."""
        return statistics.median(later - earlier for earlier, later in pairwise(self.times[1:]))


@torch.no_grad()
def difference(trainer: Any, model: str, tokenizer: Any, record: Record) -> float:
    """The largest difference of a record's logits, the trained model against PEFT's reading of what it saved."""
    from peft import PeftModel

    ids = tokenizer("".join(training_text(record, "alpaca")), return_tensors="pt").input_ids
    fresh = PeftModel.from_pretrained(load_causal_lm(model, dtype=torch.float32), trainer.args.output_dir)
    live = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
    logits = live(input_ids=ids.to(live.device)).logits.cpu()
    return float((logits - fresh.eval()(input_ids=ids).logits).abs().max())


def table(found: dict[str, dict[str, Any]]) -> str:
    """One row a method."""
    head = [
        "",
        "mean loss of the first fifth",
        "of the last fifth",
        "s a step",
        "rank changes",
        "directions moved",
    ]
    rows = []
    for method, figures in found.items():
        losses = figures["losses"]
        part = max(1, len(losses) // 5)
        rows.append(
            [
                method,
                f"{statistics.mean(losses[:part]):.4f}",
                f"{statistics.mean(losses[-part:]):.4f}",
                f"{figures['step_seconds']:.2f}",
                str(figures["changes"]),
                str(figures["moved"]),
                f"{figures['logits_differ_by']:.1e}",
            ]
        )
    return markdown_table([*head, "logits differ by"], rows)


if __name__ == "__main__":
    sys.exit(main())
