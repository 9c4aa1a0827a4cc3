"""Proofs that need no engine: the compiled dropout's bits, the loss in chunks, packed examples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.section import Conditions, Report

DROPOUT_TEST = (
    "tests/library/test_dropout_apply.py::test_a_gpu_computes_it_in_one_kernel_with_the_bits_of_a_cpu"
)
HEAD_TEST = "tests/launch/test_head_loss.py::test_losses_and_gradients_are_those_of_cross_entropy"
CHECKS_TEST = "tests/distributed/test_gradient_checks.py::test_the_norm_is_deepspeeds_own"
PACKED_TEST = "tests/launch/test_packed.py::test_losses_and_gradients_are_the_padded_ones"
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 0.1)}
"""Of losses and gradients of one model under two attentions; a wrong boundary is apart by half."""


def run(conditions: Conditions, report: Report) -> None:
    """All of them, in this process."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    name = "the compiled dropout's bits are the written mask's and a CPU's"
    with report.attempt(name, proof=True):
        report.proof(name, *dropout_bits(conditions), test=DROPOUT_TEST)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"losses in chunks are those of full logits, {short(dtype)}"
        with report.attempt(name, proof=True):
            report.proof(name, *chunked_head(conditions, dtype), test=HEAD_TEST)
    name = "gradients looked at together are judged as one by one"
    with report.attempt(name, proof=True):
        report.proof(name, *gradient_checks(conditions), test=CHECKS_TEST)
    packed(conditions, report)


def gradient_checks(conditions: Conditions) -> tuple[bool, str]:
    """Norm, and verdict on one element that is not finite, in every precision; an empty gradient among them."""
    from flexlora_ds.partitions.fused_checks import fused_norm, overflow_of

    def one_by_one(gradients: Any, params: Any, norm_type: float) -> Tensor:
        norms = [torch.linalg.vector_norm(g.double(), ord=norm_type) for g in gradients]
        return torch.stack(norms).pow(norm_type).sum().pow(1 / norm_type)

    rng, apart, judged = torch.Generator().manual_seed(0), 0.0, []
    for dtype in BOUNDS | {torch.float16: ()}:
        made = [torch.randn(n, generator=rng) for n in (5, 0, 70_001, 4096)]
        held = [g.to(conditions.device, dtype) for g in made]
        expected = one_by_one(held, held, 2)
        apart = max(apart, float((fused_norm(one_by_one)(held, held) / expected - 1).abs()))
        judged.append(not overflow_of([held, None]))
        for value in (float("inf"), float("-inf"), float("nan")):
            held[2][70_000] = value
            judged.append(bool(overflow_of([held[:1], held[1:]])))
            held[2][70_000] = 0
    return apart < 1e-6 and all(
        judged
    ), f"norms {apart:.1e} apart, {sum(judged)} of {len(judged)} verdicts right"


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def dropout_bits(conditions: Conditions) -> tuple[bool, str]:
    """Several shapes, rates and precisions; out of place and in place."""
    from flexlora_ds.dropout.apply import FusedMasking, SeededDropout

    device, rng = conditions.device, torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (2048,), generator=rng)
    shapes = ((64, 256), (31, 97)) if conditions.tiny else ((64, 4096), (331, 997), (2048, 1000))
    compared, wrong = 0, []
    for p in (0.05, 0.5):
        for dtype in (torch.float32, torch.bfloat16):
            for rows, features in shapes:
                values = torch.randn(rows, features, generator=rng).to(dtype)
                drop = SeededDropout(keys[:rows].to(device), -(2**63) + 77, p)
                fused = drop.masking(features, dtype)
                if not isinstance(fused, FusedMasking):
                    return False, "there is no compiled kernel; the warning above says why"
                expected = values * SeededDropout(keys[:rows], drop.matrix_key, p).mask(features, dtype)
                here = values.to(device)
                found = {
                    "kernel": fused.apply(here),
                    "written mask": here * drop.mask(features, dtype),
                    "kernel in place": fused.apply_(here.clone()),
                }
                compared += rows * features
                wrong += [
                    f"{n}, p {p}, {short(dtype)}, {rows} x {features}"
                    for n, t in found.items()
                    if not torch.equal(t.cpu(), expected)
                ]
    return not wrong, f"other bits: {'; '.join(wrong)}" if wrong else f"{compared:,} elements, 3 ways each"


