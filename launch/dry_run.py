"""`--dry_run true`: everything that can be known of a run without loading its weights, on one page."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flexlora_ds.adapter import linear_names, match_modules
from flexlora_ds.pretrained import load_skeleton, load_tokenizer
from launch.batch_layout import batch_layout
from launch.batches import total_steps
from launch.build import prepare_data, require_data
from launch.ds_config import resolve_ds_config
from launch.examples import IGNORED, TokenisedData
from launch.memory_estimate import MemoryEstimate, MemorySetting, ModelShape, estimate_memory
from launch.options import TrainOptions
from launch.planner import RunPlan, render_plan, trainable_parameters
from launch.processes import world_size_of_environment


def dry_run(options: TrainOptions) -> None:
    """Print the page.

    Raises:
        UserError, DataError: what would also stop the run itself.
    """
    require_data(options)
    tokenizer = load_tokenizer(options.model)
    data = prepare_data(options, tokenizer)
    model = load_skeleton(options.model)
    processes = world_size_of_environment()
    settings = resolve_ds_config(options.ds, options, processes)
    shapes = _shapes(model, options)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = trainable_parameters(shapes, options.rank, with_lambda=options.method == "flexlora")

    def memory(micro: int) -> MemoryEstimate:
        setting = MemorySetting.from_ds_config(
            settings,
            options.compute_dtype(),
            processes,
            gradient_checkpointing=options.gradient_checkpointing is True,
        )
        tokens = micro * int(data.train.lengths.max())
        return estimate_memory(ModelShape.from_config(model.config, parameters), setting, trainable, tokens)

    limit = _device_memory()
    layout = batch_layout(options, processes, lambda micro: memory(micro).total, limit)
    dropped = data.dropped_line()
    print(
        render_plan(
            RunPlan(
                options=options,
                shapes=shapes,
                base_parameters=parameters,
                records=len(data.train),
                total_steps=total_steps(
                    len(data.train), options.epochs, options.batch_size, options.max_steps
                ),
                layout=layout,
                memory=memory(layout.micro_batch_size),
                memory_limit=limit,
                example=_example(data, tokenizer),
                notes=[dropped] if dropped else [],
            )
        )
    )


def _shapes(model: nn.Module, options: TrainOptions) -> dict[str, tuple[int, int]]:
    names = match_modules(linear_names(model), options.target_modules)
    found = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        found[name] = (linear.out_features, linear.in_features)
    return found


def _device_memory() -> float | None:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _example(data: TokenisedData, tokenizer: Any) -> list[tuple[str, bool]]:
    first = data.train[0]
    return [
        (tokenizer.decode([token]), label != IGNORED)
        for token, label in zip(first.input_ids, first.labels, strict=True)
    ]
