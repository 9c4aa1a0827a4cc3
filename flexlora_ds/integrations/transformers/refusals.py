"""What rank changes cannot follow in a trainer: refused in one line, before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from flexlora_ds.adapter.layer import adapters
from flexlora_ds.errors import UserError
from flexlora_ds.integrations.transformers.deepspeed_json import deepspeed_settings
from flexlora_ds.optimizer import FlexLoRAAdamW
from flexlora_ds.partitions.unsupported import check_refusals

_DEEPSPEED = "the DeepSpeed configuration"


def refuse(trainer: Any) -> None:
    """Look at a trainer's arguments.

    Raises:
        UserError: the first setting that rank changes cannot follow, and what to do.
    """
    for fault, place, mend in _faults(trainer):
        raise UserError(fault, place, mend)
    if trainer.is_deepspeed_enabled:
        settings = deepspeed_settings(trainer)
        for block, mend in (
            (
                "optimizer",
                "remove the block: learning_rate, adam_beta1, adam_beta2 and adam_epsilon are used",
            ),
            ("scheduler", "remove the block: lr_scheduler_type and warmup_steps are used"),
        ):
            if block in settings:
                raise UserError(f"the trainer brings its own {block}", f"{_DEEPSPEED}, key {block}", mend)
        check_refusals(settings, _DEEPSPEED)
    _look_at_fp16(trainer)


def refuse_another_reference(trainer: Any) -> None:
    """TRL's trainers load a reference by the name of the model's base, unless they are given one.

    Raises:
        UserError: the model's adapters have learnt something, so that its base is not what the run begins with.
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is None or adapters(reference):
        return
    learnt = [n for n, layer in adapters(trainer.model).items() if _values(layer.lam).any()]
    if learnt:
        raise UserError(
            f"the reference would be the base without what the adapters have learnt, such as {learnt[0]}",
            "ref_model",
            "give ref_model=copy.deepcopy(model), at ZeRO-0 to 2, or begin with the merged model "
            "(flexlora_ds.export --to merged)",
        )


def _values(p: Any) -> Any:
    """A parameter's values, or this process's part of them at ZeRO-3."""
    return getattr(p, "ds_tensor", p).detach()


def refuse_copies_of_weights(trainer: Any) -> None:
    """Before training, when all callbacks are there.

    Raises:
        UserError: one of TRL's mixes the model's weights into another model, parameter by parameter: those of the
            reference or teacher are the base's alone.
    """
    for callback in trainer.callback_handler.callbacks:
        names = {kind.__name__ for kind in type(callback).__mro__}
        if names & {"SyncRefModelCallback", "BEMACallback"}:
            raise UserError(
                "it mixes the model's parameters into another model, which has no adapters",
                type(callback).__name__,
                "leave it out (sync_ref_model, or what makes a teacher follow)",
            )


def _look_at_fp16(trainer: Any) -> None:
    """On a device without fp16 DeepSpeed fails deep inside; accelerate computes in fp32 on a CPU, without a word."""
    if not trainer.args.fp16:
        return
    if trainer.is_deepspeed_enabled:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise UserError("DeepSpeed computes no fp16 on this device", "fp16", "leave it out, or use bf16")
    elif trainer.args.device.type == "cpu":
        warnings.warn("fp16 has no effect on a CPU: this run computes in fp32", stacklevel=4)


def _faults(trainer: Any) -> Iterator[tuple[str, str, str]]:
    args, model = trainer.args, trainer.model
    if trainer.model_init is not None:
        yield "a model made anew for every run loses its adapters", "model_init", "give the model itself"
    if hasattr(model, "peft_config"):
        yield (
            "the model carries an adapter of PEFT's already",
            "model",
            "give the base model, without peft_config",
        )
    if trainer.is_fsdp_enabled:
        yield (
            "FSDP's flat parameters cannot be resized",
            "fsdp",
            "use DeepSpeed's ZeRO, or torchrun without fsdp",
        )
    if args.n_gpu > 1:
        yield (
            f"one process would drive {args.n_gpu} GPUs",
            "DataParallel",
            "start one process a GPU with torchrun",
        )
    if args.save_only_model and args.load_best_model_at_end:
        yield (
            "the best checkpoint is found again by its training state, which save_only_model leaves out",
            "save_only_model",
            "leave it out, or load_best_model_at_end",
        )
    if getattr(args, "use_vllm", False):
        yield (
            "vLLM gets weights by their names, and knows none of P, λ and Q",
            "use_vllm",
            "leave it out: the model itself generates",
        )
    if args.torch_compile:
        yield "compiled code holds the ranks fast", "torch_compile", "leave it out"
    if not _replaces_adamw(args.optim):
        yield f"{_word(args.optim)} is not ours", "optim", "leave it out: FlexLoRA's AdamW is used"
    if trainer.optimizer is not None and not isinstance(trainer.optimizer, FlexLoRAAdamW):
        yield (
            f"a {type(trainer.optimizer).__name__} keeps no age per element",
            "optimizers",
            "leave it out, or build it with flexlora_ds.build_optimizer",
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        yield "FlexLoRA brings its own AdamW", "optimizer_cls_and_kwargs", "leave it out"
    if _word(args.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy"):
        yield (
            "its state is no function of the step, and cannot be carried",
            "lr_scheduler_type",
            "choose linear, cosine or constant",
        )


def _replaces_adamw(optim: Any) -> bool:
    """Whether ours may stand in: the Trainer's default, and the other AdamWs of torch."""
    return _word(optim).startswith("adamw_torch") and "8bit" not in _word(optim)


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
