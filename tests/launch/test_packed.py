"""Packed examples: what a micro-batch holds, and that the model computes what it computes with padding."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.errors import UserError
from launch.data.batches import MicroBatch, ProcessShare, TrainingBatches, ValidationBatches
from launch.data.examples import IGNORED
from launch.model.attention import (
    Machine,
    implementation_of,
    require_separable,
    resolve_attention,
    resolve_packed,
    torch_varlen,
)
from launch.model.packed_attention import (
    PACKED_SDPA,
    PACKED_VARLEN,
    Varlen,
    flash_varlen,
    packed_sdpa,
    packed_varlen,
    register_packed_sdpa,
    register_packed_varlen,
    working_varlen,
)
from launch.model.skeleton import Skeleton
from launch.model.token_loss import Head, token_loss
from tests.helpers.numbered_examples import make_examples
from tests.helpers.packed_llama import DEVICE, LENGTHS, PAD, adapted_model, batches_of_eight


def test_a_row_holds_the_examples_and_nothing_else() -> None:
    (padded,), (packed,) = batches_of_eight(False).micro_batches(3), batches_of_eight(True).micro_batches(3)
    assert packed.input_ids.shape == (1, sum(LENGTHS)) and packed.tokens == padded.tokens == sum(LENGTHS)
    assert packed.record_ids == padded.record_ids and packed.target_tokens == padded.target_tokens
    assert packed.segment_lengths == tuple(sorted(LENGTHS, reverse=True))
    real = padded.attention_mask.bool()
    for name in ("input_ids", "position_ids", "row_keys"):
        assert torch.equal(getattr(packed, name)[0], getattr(padded, name)[real]), name
    first = packed.position_ids[0] == 0
    expected = padded.labels[real].masked_fill(first, IGNORED)
    assert torch.equal(packed.labels[0], expected)


def loss_and_gradients(model: Any, run: TrainingBatches) -> dict[str, torch.Tensor]:
    """Over all micro-batches of step 3."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in run.micro_batches(3):
        forward_context(model).row_keys = batch.row_keys
        loss = token_loss(model, batch, DEVICE, Head(at_positions=True))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return {"loss": total, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize(
    ("attention", "window"),
    [(PACKED_SDPA, None), ("eager", None), (PACKED_SDPA, 6)],
    ids=["sdpa", "eager", "window"],
)
def test_losses_and_gradients_are_the_padded_ones(attention: str, window: int | None, micro: int) -> None:
    """Dropout on: a token's mask is its own, wherever it stands."""
    register_packed_sdpa()
    expected = loss_and_gradients(adapted_model("sdpa", window), batches_of_eight(False))
    found = loss_and_gradients(adapted_model(attention, window), batches_of_eight(True, micro))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_the_packed_attention_serves_padded_batches_too() -> None:
    register_packed_sdpa()
    expected = loss_and_gradients(adapted_model("sdpa"), batches_of_eight(False))
    found = loss_and_gradients(adapted_model(PACKED_SDPA), batches_of_eight(False))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_validation_is_laid_the_same_way() -> None:
    examples = make_examples([5, 4, 9], [2, 2, 2])
    passes: list[list[MicroBatch]] = [
        list(ValidationBatches(examples, ProcessShare(2, rank, 1), PAD, padding_free=True)) for rank in (0, 1)
    ]
    assert [len(p) for p in passes] == [2, 2]
    lengths = [b.segment_lengths for turn in zip(*passes, strict=True) for b in turn]
    assert lengths == [(9,), (5,), (4,), (8,)], "the last one is a dummy"
    assert passes[1][1].target_tokens == passes[1][1].tokens == 0
    assert sum(b.target_tokens for p in passes for b in p) == int(np.sum(examples.target_counts))


@pytest.mark.parametrize(
    ("kind", "attention", "gpu", "packed"),
    [
        ("llama", "sdpa", False, True),
        ("llama", "flash", True, True),
        ("llama", "varlen", True, True),
        ("mamba", "varlen", True, False),
        ("llama", "sdpa", True, False),
        ("llama", "eager", False, False),
        ("mamba", "sdpa", False, False),
    ],
)
def test_auto_packs_where_that_is_right_and_faster(
    kind: str, attention: Any, gpu: bool, packed: bool
) -> None:
    from transformers import AutoConfig

    known = {"model_type": AutoConfig.for_model(kind).model_type, "attention": attention, "gpu": gpu}
    assert resolve_packed("auto", **known) == packed
    for asked in (True, False):
        assert resolve_packed(asked, **known) == asked


def test_a_model_that_cannot_keep_packed_examples_apart_is_refused() -> None:
    recurrent = Skeleton(None, 0, {}, name="Recurrent", vocabulary=Vocabulary(8, 8), separable=False)
    with pytest.raises(
        UserError, match=r"^Recurrent cannot keep packed examples apart .*leave padding_free at auto$"
    ):
        require_separable(recurrent, "key padding_free")


def plain_varlen(  # the arguments of torch 2.13
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's `varlen_attn` written out, in fp32: one mask over everything."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    assert (
        cu_seq_q.dtype == torch.int32
        and cu_seq_k is cu_seq_q
        and max_q == max_k == int(cu_seq_q.diff().max())
    )
    at = torch.arange(len(query))
    segment = torch.bucketize(at, cu_seq_q[1:], right=True)
    back = at[:, None] - at[None, :]
    left, right = window_size
    seen = (segment[:, None] == segment[None, :]) & (back >= -right)
    if left >= 0:
        seen &= back <= left
    q, k, v = (t.float().transpose(0, 1) for t in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


def grouping_varlen(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """That of torch 2.11: it says nothing of grouped heads, and takes them."""
    return plain_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        scale=scale, window_size=window_size, enable_gqa=True,
    )  # fmt: skip


def early_varlen(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """That of torch 2.10, and one that refuses grouped heads: no scale, no window."""
    return plain_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0 if is_causal else -1)
    )


def wrong_varlen(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """It sees the future."""
    groups = query.shape[1] // key.shape[1]
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=groups > 1)


FORMS: dict[str, tuple[Any, bool]] = {
    "2.13": (plain_varlen, False),
    "2.11": (grouping_varlen, False),
    "2.10": (early_varlen, True),
}
CPU_BF16 = (DEVICE, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_varlen_is_found_by_trying(form: str) -> None:
    function, repeat = FORMS[form]
    varlen = working_varlen([function], *CPU_BF16)
    assert varlen is not None and varlen._repeat == repeat


def test_a_varlen_that_computes_something_else_or_fails_is_not_taken() -> None:
    assert working_varlen([wrong_varlen], *CPU_BF16) is None

    def missing(*_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("no kernel for this card")

    with pytest.raises(NotImplementedError, match="no kernel for this card"):
        working_varlen([missing], *CPU_BF16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_varlen_attention_is_that_of_packed_sdpa(
    form: str, scaling: float | None, window: int | None, shared: int
) -> None:
    """To the rounding of bf16, gradients included: what both compute before it is fp32."""
    lengths, module = (9, 1, 17), SimpleNamespace(num_key_value_groups=4 // shared, is_causal=True)
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, 27, 16).bfloat16() for heads in (4, shared, shared)]
    ends = torch.tensor([0, 9, 10, 27], dtype=torch.int32)
    push = torch.randn(1, 27, 4, 16)

    def results(attention: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        output, _ = attention(
            module, *inputs, None, segment_lengths=lengths, cu_seq_lens_q=ends, max_length_q=17,
            scaling=scaling, sliding_window=window, dropout=0.0,
        )  # fmt: skip
        return [
            output.detach().float(),
            *(g.float() for g in torch.autograd.grad(output, inputs, push.to(dtype))),
        ]

    function, repeat = FORMS[form]
    found = results(partial(packed_varlen, varlen=Varlen(function, repeat=repeat)), torch.bfloat16)
    for ours, theirs in zip(found, results(packed_sdpa, torch.float32), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


class Counting:
    """A varlen attention that serves fp32 too, and counts its calls."""

    def __init__(self) -> None:
        self.varlen, self.calls = Varlen(plain_varlen), 0

    def serves(self, query: torch.Tensor, window: int | None) -> bool:
        return True

    def __call__(self, *inputs: Any, **others: Any) -> torch.Tensor:
        self.calls += 1
        return self.varlen(*inputs, **others)


@pytest.mark.parametrize("window", [None, 6])
def test_a_model_learns_the_same_by_varlen_attention(window: int | None) -> None:
    """Losses and gradients are the padded ones; every layer calls once, whatever the number of examples."""
    counting: Any = Counting()
    register_packed_varlen(counting)
    expected = loss_and_gradients(adapted_model("sdpa", window), batches_of_eight(False))
    found = loss_and_gradients(adapted_model(PACKED_VARLEN, window), batches_of_eight(True))
    assert counting.calls == 2
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name
    padded = loss_and_gradients(adapted_model(PACKED_VARLEN, window), batches_of_eight(False))
    assert counting.calls == 2, "padded batches are sdpa's"
    assert all(torch.equal(padded[name], value) for name, value in expected.items())


def test_recomputed_activations_call_it_again() -> None:
    counting: Any = Counting()
    register_packed_varlen(counting)
    model = adapted_model(PACKED_VARLEN)
    expected = loss_and_gradients(model, batches_of_eight(True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    found = loss_and_gradients(model, batches_of_eight(True))
    assert counting.calls == 6
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_dropout_of_attention_weights_is_left_to_sdpa() -> None:
    counting: Any = Counting()
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    boundaries: dict[str, Any] = {
        "segment_lengths": (2, 4),
        "cu_seq_lens_q": torch.tensor([0, 2, 6]),
        "max_length_q": 4,
    }
    packed_varlen(module, query, key, value, None, varlen=counting, dropout=0.5, **boundaries)
    assert counting.calls == 0


H100 = Machine(gpu=True, capability=(9, 0), varlen=True)


@pytest.mark.parametrize(
    ("machine", "options", "works", "chosen"),
    [
        (Machine(gpu=False, flash=True, varlen=True), {}, True, "sdpa"),
        (Machine(gpu=True, capability=(8, 0), flash=True, varlen=True), {}, True, "flash"),
        (H100, {}, True, "varlen"),
        (H100, {}, False, "sdpa"),
        (H100, {"dtype": "fp16"}, True, "varlen"),
        (H100, {"dtype": "fp32"}, True, "sdpa"),
        (H100, {"padding_free": False}, True, "sdpa"),
        (H100, {"attention": "sdpa"}, True, "sdpa"),
        (H100, {"attention": "varlen"}, True, "varlen"),
        (Machine(gpu=True, capability=(7, 5), varlen=True), {}, True, "sdpa"),
        (Machine(gpu=True, capability=(8, 0)), {}, True, "sdpa"),
    ],
)
def test_auto_takes_the_first_attention_that_works(
    machine: Machine, options: dict[str, Any], works: bool, chosen: str
) -> None:
    asked = {"attention": "auto", "dtype": "bf16", "padding_free": "auto", **options}
    assert (
        resolve_attention(
            asked["attention"],
            dtype=asked["dtype"],
            packed=asked["padding_free"],
            place="key attention",
            machine=machine,
            works=lambda: works,
        )
        == chosen
    )


@pytest.mark.parametrize(
    ("varlen", "packed", "works", "chosen"),
    [
        (True, "auto", True, "varlen"),
        (True, "auto", False, "flash"),
        (False, "auto", True, "flash"),
        (True, False, True, "flash"),
    ],
)
def test_compiled_layers_get_varlen_before_flash(varlen: bool, packed: Any, works: bool, chosen: str) -> None:
    machine = Machine(gpu=True, capability=(8, 0), flash=True, varlen=varlen)
    found = resolve_attention(
        "auto",
        dtype="bf16",
        packed=packed,
        place="key attention",
        machine=machine,
        works=lambda: works,
        varlen_first=True,
    )
    assert found == chosen


@pytest.mark.parametrize(
    ("attention", "machine", "works"),
    [("flash", H100, True), ("varlen", H100, False), ("varlen", Machine(gpu=False, varlen=True), True)],
)
def test_kernels_that_cannot_run_are_refused(attention: Any, machine: Machine, works: bool) -> None:
    with pytest.raises(UserError, match=rf"^attention {attention} needs .*choose auto$"):
        resolve_attention(
            attention,
            dtype="bf16",
            packed="auto",
            place="key attention",
            machine=machine,
            works=lambda: works,
        )


@pytest.mark.gpu
def test_torchs_own_varlen_attention_works_here() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    pytest.importorskip("torch.nn.attention.varlen")
    assert torch_varlen("bf16") is not None and torch_varlen("fp16") is not None
    assert implementation_of("varlen", dtype="bf16", packed=True) == PACKED_VARLEN


def test_torchs_kernel_has_gradients_and_shapes_without_its_operator_in_python() -> None:
    """On the meta device: torch's attention of shared heads, called as `flash_varlen` calls it, has a backward pass."""
    options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.empty(20, heads, 64, **options) for heads in (4, 2, 2))
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    output = flash_varlen(query, key, value, ends, ends, 10, 10, scale=0.1, window_size=(-1, 0))
    assert output.shape == query.shape
    gradients = torch.autograd.grad(output, [query, key, value], torch.empty_like(output))
    assert [g.shape for g in gradients] == [query.shape, key.shape, value.shape]


def test_the_next_function_is_tried_where_one_is_missing_or_wrong() -> None:
    def missing(*_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("no kernel for this card")

    varlen = working_varlen([missing, wrong_varlen, plain_varlen], *CPU_BF16)
    assert varlen is not None and varlen._function is plain_varlen
