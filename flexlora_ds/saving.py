"""The adapter of a live engine, written in PEFT's format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexlora_ds.adapter.heads import modules_named, trained_beside
from flexlora_ds.adapter.layer import adapters, any_transposed, require_scale
from flexlora_ds.adapter.running_statistics import buffers_of
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.partitions import MASTER, live_shards, require_engine
from flexlora_ds.peft_format import AdapterFactors, TrainedBeside, lora_of, write_adapter


def save_adapter(
    engine: Any,
    folder: str | Path,
    config: FlexLoRAConfig,
    *,
    base_model: str,
    prompt: str | None = None,
    prompt_date: str | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str | None = "CAUSAL_LM",
) -> dict[str, list[float]]:
    """Write P diag(λ) Q of every matrix, from the fp32 masters, as a LoRA with rank and alpha patterns; collective.

    Every process calls it, process 0 writes. The folder appears whole: what was there is replaced at the end.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage, or a `TorchEngine`.
        base_model: what the adapter is for, as `from_pretrained` takes it.
        prompt: the prompt that it was trained with; `python -m eval` asks with the same.
        prompt_date: the date that the chat template was given, as YYYY-MM-DD, where it asks for one.
        modules_to_save: those of `inject_adapters`, written beside the matrices.
        task_type: PEFT's name for what the model is for.

    Returns:
        λ of every matrix on process 0, empty on the others.

    Raises:
        UserError: the engine's model has no adapters, or they were made with another scale. A warning names what is
            trained beside them and not in `modules_to_save`.
        RunError: one holds numbers that are not finite.
    """
    require_engine(engine, "save_adapter")
    layers = adapters(engine.module)
    if not layers:
        raise UserError("the model has no adapters", "save_adapter", "call inject_adapters first")
    require_scale(layers, config)
    writes = engine.global_rank == 0
    names = modules_named(engine.module, modules_to_save)
    heads = {
        n: p for n, p in trained_beside(engine.module).items() if n.startswith(tuple(f"{m}." for m in names))
    }
    _warn_of_unsaved(engine.module, heads)
    masters: dict[nn.Parameter, Tensor] = {}
    shards = live_shards(engine)
    wanted = [p for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)]
    for p, value in shards.read([*wanted, *(p for p in heads.values() if p in shards.pieces)], MASTER):
        if writes:
            masters[p] = value.detach().cpu().clone()
    if not writes:
        return {}
    factors = {n: AdapterFactors(masters[a.P], masters[a.lam], masters[a.Q]) for n, a in layers.items()}
    adapter = lora_of(
        factors,
        config,
        base_model,
        prompt=prompt,
        prompt_date=prompt_date,
        fan_in_fan_out=any_transposed(layers),
    )
    buffers = buffers_of(engine.module, names)
    for p in heads.values():
        if p not in masters:  # in no group of the optimizer, so it is what it was
            masters[p] = p.detach().cpu().clone()
    beside = TrainedBeside(tuple(names), {name: masters[p] for name, p in heads.items()} | buffers)
    write_adapter(Path(folder), replace(adapter, beside=beside, task_type=task_type))
    return {name: matrix.lam.tolist() for name, matrix in factors.items()}


def _warn_of_unsaved(model: nn.Module, heads: Mapping[str, nn.Parameter]) -> None:
    left = [name for name in trained_beside(model) if name not in heads]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"{left[0]}{more} are trained and not saved: name their modules in modules_to_save", stacklevel=3
        )
