"""The optimizer block of a DeepSpeed JSON, as settings of our AdamW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.unsupported import lookup
from launch.engine.ds_config import AUTO, contradiction
from launch.engine.ds_json import DsJson
from launch.options.train_options import TrainOptions


@dataclass(frozen=True)
class AdamSettings:
    """What a user's AdamW block may set of our optimizer."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


def adam_settings(source: DsJson, options: TrainOptions) -> AdamSettings:
    """The AdamW or Adam block of a DeepSpeed JSON as settings of our optimizer; defaults where there is none.

    Raises:
        UserError: another optimizer, a parameter that ours has not, or one that contradicts the options.
    """
    settings, origin = source.settings, source.origin
    block = settings.get("optimizer")
    if block is None:
        return AdamSettings(weight_decay=options.weight_decay)
    kind = lookup(settings, "optimizer.type")
    place = f"{origin}, key optimizer"
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        raise UserError(
            f"optimizer {kind} holds state that rank changes cannot carry over",
            place,
            "remove the block, or use AdamW",
        )
    given = block.get("params") or {}
    if not isinstance(given, Mapping):
        raise UserError("params is no JSON object", f"{place}.params", "write one")
    params = {name: value for name, value in given.items() if value != AUTO}
    unknown = sorted(set(params) - {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"})
    if unknown:
        raise UserError(f"our AdamW has no parameter {unknown[0]}", f"{place}.params", "remove it")
    if params.get("adam_w_mode", True) is not True:
        raise UserError(
            "weight decay is decoupled here", f"{place}.params.adam_w_mode", "remove it or write true"
        )
    for name, wanted in (("lr", options.lr), ("weight_decay", options.weight_decay)):
        if name in params and params[name] != wanted:
            raise contradiction(origin, f"optimizer.params.{name}", params[name], wanted, name, options)
    betas, eps = params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)
    return AdamSettings(_checked_betas(betas, place), _checked_eps(eps, place), options.weight_decay)


def _checked_betas(value: Any, place: str) -> tuple[float, float]:
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in numbers):
        raise UserError(
            f"betas are {json.dumps(value)}", f"{place}.params.betas", "give two numbers in [0, 1)"
        )
    return float(numbers[0]), float(numbers[1])


def _checked_eps(value: Any, place: str) -> float:
    if not _is_number(value) or value <= 0:
        raise UserError(f"eps is {json.dumps(value)}", f"{place}.params.eps", "give a number above 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
