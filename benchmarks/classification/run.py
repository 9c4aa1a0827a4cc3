"""One run: a new head, then head and adapters, in plain torch with the library's own pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.classification.rows import Batch, evaluation_batches, read_sentences, training_batches
from benchmarks.classification.settings import SETTINGS, Setting
from flexlora_ds import FlexLoRAConfig, adapters, build_optimizer, inject_adapters, start_from_gradient
from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.files.text import write_json_atomically
from flexlora_ds.orthogonality import decoupled_step
from flexlora_ds.seeds import generator

TARGETS = r".*encoder.*(query|key|value|dense)"
HEAD_LR = 1e-3
WARMUP = 12


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share."""

    model: str
    data: str
    """The task's folder, with train.jsonl and validation.jsonl."""
    steps: int = 200
    head_steps: int = 20
    """Steps of the head alone, before the adapters join."""
    batch_size: int = 32
    rank: int = 8


def run(plan: Plan, setting: str, seed: int, out: str, threads: int) -> dict[str, Any]:
    """Train once, write what it came to into the file `out`, and return it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    model = AutoModelForSequenceClassification.from_pretrained(plan.model, num_labels=2).eval()
    folder, how = Path(plan.data), SETTINGS[setting]
    config = configuration(plan, seed)
    count = plan.head_steps + plan.steps + config.init_batches
    batches = training_batches(
        read_sentences(folder / "train.jsonl", tokenizer), plan.batch_size, count, seed
    )
    head, rest = batches[: plan.head_steps], batches[plan.head_steps :]
    inject_adapters(model, config)
    train_head(model, head)
    begin(model, config, how, rest[-config.init_batches :] if how.unseen else rest[: config.init_batches])
    losses = train(model, config, how, rest[: plan.steps])
    loss, accuracy = evaluate(model, read_sentences(folder / "validation.jsonl", tokenizer))
    found = {"setting": setting, "seed": seed, "losses": losses, "validation": loss, "accuracy": accuracy}
    write_json_atomically(Path(out), found)
    return found


def configuration(plan: Plan, seed: int) -> FlexLoRAConfig:
    """Fixed ranks, no dropout."""
    return FlexLoRAConfig(
        rank=plan.rank,
        alpha=2 * plan.rank,
        dropout=0.0,
        target_modules=(TARGETS,),
        adjust_size=0,
        seed=seed,
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch.labels)


def train_head(model: nn.Module, batches: list[Batch]) -> None:
    """Some steps of the head alone, at a constant rate."""
    parameters = head_of(model)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=HEAD_LR, weight_decay=0.0)
    for batch in batches:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.zero_grad()


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the new head."""
    return list(model.get_submodule("classifier").parameters())


def begin(model: nn.Module, config: FlexLoRAConfig, setting: Setting, batches: list[Batch]) -> None:
    """The directions that a setting begins with."""
    layers = adapters(model)
    drawn = {name: (layer.P.detach().clone(), layer.Q.detach().clone()) for name, layer in layers.items()}
    if setting.gradient:
        start_from_gradient(model, config, lambda: _mean_losses(model, batches))
    for name, layer in layers.items():
        if "P" not in setting.gradient:
            layer.P.data.copy_(drawn[name][0])
        if "Q" not in setting.gradient:
            layer.Q.data.copy_(drawn[name][1])
        if setting.lora:
            as_lora(layer, config, keep_q="Q" in setting.gradient)


def _mean_losses(model: nn.Module, batches: list[Batch]) -> Iterator[Tensor]:
    return (loss_of(model, batch) / len(batches) for batch in batches)


def as_lora(layer: AdaptedLinear, config: FlexLoRAConfig, *, keep_q: bool) -> None:
    """λ = 1 for good, P = 0, and Q uniform within 1/√in, as PEFT draws its A."""
    layer.lam.data.fill_(1.0)
    layer.lam.requires_grad_(False)
    layer.P.data.zero_()
    if not keep_q:
        bound = 1 / math.sqrt(layer.in_features)
        layer.Q.data.uniform_(-bound, bound, generator=generator(config.seed, "lora", layer.name))


def train(model: nn.Module, config: FlexLoRAConfig, setting: Setting, batches: list[Batch]) -> list[float]:
    """The loss of every step: a warm-up, then linearly to 0; gradients clipped at norm 1."""
    layers = adapters(model)
    optimizer = optimizer_of(model, config, setting)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / WARMUP, 1 - k / steps))
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if not setting.lora:
            orthogonalise(layers, config.orth_strength * schedule.get_last_lr()[0] / setting.lr)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module, config: FlexLoRAConfig, setting: Setting) -> torch.optim.Optimizer:
    """The method's own; torch's AdamW for LoRA. The head has the same rate in all."""
    head = {"params": head_of(model), "lr": HEAD_LR}
    betas = (0.9, setting.beta2)
    if not setting.lora:
        return build_optimizer(model, config, setting.lr, betas=betas, extra_groups=[head])
    matrices = [p for layer in adapters(model).values() for p in (layer.P, layer.Q)]
    return torch.optim.AdamW([{"params": matrices}, head], lr=setting.lr, betas=betas, weight_decay=0.0)


@torch.no_grad()
def orthogonalise(layers: Mapping[str, AdaptedLinear], eta: float) -> None:
    """The decoupled regulariser, which `RankController` would apply under an engine."""
    for layer in layers.values():
        layer.P.copy_(decoupled_step(layer.P, eta, tall=True))
        layer.Q.copy_(decoupled_step(layer.Q, eta, tall=False))


@torch.no_grad()
def evaluate(model: nn.Module, sentences: list[tuple[list[int], int]]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    total, right = 0.0, 0
    for batch in evaluation_batches(sentences):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        total += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        right += int((logits.argmax(-1) == batch.labels).sum())
    return total / len(sentences), right / len(sentences)
