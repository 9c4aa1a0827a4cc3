"""AdaLoRA as PEFT's own documentation trains it: one process, torch's AdamW, whole gradients, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from launch.data.order import DataOrder
from launch.data.prepare import load_tokenizer_of, prepare_data
from launch.engine.lr_schedule import build_lr_scheduler
from launch.options.train_options import TrainOptions, parse_options


@dataclass(frozen=True)
class Reference:
    """What such a training came to."""

    losses: list[float]
    """The task's, of every step."""
    ranks: list[dict[str, int]]
    """By E's name, directions that are not masked, after every step from the first mask on."""
    tensors: dict[str, Tensor]
    """Of the adapter, as PEFT saves it."""


def train_adalora(arguments: list[str], targets: list[str]) -> Reference:
    """The run of the command's arguments, without dropout."""
    options = parse_options(arguments)
    assert options.max_steps and isinstance(options.adjust_start, int) and options.dropout == 0
    assert isinstance(options.adjust_freeze, int) and isinstance(options.adjust_interval, int)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = AdaLoraConfig(
        init_r=options.rank + options.rank // 2,
        target_r=options.rank,
        lora_alpha=int(options.alpha),
        target_modules=targets,
        total_step=options.max_steps,
        tinit=options.adjust_start,
        tfinal=options.adjust_freeze,
        deltaT=options.adjust_interval,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    wrapped: Any = get_peft_model(model, config).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
    schedule = build_lr_scheduler(optimizer, options, options.max_steps)
    losses, ranks = [], []
    for step, batch in enumerate(_batches(options), start=1):
        found = wrapped(**batch)
        found.loss.backward()  # PEFT has added its regulariser
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        schedule.step()
        logits, labels = found.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        losses.append(float(F.cross_entropy(logits.detach(), labels)))
        if config.rank_pattern:
            ranks.append({name: sum(kept) for name, kept in config.rank_pattern.items()})
    return Reference(losses, ranks, get_peft_model_state_dict(wrapped))


def _batches(options: TrainOptions) -> Iterator[dict[str, Tensor]]:
    """The run's records, padded on the right."""
    examples = prepare_data(options, load_tokenizer_of(options)).train
    order = DataOrder(len(examples), options.batch_size, options.seed, None)
    for step in range(1, (options.max_steps or 0) + 1):
        rows = [examples[int(index)] for index in order.indices(step)]
        ids = [torch.as_tensor(row.input_ids).long() for row in rows]
        labels = [torch.as_tensor(row.labels).long() for row in rows]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
