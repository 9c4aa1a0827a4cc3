"""The precision that a model is loaded in: the same answer for training and evaluation."""

from __future__ import annotations

from typing import Literal, cast

import torch

Dtype = Literal["fp32", "bf16", "fp16"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(asked: str, *, gpu: bool) -> Dtype:
    """`auto` is bf16 on a GPU that computes it, fp16 on an older one, and fp32 on a CPU.

    Args:
        asked: auto, fp32, bf16 or fp16.
        gpu: whether the model goes to a GPU; what that GPU computes is torch's to say.
    """
    if asked != "auto":
        return cast(Dtype, asked)
    if not gpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
