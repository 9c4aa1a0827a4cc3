"""Adapters in PEFT's LoRA format: `adapter_config.json` and `adapter_model.safetensors`.

FlexLoRA's ΔW = s · P diag(λ) Q is a LoRA with B = P diag(λ), A = Q and PEFT's scale alpha / r = s, so that
`PeftModel.from_pretrained` loads it as it is. Ranks differ per matrix: `rank_pattern` and `alpha_pattern`
hold what departs from the defaults. PEFT (0.21, `get_pattern_key`) takes their keys as regular expressions
for the *end* of a module name, first match wins; our keys are escaped and anchored, so each means one
module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.folders import replacing_folder
from flexlora_ds.files.safetensors_file import save_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METHOD_FILE = "flexlora.json"
PROMPT_FILE = "prompt.json"
"""`{"prompt": STYLE}`: the prompt that the adapter was trained with; an evaluation asks with the same.

With `"date"` where its chat template was given one."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, METHOD_FILE, PROMPT_FILE)
"""What an adapter's folder holds of ours."""
PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""


class AdapterFactors(NamedTuple):
    """One matrix's adapter: P [out, r], λ [r], Q [r, in], fp32 on the CPU."""

    P: Tensor
    lam: Tensor
    Q: Tensor


@dataclass(frozen=True)
class LoraMatrix:
    """One matrix's LoRA: ΔW = scale · B A with B [out, r] and A [r, in]."""

    B: Tensor
    A: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW [out, in] in fp32."""
        return self.scale * (self.B.float() @ self.A.float())


@dataclass(frozen=True)
class TrainedBeside:
    """What was trained whole beside the matrices, such as a task's head: PEFT's `modules_to_save`."""

    modules: tuple[str, ...] = ()
    """The modules' full names."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Their parameters by full name."""


@dataclass(frozen=True)
class LoraAdapter:
    """A whole adapter: its matrices by module name in the unwrapped base model, and what it was made for."""

    matrices: Mapping[str, LoraMatrix]
    base_model: str
    revision: str | None = None
    default_rank: int = 8
    default_alpha: float = 16.0
    dropout: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Written beside the adapter as `flexlora.json`, where PEFT does not look."""
    prompt: str | None = None
    """The prompt style it was trained with, where that is known: `prompt.json` beside the adapter."""
    prompt_date: str | None = None
    """The date that its chat template was given, as YYYY-MM-DD, where that asks for one: there too."""
    fan_in_fan_out: bool = False
    """PEFT's name for layers that store their weight as [in, out] (Conv1D). A and B are the same for both."""
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base by module name, which PEFT stores once more for a head or embedding that it adapts."""
    beside: TrainedBeside = field(default_factory=TrainedBeside)
    task_type: str | None = "CAUSAL_LM"
    """PEFT's name for what the model is for; None where it has none."""
    folder: Path | None = None
    """Where it was read from."""
    doubts: tuple[str, ...] = ()
    """What its configuration says to no effect."""


