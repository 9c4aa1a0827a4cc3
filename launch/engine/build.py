"""From settled options to an engine: model, adapter, optimizer, DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flexlora_ds.base_model.loading import load_causal_lm
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.state import set_ranks
from flexlora_ds.partitions import fuse_gradient_checks
from launch.distributed.process import Process
from launch.engine.ds_config import adam_settings
from launch.engine.lr_schedule import build_lr_scheduler
from launch.engine.methods import Method, build_method
from launch.model.attention import attention_of, require_separable
from launch.model.compiled_blocks import compile_blocks
from launch.model.head_loss import install_head_loss
from launch.model.liger import apply_liger
from launch.model.torch_compile import compile_pieces
from launch.options.train_options import TrainOptions


def build_engine(
    options: TrainOptions,
    ds_config: Mapping[str, Any],
    steps: int,
    process: Process,
    ranks: Mapping[str, int] | None = None,
) -> tuple[Any, Method]:
    """Load the model, adapt it, and wrap it in a DeepSpeed engine.

    `ranks` are those of a checkpoint to be continued; None begins with the options' rank everywhere.

    Raises:
        UserError: the model is missing or gated, or the adapter does not fit it.
    """
    import deepspeed

    method = build_method(options)
    stage = ds_config["zero_optimization"]["stage"]
    model = load_causal_lm(
        options.model,
        dtype=TORCH_DTYPES[options.compute_dtype()],
        attention=attention_of(options),
        device=None if stage == 3 else process.device,
        zero3=dict(ds_config) if stage == 3 else None,
    )
    require_separable(model, options)
    install_head_loss(model)
    if options.kernels == "liger":
        apply_liger(model)
    if options.compile in (True, "pieces"):
        compile_pieces(model)
    trained = method.adapt(model)
    if options.compile == "blocks":
        compile_blocks(trained)
    if ranks is not None:
        set_ranks(trained, ranks)
    if options.gradient_checkpointing is True:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained.train()
    optimizer = method.optimizer(trained, adam_settings(options.ds, options))
    engine, *_ = deepspeed.initialize(
        model=trained,
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(optimizer, options, steps),
        config=dict(ds_config),
    )
    fuse_gradient_checks(engine)
    torch.manual_seed(
        options.seed * 1009 + process.rank
    )  # PEFT's own dropout; FlexLoRA's masks have named seeds
    return engine, method
