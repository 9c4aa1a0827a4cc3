"""What a run is going to do, decided in one place and before the first weight: no `auto` is left after this."""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora_ds.adapter.inject import check_rank
from flexlora_ds.base_model.precision import Dtype, resolve_dtype
from flexlora_ds.partitions.unsupported import check_refusals, lookup
from launch.data.prepare import resolve_prompt
from launch.distributed.process import choose_accelerator
from launch.engine.adam import adam_settings
from launch.engine.adapter_start import doubts_of, read_start
from launch.engine.deepspeed_check import require_accepted
from launch.engine.ds_config import resolve_ds_config
from launch.engine.ds_json import read_ds_json
from launch.engine.dtype_support import require_dtype
from launch.engine.methods.peft_file import count_parameters
from launch.engine.methods.registry import require_possible
from launch.engine.settled import Settled
from launch.model.attention import Machine, require_separable, resolve_attention, resolve_packed, torch_varlen
from launch.model.computation import Computation
from launch.model.liger import liger_installed, resolve_kernels
from launch.model.skeleton import Skeleton, read_skeleton
from launch.model.torch_compile import (
    blocks_obstacle,
    require_compiler,
    require_replayable,
    require_stage,
    resolve_compile,
    wants_blocks,
)
from launch.options.train_options import TrainOptions
from launch.planning.match_params import match_params
from launch.planning.memory_plan import MemoryPlan, resolve_checkpointing
from launch.trackers.known import require_installed

LEFT_TO_US = (
    "dtype",
    "attention",
    "padding_free",
    "kernels",
    "compile",
    "gradient_checkpointing",
    "micro_batch_size",
)
"""The options of which `auto` is decided here."""


def settle(options: TrainOptions, world_size: int) -> Settled:
    """Decide everything that can be decided without weights, and refuse what cannot run.

    Args:
        world_size: number of processes.

    Raises:
        UserError: an option cannot hold here, the model or the data is missing, or the DeepSpeed JSON
            contradicts the options.
    """
    given = frozenset(key for key in LEFT_TO_US if getattr(options, key) != "auto")
    require_installed(options.track or (), options.place("track"))
    options = resolve_prompt(options)
    choose_accelerator()
    source = read_ds_json(options.ds)
    check_refusals(source.settings, source.origin)
    require_accepted(source)
    dtype = resolve_dtype(options.dtype, gpu=torch.cuda.is_available())
    skeleton = read_skeleton(options.model, options.target_modules)
    if (match := match_params(options, skeleton.shapes)) is not None:
        options = options.replace(rank=match.rank)
    if options.traits.changes_ranks:
        check_rank(options.rank, skeleton.shapes)
    if (start := read_start(options, skeleton.shapes)) is not None:
        skeleton = replace(skeleton, ranks=dict(start.ranks))
    if options.method == "peft":
        skeleton = replace(skeleton, file_parameters=count_parameters(options))
    stage = int(lookup(source.settings, "zero_optimization.stage") or 0)
    computation = _computation(options, dtype, skeleton, stage=stage)
    plan = MemoryPlan(
        options,
        dtype,
        world_size,
        source.settings,
        skeleton,
        False,
        computation.kernels,
        computation.compiled_layers,
    )
    checkpointing = resolve_checkpointing(plan)
    layout = replace(plan, gradient_checkpointing=checkpointing).layout()
    computation = replace(computation, gradient_checkpointing=checkpointing)
    computation = replace(computation, cuda_graphs=options.cuda_graphs)
    require_replayable(
        options.cuda_graphs,
        possible=torch.cuda.is_available() and computation.replayable and options.orth_form == "decoupled",
        place=options.place("cuda_graphs"),
    )
    repeatable = options.replace(dtype=dtype, gradient_checkpointing=checkpointing)
    ds_config = resolve_ds_config(
        source, repeatable, layout, dtype, hidden_size=getattr(skeleton.text_config, "hidden_size", None)
    )
    adam = adam_settings(source, options)
    require_stage(
        options.compile, stage=ds_config["zero_optimization"]["stage"], place=options.place("compile")
    )
    require_possible(options, ds_config["zero_optimization"]["stage"], skeleton.shapes)
    require_dtype(dtype, options.place("dtype"))
    used = repeatable.replace(
        micro_batch_size=layout.micro_batch_size,
        kernels=computation.kernels,
        compile=computation.compiled or False,
        padding_free=computation.packed,
        memory_check=torch.cuda.is_available() if options.memory_check == "auto" else options.memory_check,
    )
    doubts = () if start is None else tuple(doubts_of(start, options))
    return Settled(used, repeatable, given, skeleton, computation, layout, ds_config, adam, match, doubts)


def _computation(options: TrainOptions, dtype: Dtype, skeleton: Skeleton, *, stage: int) -> Computation:
    """How the base computes where activations are kept."""
    config, machine = skeleton.config, Machine.here()
    require_compiler(options.compile, method=options.method, config=config, place=options.place("compile"))
    blocks = wants_blocks(
        options.compile,
        method=options.method,
        config=config,
        stage=stage,
        dtype=dtype,
        kernels=options.kernels,
        gpu=machine.gpu,
    )
    attention = resolve_attention(
        options.attention,
        dtype=dtype,
        packed=options.padding_free,
        place=options.place("attention"),
        machine=machine,
        supported=skeleton.attention,
        works=lambda: torch_varlen(dtype) is not None,
        varlen_first=blocks or options.compile == "blocks",
    )
    packed = resolve_packed(
        options.padding_free, model_type=config.model_type, attention=attention, gpu=machine.gpu
    )
    if packed:
        require_separable(skeleton, options.place("padding_free"))
    # flash-attn counts padding in the middle of a layer; nobody has seen that compiled on a GPU.
    blocks = blocks and attention != "flash" and blocks_obstacle(attention, packed=packed) is None
    compiled = resolve_compile(options.compile, blocks=blocks)
    kernels = resolve_kernels(
        options.kernels,
        compiled=compiled or False if options.compile == "auto" else options.compile,
        config=config,
        gpu=machine.gpu,
        installed=liger_installed(),
        place=options.place("kernels"),
    )
    return Computation(dtype, attention, packed, kernels, compiled, gradient_checkpointing=False)
