"""DeepSpeed's JSON made whole: every `auto` filled from the options; contradictions are errors.

An `auto` that stayed would silently become DeepSpeed's own default.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flexlora_ds.base_model.precision import Dtype
from flexlora_ds.errors import UserError
from flexlora_ds.partitions.unsupported import check_refusals, lookup
from launch.data.batch_layout import BatchLayout
from launch.engine.ds_json import DsJson
from launch.options.train_options import TrainOptions

AUTO = "auto"
QUIET = 1_000_000_000  # steps between DeepSpeed's own progress lines: ours say more
UNKNOWN_HIDDEN = 4096
"""The width that stands in for an unknown hidden size in the sizes of ZeRO's buffers."""

DECIDED: Mapping[str, str] = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "fp16.enabled": "dtype",
    "bf16.enabled": "dtype",
}
"""By dotted path, the option that decides a value."""


def resolve_ds_config(
    source: DsJson,
    options: TrainOptions,
    layout: BatchLayout,
    dtype: Dtype,
    *,
    hidden_size: int | None = None,
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: without `auto`s and optimizer, at one with the options.

    Keys that are DeepSpeed's alone pass through unchanged.

    Args:
        layout: how a global batch is divided.
        hidden_size: the model's width, which sizes ZeRO's `auto` buffers; 4096 if unknown.

    Raises:
        UserError: a value contradicts the options; a setting cannot be carried through rank changes; an `auto` stands
            where no value is known.
    """
    settings, origin = copy.deepcopy(dict(source.settings)), source.origin
    check_refusals(settings, origin)
    settings.pop("optimizer", None)
    stage = settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
    for key, decided in _decided(options, layout, dtype).items():
        _write(settings, key, decided, origin, options)
    _fill(settings, _known_autos(stage, hidden_size or UNKNOWN_HIDDEN))
    settings.setdefault("steps_per_print", QUIET)
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    for path in auto_paths(settings):
        raise UserError(
            "no value is known for this auto", f"{origin}, key {path}", "write one, or remove the key"
        )
    return settings


def auto_paths(value: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of every `auto` inside nested objects and lists."""
    if value == AUTO:
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from auto_paths(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from auto_paths(item, f"{path}[{index}]")


@dataclass(frozen=True)
class _Decided:
    """A value that an option decides, and which one."""

    value: Any
    option: str


def _decided(options: TrainOptions, layout: BatchLayout, dtype: Dtype) -> dict[str, _Decided]:
    """By dotted path, what the JSON must say unless it says `auto` or nothing."""
    values = (
        layout.batch_size,
        layout.micro_batch_size,
        layout.accumulation_steps,
        options.max_grad_norm,
        dtype == "fp16",
        dtype == "bf16",
    )
    return {
        path: _Decided(value, option) for (path, option), value in zip(DECIDED.items(), values, strict=True)
    }


def _write(
    settings: dict[str, Any], dotted: str, decided: _Decided, origin: str, options: TrainOptions
) -> None:
    """Write a decided value where the JSON has none or `auto`; refuse another one."""
    *parents, last = dotted.split(".")
    block = settings
    for parent in parents:
        block = block.setdefault(parent, {})
    given = block.setdefault(last, AUTO)
    if given == AUTO:
        block[last] = decided.value
    elif given != decided.value:
        raise contradiction(origin, dotted, given, decided.value, decided.option, options)


def contradiction(
    origin: str, dotted: str, given: Any, wanted: Any, key: str, options: TrainOptions
) -> UserError:
    """The error for a JSON that says `given` at a path where the option `key` asks for another value."""
    set_at = options.places.get(key, "its default")
    return UserError(
        f"{json.dumps(given)} contradicts the option {key} ({set_at}), which asks for {json.dumps(wanted)}",
        f"{origin}, key {dotted}",
        f'write "auto" there, or change {key}',
    )


def _known_autos(stage: int, hidden: int) -> dict[str, Any]:
    """Values for the other `auto`s that DeepSpeed files commonly hold, by dotted path.

    The buffer sizes follow transformers' rule: hidden², 0.9 · hidden² and 10 · hidden elements. The rest
    are DeepSpeed's own defaults, said aloud.
    """
    zero = {
        "reduce_bucket_size": hidden * hidden,
        "allgather_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "sub_group_size": 1_000_000_000,
        "overlap_comm": stage == 3,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "offload_optimizer.device": "none",
        "offload_optimizer.pin_memory": True,
        "offload_param.device": "none",
        "offload_param.pin_memory": True,
    }
    fp16 = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return {
        **{f"zero_optimization.{key}": value for key, value in zero.items()},
        **{f"fp16.{key}": value for key, value in fp16.items()},
        "fp16.auto_cast": False,
        "fp16.min_loss_scale": 1,
        "steps_per_print": QUIET,
        "wall_clock_breakdown": False,
        "communication_data_type": None,
        "data_types.grad_accum_dtype": None,
        "data_types.param_dtype": None,
    }


def _fill(settings: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Replace the `auto`s whose value is known; None removes the key."""
    for dotted in list(auto_paths(settings)):
        if dotted not in known:
            continue
        *parents, last = dotted.split(".")
        block = lookup(settings, ".".join(parents)) if parents else settings
        block[last] = known[dotted]
        if block[last] is None:
            del block[last]