def chunked_head(conditions: Conditions, dtype: torch.dtype) -> tuple[bool, str]:
    """Losses and the gradient of the hidden states, for weights that differ from token to token."""
    from launch.model.head_loss import chunked_losses

    tokens, width, vocabulary = (50, 32, 300) if conditions.tiny else (1500, 512, 32_000)
    device, rng = conditions.device, torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=rng).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=rng) / width**0.5).to(device, dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=rng).to(device)
    weights = torch.randn(tokens, generator=rng).to(device)
    chunked = chunked_losses(hidden, weight, None, targets, max(16, tokens // 7))
    full = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    apart = {"losses": relative(chunked.detach(), full.detach())}
    gradients = [torch.autograd.grad((losses * weights).sum(), hidden)[0] for losses in (chunked, full)]
    apart["gradient"] = relative(*gradients)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    return max(apart.values()) < bound, f"{_listed(apart)}; bound {bound:.0e}"


def relative(found: Tensor, expected: Tensor) -> float:
    """By norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _listed(apart: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e} apart" for name, value in apart.items())


def packed(conditions: Conditions, report: Report) -> None:
    """Each attention that is there, against padded sdpa in the same precision; dropout on."""
    from launch.model.packed_attention import register_packed_sdpa

    cases: list[tuple[str, torch.dtype, Callable[[], str]]] = [
        ("packed sdpa", torch.float32, register_packed_sdpa),
        ("packed sdpa", torch.bfloat16, register_packed_sdpa),
        ("varlen", torch.bfloat16, varlen),
        ("flash-attn", torch.bfloat16, flash),
    ]
    expected: dict[torch.dtype, dict[str, Tensor]] = {}
    for kind, dtype, attention in cases:
        name = f"packed examples compute what padded ones do: {kind}, {short(dtype)}"
        if not conditions.wants(name):
            continue
        try:
            chosen = attention()
        except Exception as error:  # kernels that are not there say so in many ways
            report.absent(name, f"{type(error).__name__}: {(str(error).splitlines() or ['no text'])[0]}")
            continue
        with report.attempt(name, proof=True):
            if dtype not in expected:
                expected[dtype] = loss_and_gradients("sdpa", dtype, conditions.device, packed=False)
            found = loss_and_gradients(chosen, dtype, conditions.device, packed=True)
            apart = {n: relative(found[n], value) for n, value in expected[dtype].items()}
            loss, gradients = apart.pop("loss"), max(apart.values())
            bounds = BOUNDS[dtype]
            detail = f"loss {loss:.1e}, {len(apart)} gradients {gradients:.1e} apart; bounds {bounds}"
            report.proof(name, loss < bounds[0] and gradients < bounds[1], detail, test=PACKED_TEST)


def varlen() -> str:
    """torch's own, where the launcher finds that it works."""
    from launch.model import attention, packed_attention

    if not hasattr(attention, "torch_varlen"):
        raise RuntimeError("the launcher does not know torch's varlen attention")
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    function = attention.torch_varlen("bf16")
    if function is None:
        raise RuntimeError("torch's varlen attention does not work here; the warning above says why")
    return packed_attention.register_packed_varlen(function)


def flash() -> str:
    """The package flash-attn."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    if importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError("flash-attn is not installed")
    return "flash_attention_2"


def loss_and_gradients(
    attention: str, dtype: torch.dtype, device: torch.device, *, packed: bool
) -> dict[str, Tensor]:
    """Of 8 examples of unequal length, on a small model whose adapters have something to say."""
    from benchmarks.shapes import random_model
    from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
    from flexlora_ds.adapter.layer import forward_context
    from launch.data.batches import ProcessShare, TrainingBatches
    from launch.model.token_loss import Head, token_loss

    model: Any = random_model("tiny", dtype, attention).train()
    inject_adapters(model, FlexLoRAConfig(rank=4, dropout=0.2, target_modules=("all-linear",)))
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.lam.data.copy_(torch.randn(4, generator=rng))
    model.to(device)
    run = TrainingBatches(examples(), 8, 42, ProcessShare(1, 0, 8), 7, padding_free=packed)
    (batch,) = run.micro_batches(3)
    forward_context(model).row_keys = batch.row_keys.to(device)
    loss = token_loss(model, batch, device, Head(at_positions=True)) / batch.target_tokens
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def examples() -> Any:
    from launch.data.examples import Examples

    rng = np.random.default_rng(0)
    lengths = (9, 3, 17, 1, 40, 12, 5, 64)
    return Examples.pack(
        (i, rng.integers(1, 256, n).astype(np.int32), np.arange(n) >= n // 2) for i, n in enumerate(lengths)
    )
