"""Examples laid end to end: what a micro-batch holds, and that the model computes what it computes with padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.errors import UserError
from launch.data.batches import Cut, MicroBatch, TrainingBatches, ValidationBatches
from launch.data.examples import IGNORED
from launch.model.attention import require_separable, settle_padding_free
from launch.model.packed_attention import PACKED_SDPA, register_packed_sdpa
from launch.model.token_loss import Head, token_loss
from launch.options.train_options import TrainOptions
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
    """Dropout on: a token's mask is its own, wherever it lies."""
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
        list(ValidationBatches(examples, Cut(2, rank, 1), PAD, padding_free=True)) for rank in (0, 1)
    ]
    assert [len(p) for p in passes] == [2, 2]
    lengths = [b.segment_lengths for turn in zip(*passes, strict=True) for b in turn]
    assert lengths == [(9,), (5,), (4,), (8,)], "the last one is a dummy"
    assert passes[1][1].target_tokens == passes[1][1].tokens == 0
    assert sum(b.target_tokens for p in passes for b in p) == int(np.sum(examples.target_counts))


@pytest.mark.parametrize(
    ("kind", "attention", "gpu", "end_to_end"),
    [
        ("llama", "sdpa", False, True),
        ("llama", "flash", True, True),
        ("llama", "sdpa", True, False),
        ("llama", "eager", False, False),
        ("mamba", "sdpa", False, False),
    ],
)
def test_auto_lays_end_to_end_where_that_is_right_and_faster(
    kind: str, attention: str, gpu: bool, end_to_end: bool
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    assert settle_padding_free(TrainOptions(), config, attention=attention, gpu=gpu) == end_to_end
    for asked in (True, False):
        options = TrainOptions(padding_free=asked)
        assert settle_padding_free(options, config, attention=attention, gpu=gpu) == asked


def test_a_model_that_cannot_tell_examples_apart_is_refused() -> None:
    class Recurrent:
        _supports_attention_backend = True
        _is_stateful = True

    require_separable(Recurrent(), TrainOptions(padding_free=False))
    with pytest.raises(
        UserError, match=r"^Recurrent cannot tell examples apart .*leave padding_free at auto$"
    ):
        require_separable(Recurrent(), TrainOptions(padding_free=True))
