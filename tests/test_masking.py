"""Dropout inside one compiled kernel: the same numbers as with a written mask, and what happens where it fails."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from flexlora_ds.masking import Drop, FusedMasking, Masking, fused_kernel
from tests.test_adapter_function import drawn, layer_of, results

CPU = torch.device("cpu")


def test_a_layer_computes_the_same_either_way() -> None:
    """Output and gradients, in two precisions, under autocast, for other numbers of rows."""
    assert fused_kernel(CPU) is not None
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    for dtype, rows, around in (
        (torch.float32, 16, {}),
        (torch.bfloat16, 16, {}),
        (torch.float32, 16, {"around": autocast}),
        (torch.float32, 5, {}),
        (torch.float32, 1, {}),
    ):
        layer, x = layer_of(dtype, 0.3), drawn(2, rows, 48, dtype=dtype)
        layer.context.row_keys = torch.arange(2 * rows)
        written, fused = (with_masks(layer, x, fused, **around) for fused in (False, True))
        assert all(torch.equal(fused[name], value) for name, value in written.items())
        assert float((fused["y"] != results_without_dropout(layer, x)).float().mean()) > 0.5


def with_masks(layer: Any, x: torch.Tensor, fused: bool, **around: Any) -> dict[str, torch.Tensor]:
    layer.context.fused_masks = fused
    return results(layer, x, plain=False, **around)


def results_without_dropout(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.eval()
    with torch.no_grad():
        y: torch.Tensor = layer(x)
    layer.train()
    return y


def test_a_cpu_writes_the_mask_and_is_not_asked_for_a_compiler() -> None:
    drop = Drop(torch.arange(4), 3, 0.5)
    assert isinstance(drop.masking(8, torch.float32), Masking)


def no_compiler(*args: Any, **options: Any) -> Any:
    def run(*values: Any) -> Any:
        raise RuntimeError("no C compiler found\nand much more")

    return run


def other_bits(function: Any, **options: Any) -> Any:
    return lambda values, *of_rows: values.clone()


@pytest.mark.parametrize(
    ("compile", "reason"),
    [(no_compiler, "RuntimeError: no C compiler found"), (other_bits, "its bits are others")],
)
def test_a_kernel_that_fails_or_drops_other_elements_is_not_used(
    monkeypatch: pytest.MonkeyPatch, compile: Any, reason: str
) -> None:
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(UserWarning, match=f"slower: torch.compile on cpu: {reason}$"):
        assert fused_kernel.__wrapped__(CPU) is None


@pytest.mark.gpu
def test_a_gpu_computes_it_in_one_kernel_with_the_bits_of_a_cpu() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    values = drawn(64, 4096, dtype=torch.bfloat16)
    fused = Drop(keys.cuda(), 77, 0.05).masking(4096, torch.bfloat16)
    assert isinstance(fused, FusedMasking)
    written = Drop(keys, 77, 0.05).masking(4096, torch.bfloat16)
    assert torch.equal(fused.kept(values.cuda()).cpu(), written.kept(values))
