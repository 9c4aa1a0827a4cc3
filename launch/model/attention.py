"""Which attention kernels a run takes, and whether its examples lie end to end; settled before a model is loaded."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flexlora_ds.errors import UserError
from launch.model.liger import LLAMA_LIKE
from launch.model.packed_attention import Varlen, register_packed_sdpa, register_packed_varlen, working_varlen
from launch.options.train_options import TrainOptions

ATTENTION_NAMES = {"flash": "flash_attention_2", "varlen": "sdpa", "sdpa": "sdpa", "eager": "eager"}
"""transformers' names; `varlen` and `sdpa` have others where examples lie end to end."""


@dataclass(frozen=True)
class Machine:
    """What decides which kernels can run."""

    gpu: bool
    capability: tuple[int, int] = (0, 0)
    """The GPU's compute capability."""
    flash: bool = False
    """Whether the package flash-attn is installed."""
    varlen: bool = False
    """Whether torch has a variable-length attention."""

    @staticmethod
    def here() -> Machine:
        """This one."""
        gpu = torch.cuda.is_available()
        return Machine(
            gpu=gpu,
            capability=torch.cuda.get_device_capability(_device()) if gpu else (0, 0),
            flash=importlib.util.find_spec("flash_attn") is not None,
            varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        )


def attention_of(options: TrainOptions) -> str:
    """transformers' name of the attention kernels, `auto` settled, for examples end to end or padded.

    Raises:
        UserError: kernels were asked for where they cannot run.
    """
    chosen = _kernels(options)
    if options.padding_free is True and chosen == "varlen":
        varlen = torch_varlen(options.compute_dtype())
        return register_packed_sdpa() if varlen is None else register_packed_varlen(varlen)
    if options.padding_free is True and chosen == "sdpa":
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

    Right: in decoders that look back through attention alone. Faster: under flash and varlen attention, which take all
    examples at once, and on a CPU. A GPU's sdpa would start one kernel per example and layer; there `auto` pads.
    """
    if options.padding_free != "auto":
        return options.padding_free
    known = config.model_type in LLAMA_LIKE
    return known and (attention in ("flash", "varlen") or (attention == "sdpa" and not gpu))


def settle_attention(options: TrainOptions, machine: Machine, works: Callable[[], bool]) -> str:
    """The kernels by our names; `auto` takes flash where it is installed, then varlen where it `works`, else sdpa.

    Raises:
        UserError: flash or varlen was asked for where it cannot run.
    """
    half = options.compute_dtype() != "fp32"
    can_flash = machine.gpu and half and machine.flash
    can_varlen = machine.gpu and half and machine.varlen and machine.capability >= (8, 0)
    if options.attention == "flash" and not can_flash:
        raise UserError(
            f"attention flash needs a GPU, bf16 or fp16, and the package flash-attn ({options.place('attention')}); "
            "install flash-attn or choose auto"
        )
    if options.attention == "varlen" and not (can_varlen and works()):
        raise UserError(
            "attention varlen needs torch 2.10 or later, bf16 or fp16, and a GPU of compute capability 8.0 or more on "
            f"which it computes what sdpa does ({options.place('attention')}); choose auto"
        )
    if options.attention != "auto":
        return options.attention
    if can_flash:
        return "flash"
    return "varlen" if options.padding_free is not False and can_varlen and works() else "sdpa"


@lru_cache
def torch_varlen(dtype: str) -> Varlen | None:
    """torch's variable-length attention, tried on this process's GPU; None, after a warning, where it fails."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        varlen = working_varlen(varlen_attn, _device(), kind)
        reason = "its results are not those of sdpa"
    except Exception as error:  # whatever it is: there are other kernels
        varlen, reason = (
            None,
            f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}",
        )
    if varlen is None:
        warnings.warn(
            f"torch's variable-length attention is left out, which is slower: {reason}", stacklevel=2
        )
    return varlen


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
    return settle_attention(
        options, Machine.here(), lambda: torch_varlen(options.compute_dtype()) is not None
    )


def _device() -> torch.device:
    """The GPU that this process takes, before it has joined the others."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
