"""Triton's kernels on a CPU, by its interpreter: ours that drops, and Liger's. Run in a process of its own.

`TRITON_INTERPRET=1` counts when a kernel's module is imported. Two things the interpreter of Triton 3.9 cannot do are
added here: a float argument as a tensor (`eps.to` in Liger's norm), and libdevice's rsqrt.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    """1 / √x: libdevice's, which Liger's norm calls, is compiled code for a GPU."""
    return 1.0 / tl.sqrt(x)


def differing_bits() -> int:
    """Of 48 passes of our kernel, how many values are not the input's where the written mask keeps, else 0."""
    from flexlora_ds.dropout.apply import split_rate
    from flexlora_ds.dropout.gpu_kernel import TritonKernel
    from flexlora_ds.dropout.mask import keep_mask

    kernel = TritonKernel()
    wrong = 0
    drawn = torch.Generator().manual_seed(3)
    for number in range(48):
        rows, features = (1, 3, 7)[number % 3], (1, 4, 203, 2049)[number % 4]
        rate = (0.05, 0.5, 0.9)[number % 3]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number // 16]
        values = torch.randn(rows, features + 5, generator=drawn).to(dtype)[:, 2 : features + 2]
        keys = torch.randint(-(2**62), 2**62, (rows,), generator=drawn)
        matrix = torch.randint(-(2**62), 2**62, (1,), generator=drawn)
        found = kernel(values, keys, matrix, *split_rate(rate))
        kept = keep_mask(keys, int(matrix), features, rate)
        wrong += int((found != torch.where(kept, values, 0)).sum())
    return wrong


def liger_apart() -> dict[str, float]:
    """A Llama's loss and gradients with Liger's kernels and without: the loss, and the largest differences."""
    from launch.model.liger import apply_liger
    from tests.helpers import tiny

    torch.manual_seed(0)
    model: Any = tiny.tiny_llama().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    plain = _loss_and_gradients(model, ids)
    _complete_the_interpreter()
    apply_liger(model)
    assert repr(model.model.norm).startswith("LigerRMSNorm"), "Liger's norm is in place"
    fused = _loss_and_gradients(model, ids)
    return {
        "loss": plain[0],
        "loss apart": abs(fused[0] - plain[0]),
        "gradients apart": max(float((a - b).abs().max()) for a, b in zip(plain[1], fused[1], strict=True)),
        "largest gradient": max(float(gradient.abs().max()) for gradient in plain[1]),
    }


def _loss_and_gradients(model: Any, ids: Tensor) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def _complete_the_interpreter() -> None:
    from liger_kernel.ops import rms_norm

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = rsqrt


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps({"differing_bits": differing_bits, "liger_apart": liger_apart}[sys.argv[1]]()))
