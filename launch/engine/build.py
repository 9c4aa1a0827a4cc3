"""From options to an engine: data, model, adapter, optimizer, DeepSpeed. Everything before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.prompt import CHAT
from data_prep.records import is_chat, load_entries
from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer
from flexlora_ds.checkpoint.state import set_ranks
from flexlora_ds.errors import UserError
from flexlora_ds.partitions import fuse_gradient_checks
from flexlora_ds.schedule import resolve_calendar
from launch.data.bar import Bar
from launch.data.batch_layout import BatchLayout
from launch.data.batches import Cut, TrainingBatches, ValidationBatches, total_steps
from launch.data.encoding import Encoding, all_cores, tokenise
from launch.data.examples import TokenisedData, arrange
from launch.data.token_cache import Tokenised, cached, content_key
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

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Data:
    """What a run reads: this process's batches, and how many steps they make."""

    tokenised: TokenisedData
    train: TrainingBatches
    validation: ValidationBatches | None
    steps: int


def prepare_data(options: TrainOptions, tokenizer: Any) -> TokenisedData:
    """Tokenise the records, or find them tokenised already, and see that rank changes fit the steps they make.

    Raises:
        UserError, DataError: the file is missing or malformed, nothing is left to train on, or the freeze would begin
            before the start of the rank changes.
        RunError: the cache of tokenised data cannot be written.
    """
    path = require_data(options)
    how = Encoding(options.prompt, options.cutoff_len, options.train_on_inputs, place=str(path))
    settings = {"prompt": how.prompt, "cutoff_len": how.cutoff_len, "train_on_inputs": how.train_on_inputs}

    def make() -> Tokenised:
        entries = load_entries(path)
        with all_cores():
            return tokenise(entries, tokenizer, how, Bar("tokenising", len(entries)).show)

    examples, dropped = cached(content_key(path, tokenizer, settings), make)
    data = arrange(
        examples, dropped, cutoff_len=options.cutoff_len, val_size=options.val_size, seed=options.seed
    )
    if options.method == "flexlora":
        resolve_calendar(steps_of(options, data), options.to_flexlora_config())
    return data


def settle_prompt(options: TrainOptions) -> TrainOptions:
    """The options with the prompt that the data needs: chats are always read through the tokenizer's chat template.

    Raises:
        UserError, DataError: the file is missing, or its beginning is malformed.
    """
    return options.replace(prompt=CHAT) if is_chat(require_data(options)) else options


def steps_of(options: TrainOptions, data: TokenisedData) -> int:
    """The steps of a run."""
    return total_steps(len(data.train), options.epochs, options.batch_size, options.max_steps)


def require_data(options: TrainOptions) -> Path:
    """The data file; said at once where it is missing, before a model is loaded for nothing."""
    path = Path(options.data)
    if not path.exists():
        raise UserError(
            f"no training data at {path} ({options.place('data')}); build it with `python -m data_prep --out data`, "
            "or name another file with --data"
        )
    return path


def cut_batches(
    options: TrainOptions, data: TokenisedData, layout: BatchLayout, process: Process, pad: int
) -> Data:
    """Share the data over the processes."""
    cut = Cut(process.world_size, process.rank, layout.micro_batch_size)
    steps = steps_of(options, data)
    free = options.padding_free is True
    validation = None
    if len(data.validation):
        validation = ValidationBatches(data.validation, cut, pad, padding_free=free)
    train = TrainingBatches(
        data.train,
        options.batch_size,
        options.seed,
        cut,
        pad,
        padding_free=free,
        group_by_length=options.group_by_length,
    )
    return Data(data, train, validation, steps)


def build_engine(
    options: TrainOptions,
    ds_config: dict[str, Any],
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
        zero3=ds_config if stage == 3 else None,
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
        config=ds_config,
    )
    fuse_gradient_checks(engine)
    torch.manual_seed(
        options.seed * 1009 + process.rank
    )  # PEFT's own dropout; FlexLoRA's masks have named seeds
    return engine, method


def require_dtype(options: TrainOptions) -> None:
    """Said before the data is read; after `join_processes`, which chooses DeepSpeed's accelerator.

    Raises:
        UserError: DeepSpeed cannot compute in this precision here.
    """
    from deepspeed.accelerator import get_accelerator

    if options.compute_dtype() == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            f"DeepSpeed computes no fp16 on this device ({options.place('dtype')}); choose dtype bf16 or fp32"
        )


def load_tokenizer_of(options: TrainOptions) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(options.model)
