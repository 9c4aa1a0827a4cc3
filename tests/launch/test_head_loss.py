"""Losses in chunks of a frozen head: those of torch's cross entropy; nothing as wide as the vocabulary is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora_ds.adapter.layer import forward_context
from launch.data.batches import MicroBatch
from launch.data.examples import IGNORED
from launch.model.head_loss import HeadLoss, chunk_rows, chunked_losses, head_loss_of, install_head_loss
from launch.model.packed_attention import PACKED_SDPA, register_packed_sdpa
from launch.model.token_loss import Head, head_of, token_loss
from tests.helpers.packed_llama import DEVICE, adapted_model, batches_of_eight

N, WIDTH, VOCABULARY = 11, 6, 40
pytestmark = pytest.mark.usefixtures("packed_attention")


@pytest.fixture
def packed_attention() -> None:
    register_packed_sdpa()


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets."""
    targets = torch.randint(VOCABULARY, (N,), generator=torch.Generator().manual_seed(3))
    hidden, weight = drawn(N, WIDTH, seed=0, dtype=dtype), drawn(VOCABULARY, WIDTH, seed=1, dtype=dtype)
    return hidden.requires_grad_(), weight, drawn(VOCABULARY, seed=2, dtype=dtype), targets


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
def test_losses_and_gradients_are_those_of_cross_entropy(biased: bool, rows: int) -> None:
    hidden, weight, bias, targets = given(torch.float32)
    weights = drawn(N, seed=4)  # of the tokens in the loss: a gradient that differs from token to token
    found = []
    for chunked in (True, False):
        b = bias if biased else None
        if chunked:
            losses = chunked_losses(hidden, weight, b, targets, rows)
        else:
            losses = F.cross_entropy(F.linear(hidden, weight, b), targets, reduction="none")
        (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
        found.append((losses.detach(), gradient))
    for actual, expected in zip(*found, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-6


def test_gradients_are_numerical_ones() -> None:
    hidden, weight, bias, targets = given(torch.float64)
    assert torch.autograd.gradcheck(lambda h: chunked_losses(h, weight, bias, targets, 4), hidden)


def test_bf16_is_within_its_rounding() -> None:
    hidden, weight, bias, targets = given(torch.bfloat16)
    losses = chunked_losses(hidden, weight, bias, targets, 4)
    assert losses.dtype == torch.float32
    exact = F.cross_entropy(F.linear(hidden.float(), weight.float(), bias.float()), targets, reduction="none")
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=2e-2)


def with_own_losses(model: Any) -> Any:
    assert isinstance(install_head_loss(model), HeadLoss)
    return model


def loss_and_gradients(model: Any, batch: MicroBatch, head: Head) -> dict[str, Tensor]:
    model.zero_grad()
    forward_context(model).row_keys = batch.row_keys
    loss = token_loss(model, batch, DEVICE, head)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("everything", [False, True], ids=["answers", "train_on_inputs"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_models_loss_is_that_of_its_logits(packed: bool, everything: bool) -> None:
    run = batches_of_eight(packed, label_starts=[0] * 8 if everything else None)
    (batch,) = run.micro_batches(3)
    model = with_own_losses(adapted_model(PACKED_SDPA if packed else "sdpa"))
    head = head_of(model)
    assert head.losses is head_loss_of(model) is not None
    found = {n: t.clone() for n, t in loss_and_gradients(model, batch, head).items()}
    for other in (Head(at_positions=True), Head()):
        expected = loss_and_gradients(model, batch, other)
        assert found.keys() == expected.keys()
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_without_targets_there_is_a_zero_with_a_graph() -> None:
    (batch,) = batches_of_eight(True).micro_batches(3)
    silent = MicroBatch(**{**vars(batch), "labels": torch.full_like(batch.labels, IGNORED)})
    model = with_own_losses(adapted_model(PACKED_SDPA))
    found = loss_and_gradients(model, silent, head_of(model))
    assert found.pop("loss") == 0
    assert found and all(float(gradient.abs().max()) == 0 for gradient in found.values())


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass() -> None:
    (batch,) = batches_of_eight(True, label_starts=[0] * 8).micro_batches(3)
    model = with_own_losses(adapted_model(PACKED_SDPA))
    widths: dict[bool, set[int]] = {True: set(), False: set()}
    for own, head in ((True, head_of(model)), (False, Head())):

        def note(kept: Tensor, own: bool = own) -> Tensor:
            if kept.requires_grad or not kept.is_leaf:
                widths[own].add(kept.shape[-1] if kept.dim() else 0)
            return kept

        forward_context(model).row_keys = batch.row_keys
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            token_loss(model, batch, DEVICE, head)
    assert model.config.vocab_size not in widths[True] and model.config.vocab_size in widths[False]


def test_validation_computes_no_gradient() -> None:
    hidden, weight, _, targets = given(torch.float32)
    with torch.no_grad():
        assert not chunked_losses(hidden, weight, None, targets, 4).requires_grad


def test_a_chunk_has_a_bounded_size_whatever_the_vocabulary() -> None:
    assert chunk_rows(128_256) == 261 and chunk_rows(49_152) == 682 and chunk_rows(10**9) == 16


def test_a_head_that_is_not_all_is_left_alone() -> None:
    """Gemma 2 caps its logits; fp16 gradients need the loss scale first."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    capped = Gemma2ForCausalLM(Gemma2Config(**small))
    assert install_head_loss(capped) is None and head_of(capped) == Head(None, at_positions=True)
    assert install_head_loss(adapted_model("sdpa").half()) is None
