"""What a DeepSpeed JSON may not ask for: the training state could not be carried through a rank change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexlora_ds.errors import UserError
from flexlora_ds.fields import quote

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused while `when` holds of its value; `because` and `instead` make the message."""

    key: str
    """Dotted path."""
    because: str
    instead: str = "remove it"
    when: Callable[[Any], bool] = bool


def check_refusals(settings: Settings, origin: str) -> None:
    """Refuse the settings that FlexLoRA's training state cannot follow.

    Raises:
        UserError: the first such setting, why, and what to do.
    """
    for refusal in REFUSALS:
        value = lookup(settings, refusal.key)
        if value is not None and refusal.when(value):
            raise UserError(refusal.because, f"{origin}, key {refusal.key}", f"{refusal.instead}")
    for key in REMOVED_UPSTREAM:
        if lookup(settings, key) is not None:
            raise UserError("DeepSpeed has removed this setting", f"{origin}, key {key}", "remove it")
    _check_stage(settings, origin)


def lookup(settings: Settings, dotted: str) -> Any:
    """The value at a dotted path, None where it is absent."""
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def is_enabled(block: Any) -> bool:
    """Whether a block asks for its feature: most have `enabled`, which defaults to false."""
    return bool(block.get("enabled", False)) if isinstance(block, Mapping) else bool(block)


def _is_nvme(device: Any) -> bool:
    return bool(device == "nvme")


def _not_one(value: Any) -> bool:
    return bool(value != 1)


def _above_one(value: Any) -> bool:
    return not isinstance(value, (int, float)) or value > 1


_ZERO = "zero_optimization"
_QUANTISED = "quantised weights or gradients have no exact master to carry over"
_PARALLEL = "only data parallelism is supported: ZeRO shards over all processes"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "scheduler",
        "the learning rate follows the options lr_schedule, warmup_steps and min_lr_ratio",
        "remove the scheduler block and set those",
    ),
    Refusal(
        f"{_ZERO}.offload_optimizer.device",
        "optimizer state on NVMe cannot be carried through a rank change",
        'write "cpu"',
        _is_nvme,
    ),
    Refusal(
        f"{_ZERO}.offload_param.device",
        "parameters on NVMe cannot be resized at a rank change",
        'write "cpu"',
        _is_nvme,
    ),
    Refusal(
        f"{_ZERO}.offload_optimizer.ratio",
        "a partly offloaded optimizer has its state in two places",
        "write 1.0 or remove it",
        _not_one,
    ),
    Refusal(f"{_ZERO}.offload_optimizer.super_offload", "SuperOffload replaces our optimizer"),
    Refusal(f"{_ZERO}.zenflow", "ZenFlow replaces our optimizer"),
    Refusal(
        f"{_ZERO}.zero_hpz_partition_size",
        "hpZ keeps a second partition that rank changes do not resize",
        when=_above_one,
    ),
    Refusal(f"{_ZERO}.zero_quantized_weights", _QUANTISED),
    Refusal(f"{_ZERO}.zero_quantized_nontrainable_weights", _QUANTISED),
    Refusal(f"{_ZERO}.zero_quantized_gradients", _QUANTISED),
    Refusal("weight_quantization", _QUANTISED),
    Refusal(
        f"{_ZERO}.leaf_module",
        "leaf modules fetch their parameters together, which rank changes do not track",
    ),
    Refusal(f"{_ZERO}.legacy_stage1", "the old stage 1 has another layout of its partitions"),
    Refusal("bf16.bf16_master_weights_and_grads", "rank changes read and write fp32 masters"),
    Refusal("bf16.bf16_optimizer_states", "rank changes read and write fp32 optimizer states"),
    Refusal("fp16.fp16_master_weights_and_grads", "rank changes read and write fp32 masters"),
    Refusal(
        "torch_autocast",
        "precision is set once, by the option dtype",
        "remove it and set dtype to bf16 or fp16",
        is_enabled,
    ),
    Refusal(
        "data_types.param_dtype",
        "precision is set once, by the option dtype",
        "remove it and set dtype",
        lambda value: value != "auto",
    ),
    Refusal("pipeline", _PARALLEL),
    Refusal("tensor_parallel", _PARALLEL),
    Refusal("expert_parallel", _PARALLEL),
    Refusal("moe", _PARALLEL),
    Refusal("sequence_parallel_size", _PARALLEL, when=_above_one),
    Refusal("hybrid_engine", "the hybrid engine swaps modules that hold adapters", when=is_enabled),
    Refusal("data_efficiency", "the order and length of the data are the run's own", when=is_enabled),
    Refusal("autotuning", "autotuning restarts runs with other settings than the options", when=is_enabled),
    Refusal("compile.deepcompile", "DeepCompile traces shapes that rank changes alter"),
    Refusal(
        "gradient_allreduce_op",
        "the loss is scaled for gradients averaged over processes",
        'write "mean" or remove it',
        lambda value: value != "mean",
    ),
    Refusal(
        "managed_gradient_accumulation",
        "the engine has to know where an accumulation ends",
        "write true or remove it",
        lambda value: value is False,
    ),
    Refusal(
        "zero_allow_untested_optimizer",
        "FlexLoRA's optimizer is one that DeepSpeed does not know",
        "write true or remove it",
        lambda value: value is False,
    ),
    Refusal(
        "zero_force_ds_cpu_optimizer",
        "DeepSpeed's CPU Adam cannot hold an age per element",
        "write false or remove it",
        lambda value: value is True,
    ),
)

REMOVED_UPSTREAM = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    f"{_ZERO}.mics_shard_size",
)
"""Settings that DeepSpeed 0.19 refuses itself, with a traceback."""


def _check_stage(settings: Settings, origin: str) -> None:
    """What is refused at some stages only."""
    stage = lookup(settings, f"{_ZERO}.stage")
    stage = 0 if stage is None else stage
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        written = quote(stage, text=False)
        bare = ", as a number without quotation marks" if isinstance(stage, str) else ""
        raise UserError(
            f"ZeRO stage {written} does not exist", f"{origin}, key {_ZERO}.stage", f"give 0, 1, 2 or 3{bare}"
        )
    for block, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = lookup(settings, f"{_ZERO}.{block}.device")
        if device not in (None, "none") and stage < least:
            raise UserError(
                f"{block} does nothing at ZeRO stage {stage}",
                f"{origin}, key {_ZERO}.{block}",
                f"use stage {least} or above, or remove it",
            )
    _check_scaling(settings, stage, origin)
    accumulate = lookup(settings, "data_types.grad_accum_dtype")
    if accumulate not in (None, "auto") and stage < 2:
        raise UserError(
            f"at ZeRO stage {stage} a grad_accum_dtype leads to an optimizer wrapper whose state "
            "we do not carry",
            f"{origin}, key data_types.grad_accum_dtype",
            "use stage 2 or 3, or remove it",
        )


def _check_scaling(settings: Settings, stage: int, origin: str) -> None:
    """What DeepSpeed refuses where it reduces and scatters gradients in one, once the model is loaded."""
    if stage < 2 or lookup(settings, f"{_ZERO}.reduce_scatter") is False:
        return
    for key, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if lookup(settings, key) not in (None, "auto", harmless):
            raise UserError(
                f"ZeRO stage {stage} cannot do it while reduce_scatter is true",
                f"{origin}, key {key}",
                f"remove it, or write false for {_ZERO}.reduce_scatter",
            )
