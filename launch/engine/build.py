"""From settled options to an engine: model, adapter, optimizer, DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from flexlora_ds.base_model.loading import load_causal_lm
from flexlora_ds.base_model.own_dropout import turn_off_dropout
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.state import set_ranks
from flexlora_ds.partitions.fewer_launches import spare_launches
from launch.distributed.process import Process
from launch.engine.deepspeed_check import late_refusals
from launch.engine.ds_json import DsJson
from launch.engine.lr_schedule import build_lr_scheduler
from launch.engine.methods.protocol import ANEW, Beginning, Method
from launch.engine.methods.registry import build_method
from launch.engine.settled import Settled
from launch.model.attention import implementation_of
from launch.model.compiled_blocks import compile_blocks
from launch.model.head_loss import install_head_loss
from launch.model.liger import LLAMA_LIKE, apply_liger
from launch.model.packing_probe import require_kept_apart
from launch.model.torch_compile import compile_pieces

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def build_engine(
    settled: Settled,
    steps: int,
    process: Process,
    ranks: Mapping[str, int] | None = None,
    beginning: Beginning = ANEW,
) -> tuple[DeepSpeedEngine, Method]:
    """Load the model, adapt it, and wrap it in a DeepSpeed engine.

    `ranks` are those of a checkpoint to be continued; None begins with the options' rank everywhere.
    `beginning` is what the method may look at before the model is adapted.

    Raises:
        UserError: the model is missing or gated, the adapter does not fit it, or it mixes packed examples.
    """
    import deepspeed

    options, ds_config = settled.options, dict(settled.ds_config)
    method = build_method(options)
    model = load_base(settled, process)
    if settled.computation.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = method.adapt(model, beginning)
    if settled.computation.compiled == "blocks":
        replayed = settled.computation.cuda_graphs
        compile_blocks(trained, or_plain="compile" not in settled.given, replayed=replayed)
    if ranks is not None:
        set_ranks(trained, ranks)
    trained.train()
    optimizer = method.optimizer(trained, settled.adam)
    with late_refusals(DsJson(ds_config, options.ds)):
        engine, *_ = deepspeed.initialize(
            model=trained,
            optimizer=optimizer,
            lr_scheduler=build_lr_scheduler(optimizer, options, steps),
            config=ds_config,
        )
    if beginning.adapter is not None:
        # Process 0's P, λ and Q, to all.
        beginning.adapter.write(engine)
    spare_launches(engine)
    _try_packing(engine, settled, process)
    # PEFT's own dropout; FlexLoRA's masks have named seeds.
    torch.manual_seed((options.seed * 1009 + process.rank) % 2**64)
    return engine, method


def _try_packing(engine: DeepSpeedEngine, settled: Settled, process: Process) -> None:
    """See that packed examples stay apart, in models that are packed only because that was asked for."""
    computation, config = settled.computation, settled.skeleton.config
    if not computation.packed or config.model_type in LLAMA_LIKE:
        return
    require_kept_apart(
        engine,
        process.device,
        TORCH_DTYPES[computation.dtype],
        settled.skeleton.vocabulary.inputs,
        computation.attention,
        settled.options.place("padding_free"),
    )


def load_base(settled: Settled, process: Process) -> Any:
    """The base model with the kernels that it computes with, on this process's device or in ZeRO-3's partitions."""
    options, computation = settled.options, settled.computation
    model = load_causal_lm(
        options.model,
        dtype=TORCH_DTYPES[computation.dtype],
        attention=implementation_of(
            computation.attention, dtype=computation.dtype, packed=computation.packed
        ),
        device=None if settled.stage == 3 else process.device,
        zero3=dict(settled.ds_config) if settled.stage == 3 else None,
    )
    turn_off_dropout(model)
    if not options.traits.trains_base:  # it gives its head no gradient
        install_head_loss(model)
    if computation.kernels == "liger":
        apply_liger(model)
    if computation.compiled == "pieces":
        compile_pieces(model)
    return model