def write_peft_adapter(
    folder: Path,
    matrices: Mapping[str, AdapterFactors],
    config: FlexLoRAConfig,
    base_model_name: str,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    *,
    prompt_date: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Write a FlexLoRA adapter to `folder` in PEFT's format; what was there is replaced once it is complete.

    `matrices` holds whole tensors (at ZeRO-3: gathered; one process writes). `base_model_name` is what the
    user called the base model. `extra` goes into `flexlora.json` beside the method's configuration.
    `prompt_date`: that of `LoraAdapter`.
    `fan_in_fan_out`: the layers store their weights as [in, out] (`flexlora_ds.orientation`).
    """
    adapter = lora_of(
        matrices,
        config,
        base_model_name,
        revision,
        extra,
        prompt,
        prompt_date=prompt_date,
        fan_in_fan_out=fan_in_fan_out,
    )
    write_adapter(folder, adapter)


def lora_of(
    matrices: Mapping[str, AdapterFactors],
    config: FlexLoRAConfig,
    base_model_name: str,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    *,
    prompt_date: str | None = None,
    fan_in_fan_out: bool = False,
) -> LoraAdapter:
    """A FlexLoRA adapter as a LoRA: B = P diag(λ), A = Q, one scale; arguments as of `write_peft_adapter`."""
    scale = config.alpha / config.rank
    return LoraAdapter(
        {name: LoraMatrix(m.P.float() * m.lam.float(), m.Q.float(), scale) for name, m in matrices.items()},
        base_model=base_model_name,
        revision=revision,
        default_rank=config.rank,
        default_alpha=config.alpha,
        dropout=config.dropout,
        notes={"config": config.to_dict(), **(extra or {})},
        prompt=prompt,
        prompt_date=prompt_date,
        fan_in_fan_out=fan_in_fan_out,
    )


def write_adapter(folder: Path, adapter: LoraAdapter) -> None:
    """Write any LoRA adapter in PEFT's format, replacing that in `folder` only once the new one is complete.

    Files of other names in `folder` stay.
    """
    if not adapter.matrices:
        raise UserError(f"{folder}: there is no adapted matrix to write")
    tensors = {}
    for name, matrix in adapter.matrices.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = matrix.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = matrix.B.detach().cpu().contiguous()
    for name, weight in adapter.base_weights.items():
        tensors[f"{PREFIX}{name}.base_layer.weight"] = weight.detach().cpu().contiguous()
    for name, weight in adapter.beside.weights.items():
        tensors[f"{PREFIX}{name}"] = weight.detach().cpu().contiguous()
    require_finite(tensors, str(folder))
    with replacing_folder(folder, owned=ADAPTER_FILES) as fresh:
        save_tensors(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_json(fresh / CONFIG_FILE, _peft_config(adapter))
        if adapter.notes:
            _write_json(fresh / METHOD_FILE, adapter.notes)
        write_prompt_note(fresh, adapter)


def write_prompt_note(folder: Path, adapter: LoraAdapter) -> None:
    """Write `prompt.json` beside an adapter, or the model that it became; nothing where the prompt is not known."""
    if adapter.prompt is not None:
        _write_json(folder / PROMPT_FILE, prompt_note(adapter.prompt, adapter.prompt_date))


def prompt_note(prompt: str, day: str | None) -> dict[str, str]:
    """What `prompt.json` says."""
    return {"prompt": prompt, "date": day} if day else {"prompt": prompt}


def _peft_config(adapter: LoraAdapter) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that are not at their defaults, and those that readers look for."""
    ranks = {_exactly(n): m.rank for n, m in adapter.matrices.items() if m.rank != adapter.default_rank}
    alphas = {
        _exactly(n): _plain(m.scale * m.rank)
        for n, m in adapter.matrices.items()
        if not math.isclose(m.scale * m.rank, adapter.default_alpha, rel_tol=1e-12)
    }
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "r": adapter.default_rank,
        "lora_alpha": _plain(adapter.default_alpha),
        "lora_dropout": adapter.dropout,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(adapter.matrices),
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(adapter.beside.modules) or None,
        "inference_mode": True,
    }


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def max_relative_difference(one: LoraAdapter, other: LoraAdapter) -> float:
    """max |ΔW − ΔW'| / max |ΔW| of the worst matrix; infinity for other matrices, or numbers that are not finite."""
    if set(one.matrices) != set(other.matrices):
        return math.inf
    worst = 0.0
    for name, matrix in one.matrices.items():
        expected = matrix.delta()
        difference = float((other.matrices[name].delta() - expected).abs().max())
        scale = float(expected.abs().max())
        figure = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        worst = max(worst, math.inf if math.isnan(figure) else figure)
    return worst


def require_finite_adapter(adapter: LoraAdapter, place: str) -> None:
    """Raise RunError naming the first matrix of an adapter whose numbers are not all finite."""
    for name, matrix in adapter.matrices.items():
        scale = torch.tensor(matrix.scale)
        require_finite(
            {f"B of {name}": matrix.B, f"A of {name}": matrix.A, f"the scale of {name}": scale}, place
        )
    require_finite(adapter.base_weights, place)


def require_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise RunError naming the first tensor that holds a number that is not finite: it is never written."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} holds numbers that are not finite", place, "the training diverged: lower lr"
            )
