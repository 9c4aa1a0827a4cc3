"""Dropout inside one compiled kernel: the same numbers as with a written mask, and what happens where it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flexlora_ds.dropout import apply
from flexlora_ds.dropout.apply import (
    FusedMasking,
    Kernel,
    Masking,
    SeededDropout,
    columns_of,
    dropped_in_graph,
    fused_kernel,
    key_of,
    torch_kernel,
    verified_kernel,
)
from flexlora_ds.dropout.cpu_kernel import ELEMENTS_PER_THREAD, HostKernel
from tests.helpers.adapted_layers import adapted_layer, output_and_gradients, seeded_normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [HostKernel, torch_kernel])
def test_a_layer_computes_the_same_either_way(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Kernel]
) -> None:
    """Output and gradients, in two precisions, under autocast, for other numbers of rows."""
    kernel = verified_kernel(make, CPU)
    assert kernel is not None
    monkeypatch.setattr(apply, "fused_kernel", lambda device: kernel)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    for dtype, rows, around in (
        (torch.float32, 16, {}),
        (torch.bfloat16, 16, {}),
        (torch.float32, 16, {"around": autocast}),
        (torch.float32, 5, {}),
        (torch.float32, 1, {}),
    ):
        layer, x = adapted_layer(dtype, 0.3), seeded_normal(2, rows, 48, dtype=dtype)
        layer.context.row_keys = torch.arange(2 * rows)
        written, fused = (with_masks(layer, x, fused, **around) for fused in (False, True))
        assert all(torch.equal(fused[name], value) for name, value in written.items())
        assert float((fused["y"] != results_without_dropout(layer, x)).float().mean()) > 0.5


@pytest.fixture(scope="module")
def kernel() -> HostKernel:
    return HostKernel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.999])
def test_the_pass_in_c_drops_what_the_mask_drops(kernel: HostKernel, dtype: torch.dtype, p: float) -> None:
    keys = torch.randint(-(2**62), 2**62, (331,), generator=torch.Generator().manual_seed(0))
    for rows, features in ((331, 997), (3, 1), (1, 4096), (0, 8), (100, 30)):
        drop, values = SeededDropout(keys[:rows], -(2**63), p), seeded_normal(rows, features, dtype=dtype)
        kept = FusedMasking(drop, kernel).apply(values)
        assert kept.dtype == dtype
        assert torch.equal(kept, values * drop.mask(features, dtype))
        place = values.data_ptr()
        there = FusedMasking(drop, kernel).apply_(values)
        assert there.data_ptr() == place
        assert torch.equal(there, kept)


def test_threads_and_strides_change_no_bit(kernel: HostKernel) -> None:
    keys = torch.arange(4 * ELEMENTS_PER_THREAD // 64)
    drop, values = SeededDropout(keys.repeat_interleave(2)[::2], 5, 0.3), seeded_normal(64, len(keys)).t()
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(
                FusedMasking(drop, kernel).apply(values), values * drop.mask(64, torch.float32)
            )
            kept = FusedMasking(drop, kernel).apply_(values.clone(memory_format=torch.preserve_format))
            assert torch.equal(kept, values * drop.mask(64, torch.float32))
    finally:
        torch.set_num_threads(threads)


def test_a_graph_drops_what_the_mask_drops() -> None:
    """Forward and backward, where dropout is part of a larger compiled graph, for open numbers of rows."""

    def body(x: torch.Tensor, keys: torch.Tensor, key: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return 2 * dropped_in_graph(torch.tanh(x), keys, key, columns, 0.3)

    compiled: Any = torch.compile(body, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 7):
        drop, x = (
            SeededDropout(torch.arange(rows) - 3, -(2**63), 0.3),
            seeded_normal(rows, 48).requires_grad_(),
        )
        y = compiled(x, drop.row_keys, key_of(drop.matrix_key, CPU), columns_of(48, CPU))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        mask = drop.mask(48, torch.float32)
        torch.testing.assert_close(y, 2 * torch.tanh(x) * mask, rtol=0, atol=0)
        torch.testing.assert_close(gradient, 2 * (1 - torch.tanh(x) ** 2) * mask)
        assert 0 < int((gradient == 0).sum()) < gradient.numel()


def with_masks(layer: Any, x: torch.Tensor, fused: bool, **around: Any) -> dict[str, torch.Tensor]:
    layer.context.fused_masks = fused
    return output_and_gradients(layer, x, plain=False, **around)


def results_without_dropout(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.eval()
    with torch.no_grad():
        y: torch.Tensor = layer(x)
    layer.train()
    return y


def test_a_cpu_has_a_kernel_and_another_device_writes_the_mask() -> None:
    assert isinstance(fused_kernel(CPU), HostKernel)
    assert isinstance(SeededDropout(torch.arange(4), 3, 0.5).masking(8, torch.float32), FusedMasking)
    assert isinstance(
        SeededDropout(torch.arange(4, device="meta"), 3, 0.5).masking(8, torch.float32), Masking
    )


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -x", r"FileNotFoundError: .*no-such-compiler.*"),
        ("false", "RunError: false: exit code 1"),
        ("cc --no-such-option", "RunError: cc: .*no-such-option.*"),
        ("true", "OSError: .*dropped.so.*"),
    ],
)
def test_without_a_c_compiler_the_mask_is_written(
    monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"^dropout without a fused kernel, which is slower: cpu: {reason}$"):
        assert fused_kernel.__wrapped__(CPU) is None
    monkeypatch.setattr(apply, "fused_kernel", lambda device: None)
    assert isinstance(SeededDropout(torch.arange(4), 3, 0.5).masking(8, torch.float32), Masking)


def no_compiler() -> Kernel:
    raise RuntimeError("no C compiler found\nand much more")


def other_bits() -> Kernel:
    return lambda values, *of_rows, out=None: values.clone()


@pytest.mark.parametrize(
    ("make", "reason"),
    [(no_compiler, "RuntimeError: no C compiler found"), (other_bits, "its bits are others")],
)
def test_a_kernel_that_fails_or_drops_other_elements_is_not_used(
    make: Callable[[], Kernel], reason: str
) -> None:
    with pytest.warns(UserWarning, match=f"slower: cpu: {reason}$"):
        assert verified_kernel(make, CPU) is None


@pytest.mark.gpu
def test_a_gpu_computes_it_in_one_kernel_with_the_bits_of_a_cpu() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    values = seeded_normal(64, 4096, dtype=torch.bfloat16)
    fused = SeededDropout(keys.cuda(), 77, 0.05).masking(4096, torch.bfloat16)
    assert isinstance(fused, FusedMasking)
    written = SeededDropout(keys, 77, 0.05).masking(4096, torch.bfloat16)
    assert torch.equal(fused.apply(values.cuda()).cpu(), written.apply(values))
