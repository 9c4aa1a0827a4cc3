"""Which attention kernels a run takes, and whether its examples lie end to end; settled before a model is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from flexlora_ds.errors import UserError
from launch.model.liger import PLAIN_DECODERS
from launch.model.packed_attention import register_packed_sdpa
from launch.options.train_options import TrainOptions

ATTENTION_NAMES = {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}


def attention_of(options: TrainOptions) -> str:
    """transformers' name of the attention kernels; `auto` takes flash where it is installed and can run.

    Raises:
        UserError: flash was asked for where it cannot run.
    """
    chosen = _kernels(options)
    if chosen == "sdpa" and options.padding_free is True:
        return register_packed_sdpa()
    return ATTENTION_NAMES[chosen]


def choose_padding_free(options: TrainOptions, config: Any) -> bool:
    """`padding_free` with `auto` settled for a model's configuration, see `settle_padding_free`.

    Raises:
        UserError: as `attention_of`.
    """
    return settle_padding_free(options, config, attention=_kernels(options), gpu=torch.cuda.is_available())


def settle_padding_free(options: TrainOptions, config: Any, *, attention: str, gpu: bool) -> bool:
    """Whether examples lie end to end; `auto` does so where that is known to be right and faster.

    Right: in decoders that look back through attention alone. Faster: under flash attention, which takes all examples
    at once, and on a CPU. A GPU's sdpa would start one kernel per example and layer; there `auto` pads.
    """
    if options.padding_free != "auto":
        return options.padding_free
    known = config.model_type in PLAIN_DECODERS
    return known and (attention == "flash" or (attention == "sdpa" and not gpu))


def require_separable(model: Any, options: TrainOptions) -> None:
    """See that a model can tell examples apart that lie end to end, where they do.

    Raises:
        UserError: its attention takes no boundaries, or it carries a state from token to token.
    """
    stateful = getattr(model, "_is_stateful", False)
    if options.padding_free is True and (
        stateful or not getattr(model, "_supports_attention_backend", False)
    ):
        raise UserError(
            f"{type(model).__name__} cannot tell examples apart that lie end to end "
            f"({options.place('padding_free')}); leave padding_free at auto"
        )


def _kernels(options: TrainOptions) -> str:
    can_flash = (
        torch.cuda.is_available()
        and options.compute_dtype() != "fp32"
        and importlib.util.find_spec("flash_attn") is not None
    )
    if options.attention == "flash" and not can_flash:
        raise UserError(
            f"attention flash needs a GPU, bf16 or fp16, and the package flash-attn ({options.place('attention')}); "
            "install flash-attn or choose sdpa"
        )
    if options.attention == "auto":
        return "flash" if can_flash else "sdpa"
    return options.attention
