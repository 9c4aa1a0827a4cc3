"""Proofs that need no engine: dropout's bits in two kernels, the loss in chunks, packed examples."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.proofs.proof import Verdict
from benchmarks.gpu.section import Conditions, NotRunError

if TYPE_CHECKING:
    from benchmarks.gpu.proofs.teams import Teams

BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 0.1)}
"""Of losses and gradients of one model under two attentions; a wrong boundary is apart by half."""


def gradient_checks(conditions: Conditions, teams: Teams) -> Verdict:
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


def dropout_bits(conditions: Conditions, teams: Teams) -> Verdict:
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


def dropout_in_graphs(conditions: Conditions, teams: Teams) -> Verdict:
    """Dropout as part of a larger graph, as in a compiled layer, forward and backward, for open numbers of rows."""
    from flexlora_ds.dropout.apply import SeededDropout, columns_of, dropped_in_graph, key_of

    device, rng, features, p = conditions.device, torch.Generator().manual_seed(2), 96, 0.3
    backend = "inductor" if device.type == "cuda" else "aot_eager"

    def body(x: Tensor, keys: Tensor, key: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
        return F.linear(dropped_in_graph(torch.tanh(x), keys, key, columns, p), weight)

    compiled = torch.compile(body, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.eye(features, device=device)  # what is dropped shows as a zero, forward and backward
    wrong, compared = [], 0
    for rows in (331, 64, 5):
        keys = torch.randint(-(2**62), 2**62, (rows,), generator=rng)
        x = (0.5 + torch.rand(rows, features, generator=rng)).to(device).requires_grad_()
        mask = SeededDropout(keys, -(2**63) + 77, p).mask(features, torch.bool)
        of_matrix = key_of(-(2**63) + 77, device), columns_of(features, device)
        y = compiled(x, keys.to(device), *of_matrix, weight)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        compared += rows * features
        wrong += [f"{n}, {rows} rows" for n, t in (("output", y), ("gradient", gradient))
                  if not torch.equal(t.detach().cpu() != 0, mask)]  # fmt: skip
    return not wrong, f"other bits: {'; '.join(wrong)}" if wrong else f"{compared:,} elements, both ways"


def broken_recording(conditions: Conditions, teams: Teams) -> Verdict:
    """Work that waits for the card cannot be recorded; random numbers, memory and the next recording are as before."""
    from launch.model.cuda_graphs import CudaGraphs

    if conditions.device.type != "cuda":
        raise NotRunError("needs a GPU")
    graphs, values = CudaGraphs(conditions.device), torch.ones(1000, device=conditions.device)
    sums = torch.zeros((), device=conditions.device)
    sums.add_(
        values.sum()
    ).zero_()  # kernels are loaded when first asked for, which no recording may wait for
    try:
        graphs.record(lambda: sums.fill_(float(values.sum())) and None)
        return False, "work that waits was recorded"
    except RuntimeError as error:
        refused = type(error).__name__
    drawn = torch.rand(1000, device=conditions.device)
    replay = graphs.record(lambda: sums.add_(values.sum()) and None)
    replay(), replay()
    total, room = float(sums), torch.empty(2**28, device=conditions.device).numel()
    holds = total == 2000 and room == 2**28 and 0 < float(drawn.mean()) < 1
    return holds, f"{refused}; then a recording of two replays adds up to {total:.0f} of 2000"


def chunked_head(dtype: torch.dtype, conditions: Conditions, teams: Teams) -> Verdict:
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


def packed(attention: str, dtype: torch.dtype, conditions: Conditions, teams: Teams) -> Verdict:
    """An attention for packed examples, against padded sdpa in the same precision; dropout on."""
    chosen = ATTENTIONS[attention]()
    expected = loss_and_gradients("sdpa", dtype, conditions.device, packed=False)
    found = loss_and_gradients(chosen, dtype, conditions.device, packed=True)
    apart = {n: relative(found[n], value) for n, value in expected.items()}
    loss, gradients = apart.pop("loss"), max(apart.values())
    bounds = BOUNDS[dtype]
    detail = f"loss {loss:.1e}, {len(apart)} gradients {gradients:.1e} apart; bounds {bounds}"
    return loss < bounds[0] and gradients < bounds[1], detail


def sdpa() -> str:
    """torch's own, example by example."""
    from launch.model.packed_attention import register_packed_sdpa

    return register_packed_sdpa()


def varlen() -> str:
    """torch's own, where the launcher finds that it works."""
    from launch.model import attention, packed_attention

    if not torch.cuda.is_available():
        raise NotRunError("needs a GPU")
    function = attention.torch_varlen("bf16")
    if function is None:
        raise NotRunError("torch's varlen attention does not work here; the warning above says why")
    return packed_attention.register_packed_varlen(function)


def flash() -> str:
    """The package flash-attn."""
    if not torch.cuda.is_available():
        raise NotRunError("needs a GPU")
    if importlib.util.find_spec("flash_attn") is None:
        raise NotRunError("flash-attn is not installed")
    return "flash_attention_2"


ATTENTIONS = {"sdpa": sdpa, "varlen": varlen, "flash-attn": flash}
"""For packed examples: each registers itself and gives its name; NotRunError where it cannot."""


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
