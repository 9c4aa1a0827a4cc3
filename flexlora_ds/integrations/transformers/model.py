"""The model of a trainer: its adapters, its task's head, and what PEFT calls its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ_TO_SEQ,
)

from flexlora_ds.adapter.heads import all_usual_saved, modules_named, trained_beside, usual_heads
from flexlora_ds.adapter.inject import inject_adapters, use_fp32_adapters
from flexlora_ds.adapter.layer import adapters, require_scale
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's task type, by the end of a model class's name."""


def adapt(
    model: nn.Module,
    config: FlexLoRAConfig,
    modules_to_save: Sequence[str] | None,
    *,
    masters_elsewhere: bool,
) -> tuple[str, ...]:
    """Inject the adapters unless the model carries some; returns the modules trained beside them.

    Args:
        modules_to_save: those asked for; None: the task's usual head.
        masters_elsewhere: fp32 masters are kept beside the parameters (DeepSpeed).

    Raises:
        UserError: as `inject_adapters`; adapters that are there have another scale; or something is trained that would
            not be saved.
    """
    wanted = usual_heads(model) if modules_to_save is None else tuple(modules_to_save)
    layers = adapters(model)
    if not layers:
        inject_adapters(model, config, modules_to_save=wanted)
    require_scale(layers, config)
    for layer in layers.values():
        layer.dropout = config.dropout
    if not masters_elsewhere:
        use_fp32_adapters(model)
    whole = modules_named(model, wanted)
    inside = tuple(f"{name}." for name in whole)
    for name in trained_beside(model):
        if not name.startswith(inside):
            raise UserError(
                f"{name} is trained and would not be saved", mend="name its module in modules_to_save"
            )
    return tuple(whole)


def disable_dropout(model: nn.Module) -> None:
    """As TRL's `disable_dropout` means it, which finds torch's own dropout only."""
    for layer in adapters(model).values():
        layer.dropout = 0.0


def begins_from_gradient(model: nn.Module, config: FlexLoRAConfig) -> bool:
    """What `init` means for this model."""
    return config.begins_from_gradient(language_model=task_type_of(model) == "CAUSAL_LM")


def head_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """One group for what is trained beside the adapters, where there is anything."""
    params = list(trained_beside(model).values())
    return [{"params": params, "weight_decay": weight_decay}] if params else []


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's name for what the model is for; None where it has none."""
    name = type(model).__name__
    if (
        getattr(getattr(model, "config", None), "model_type", None) in SEQ_TO_SEQ
        and name in SEQ_TO_SEQ.values()
    ):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def task_of_adapter(model: nn.Module, whole: Sequence[str]) -> str | None:
    """The task type that an adapter with these modules is saved under.

    None where a head of the task is not among them: PEFT looks for it in every adapter of such a task.
    """
    task = task_type_of(model)
    return task if task == "CAUSAL_LM" or all_usual_saved(model, whole) else None


def base_name_of(model: Any) -> str:
    """What the base was loaded from, as `from_pretrained` takes it; empty where it was not."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
