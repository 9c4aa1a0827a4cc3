"""Which attention kernels a run takes, and whether its examples are packed; decided before a model is loaded."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

import torch

from flexlora_ds.base_model.precision import Dtype
from flexlora_ds.base_model.source import LONGEST_TEXT
from flexlora_ds.config import Auto
from flexlora_ds.devices import gpu_of_process
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import one_line
from launch.model.liger import LLAMA_LIKE
from launch.model.packed_attention import (
    Varlen,
    flash_varlen,
    register_packed_sdpa,
    register_packed_varlen,
    working_varlen,
)
from launch.model.skeleton import Skeleton
from launch.options.train_options import Attention

ATTENTION_NAMES = {"flash": "flash_attention_2", "varlen": "sdpa", "sdpa": "sdpa", "eager": "eager"}
"""transformers' names; `varlen` and `sdpa` have others where examples are packed."""


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


def resolve_attention(
    asked: Attention | Auto,
    *,
    dtype: Dtype,
    packed: bool | Auto,
    place: str,
    machine: Machine,
    works: Callable[[], bool],
    supported: Collection[str] = ("eager", "sdpa", "flash_attention_2"),
    varlen_first: bool = False,
) -> Attention:
    """The kernels by our names; `auto` takes flash where it is installed, then varlen where it `works`, sdpa, eager.

    Args:
        packed: whether examples will be packed; varlen gains nothing where they are padded.
        place: where `asked` was given, for messages.
        works: whether varlen computes what sdpa does here; called only where it might be taken.
        supported: what the model's class has, under transformers' names.
        varlen_first: take varlen before flash: compiled layers take packed examples under varlen alone.

    Raises:
        UserError: the model has not what was asked for, or flash or varlen cannot run here.
    """
    half = dtype != "fp32"
    can_flash = machine.gpu and half and machine.flash
    can_varlen = machine.gpu and half and machine.varlen and machine.capability >= (8, 0)
    if asked == "flash" and not can_flash:
        raise UserError(
            "attention flash needs a GPU, bf16 or fp16, and the package flash-attn",
            place,
            "install flash-attn or choose auto",
        )
    if asked == "varlen" and not (can_varlen and works()):
        raise UserError(
            "attention varlen needs torch 2.10 or later, bf16 or fp16, and a GPU of compute "
            "capability 8.0 or more on which it computes what sdpa does",
            place,
            "choose auto",
        )
    if asked != "auto":
        if ATTENTION_NAMES[asked] not in supported:
            raise UserError(f"this model has no attention {asked}", place, "choose auto or eager")
        return asked
    has_flash = can_flash and ATTENTION_NAMES["flash"] in supported
    if has_flash and not varlen_first:
        return "flash"
    if ATTENTION_NAMES["sdpa"] not in supported:
        return "flash" if has_flash else "eager"
    if packed is not False and can_varlen and works():
        return "varlen"
    return "flash" if has_flash else "sdpa"


def resolve_packed(asked: bool | Auto, *, model_type: str, attention: Attention, gpu: bool) -> bool:
    """Whether examples are packed; `auto` does so where that is known to be right and faster.

    Right: in decoders that look back through attention alone. Faster: under flash and varlen attention, which take all
    examples at once, and on a CPU. A GPU's sdpa would start one kernel per example and layer; there `auto` pads.
    """
    if asked != "auto":
        return asked
    fast = attention in ("flash", "varlen") or (attention == "sdpa" and not gpu)
    return model_type in LLAMA_LIKE and fast


def implementation_of(attention: Attention, *, dtype: Dtype, packed: bool) -> str:
    """transformers' name of the kernels, for packed or padded examples; ours are made known to it first."""
    if packed and attention == "varlen":
        varlen = torch_varlen(dtype)
        return register_packed_sdpa() if varlen is None else register_packed_varlen(varlen)
    if packed and attention == "sdpa":
        return register_packed_sdpa()
    return ATTENTION_NAMES[attention]


@lru_cache
def torch_varlen(dtype: str) -> Varlen | None:
    """torch's variable-length attention, tried on this process's GPU; None, after a warning, where it fails."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        varlen = working_varlen((flash_varlen, varlen_attn), _device(), kind)
        reason = "its results are not those of sdpa"
    except Exception as error:  # whatever it is: there are other kernels
        varlen, reason = None, f"{type(error).__name__}: {one_line(str(error), LONGEST_TEXT) or 'no text'}"
    if varlen is None:
        warnings.warn(
            f"torch's variable-length attention is left out, which is slower: {reason}", stacklevel=2
        )
    return varlen


def require_separable(skeleton: Skeleton, place: str) -> None:
    """See that a model can keep packed examples apart.

    Args:
        place: where packing was asked for, for messages.

    Raises:
        UserError: its attention takes no boundaries, or it carries a state from token to token.
    """
    if not skeleton.separable:
        raise UserError(
            f"{skeleton.name} cannot keep packed examples apart", place, "leave padding_free at auto"
        )


def _device() -> torch.device:
    """The GPU that this process takes, before it has joined the others."""
    return torch.device("cuda", gpu_of_process(torch.cuda.device_count()))
