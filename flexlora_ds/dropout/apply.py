"""How a dropout mask meets the values: computed in one fused kernel, never written, or written once and multiplied.

A written mask takes a dozen passes over memory for every linear layer: a tenth of a step on a CPU, on a GPU more than
the adapter itself. So a CPU has a pass in C (`flexlora_ds.dropout.cpu_kernel`), and a GPU one in Triton. Each is
verified once against the written mask, which serves wherever it fails, on devices of other kinds, and as the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flexlora_ds.dropout.cpu_kernel import HostKernel
from flexlora_ds.dropout.mask import dropped, keep_mask, split_rate


class Kernel(Protocol):
    """`flexlora_ds.dropout.mask.dropped`, compiled. It may write into `out`, which may be `values`."""

    def __call__(
        self,
        values: Tensor,
        row_keys: Tensor,
        matrix_key: Tensor,
        whole: int,
        part: int,
        /,
        *,
        out: Tensor | None = None,
    ) -> Tensor: ...


FUSED_ON = ("cpu", "cuda")
"""The kinds of device that have one."""


class Masking:
    """A mask [rows, features] for one pass over one layer, written once."""

    def __init__(self, drop: SeededDropout, features: int, dtype: torch.dtype) -> None:
        self.mask = drop.mask(features, dtype)

    def apply(self, values: Tensor) -> Tensor:
        """values ⊙ mask, a new tensor."""
        return values * self.mask

    def apply_(self, values: Tensor) -> Tensor:
        """values ⊙ mask; `values` may be overwritten."""
        return values.mul_(self.mask)

    def apply_last(self, values: Tensor) -> Tensor:
        """As `apply`, where the mask is not needed again: it becomes the result."""
        return self.mask.mul_(values)


class FusedMasking:
    """The same without a mask: every call computes its bits anew."""

    def __init__(self, drop: SeededDropout, kernel: Kernel) -> None:
        keys = drop.row_keys
        key = key_of(drop.matrix_key, keys.device)
        self.kernel, self.of_rows = kernel, (keys, key, *split_rate(drop.p))

    def apply(self, values: Tensor) -> Tensor:
        """values ⊙ mask, a new tensor."""
        return self.kernel(values, *self.of_rows)

    apply_last = apply

    def apply_(self, values: Tensor) -> Tensor:
        """values ⊙ mask; `values` may be overwritten."""
        return self.kernel(values, *self.of_rows, out=values)


@dataclass(frozen=True)
class SeededDropout:
    """Which elements of x the update does not see: those that `keep_mask` of these values drops."""

    row_keys: Tensor
    """int64, one key per row of x."""
    matrix_key: int
    p: float
    fused: bool | None = None
    """Whether the mask is computed inside one kernel; None: where there is one."""

    def mask(self, features: int, dtype: torch.dtype) -> Tensor:
        """Ones where an element is kept, zeros where it is dropped: [rows, features]."""
        return keep_mask(self.row_keys, self.matrix_key, features, self.p, dtype)

    def masking(self, features: int, dtype: torch.dtype) -> Masking | FusedMasking:
        """The mask for one pass."""
        fused = self.fused
        if fused is None:
            fused = self.row_keys.device.type in FUSED_ON and not torch.compiler.is_compiling()
        kernel = fused_kernel(self.row_keys.device) if fused else None
        return Masking(self, features, dtype) if kernel is None else FusedMasking(self, kernel)


@torch.library.custom_op(
    "flexlora::dropped",
    mutates_args=(),
    schema="(Tensor values, Tensor row_keys, Tensor matrix_key, float p) -> Tensor",
)
def dropped_on_host(values: Tensor, row_keys: Tensor, matrix_key: Tensor, p: float) -> Tensor:
    """`dropped` on a CPU as a compiler sees it: one differentiable operation that it leaves alone.

    Left to itself it writes C++ in which the hash's products may not overflow, and other elements are dropped (torch
    2.13, gcc 12). `matrix_key` is int64 [1].
    """
    drop = SeededDropout(row_keys, int(matrix_key), p)
    return drop.masking(values.shape[-1], values.dtype).apply(values)


@dropped_on_host.register_fake
def _(values: Tensor, row_keys: Tensor, matrix_key: Tensor, p: float) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, row_keys, matrix_key, ctx.p = inputs
    ctx.save_for_backward(row_keys, matrix_key)


def _drop_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return dropped_on_host(grad, *ctx.saved_tensors, ctx.p), None, None, None


dropped_on_host.register_autograd(_drop_gradient, setup_context=_remember)


def dropped_in_graph(
    values: Tensor, row_keys: Tensor, matrix_key: Tensor, columns: Tensor, p: float
) -> Tensor:
    """`dropped` inside a larger compiled graph; `columns` as there."""
    if values.device.type == "cpu":
        on_host: Tensor = dropped_on_host(values, row_keys, matrix_key, p)
        return on_host
    return dropped(values, row_keys, matrix_key, *split_rate(p), columns)


@functools.cache
def columns_of(features: int, device: torch.device) -> Tensor:
    """0, 1, … as int32 [features]."""
    return torch.arange(features, device=device, dtype=torch.int32)


@functools.cache
def key_of(matrix_key: int, device: torch.device) -> Tensor:
    """A matrix's key as int64 [1]: a number would be compiled in, and a new tensor for every pass costs a kernel."""
    return torch.full((1,), matrix_key, device=device)


@functools.cache
def fused_kernel(device: torch.device) -> Kernel | None:
    """The kernel of a device, made and verified at the first call; None, with a warning, where it cannot be used."""
    return verified_kernel(HostKernel if device.type == "cpu" else triton_kernel, device)


def triton_kernel() -> Kernel:
    """The kernel in Triton; what torch's compiler makes of `dropped` on a GPU without Triton."""
    if importlib.util.find_spec("triton") is None:
        return torch_kernel()
    from flexlora_ds.dropout.gpu_kernel import TritonKernel

    return TritonKernel()


def torch_kernel() -> Kernel:
    """What torch's compiler makes of `dropped`, on any device."""
    compiled: Any = torch.compile(dropped, dynamic=True, fullgraph=True)

    def kernel(values: Tensor, *of_rows: Any, out: Tensor | None = None) -> Tensor:
        found: Tensor = compiled(values, *of_rows, columns_of(values.shape[1], values.device))
        return found

    return kernel


def verified_kernel(make: Callable[[], Kernel], device: torch.device) -> Kernel | None:
    """The kernel that `make` gives; None, with a warning, where that fails or drops other elements than the mask."""
    drop = SeededDropout(torch.arange(7, device=device) - 3, 11, 0.25)
    values = torch.ones(7, 30, device=device)
    try:
        kernel = make()
        found = FusedMasking(drop, kernel).apply(values)
    except Exception as error:  # a compiler's own, of many kinds; what it was is said
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}"
    else:
        if torch.equal(found, drop.mask(30, values.dtype)):
            return kernel
        reason = "its bits are others"
    warnings.warn(f"dropout without a fused kernel, which is slower: {device}: {reason}", stacklevel=2)
    return None
