"""The batches made of the data: pure functions of (seed, step) at any world size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.rounding import ceil_div, round_up
from launch.data.examples import IGNORED, Example, Examples, Ints
from launch.data.hashing import hash64
from launch.data.largest import step_of_largest
from launch.data.order import DataOrder

PAD_MULTIPLE = 8  # lengths are rounded up to it: tensor cores prefer it, and fewer distinct shapes occur


@dataclass(frozen=True)
class MicroBatch:
    """What one process feeds the model at once: int64 tensors [rows, T], T a multiple of 8, padded right.

    With `segment_lengths` it is packed instead: its examples follow each other in one row of T = Σ lengths.
    `row_keys` holds one key per token for the seeded dropout: hash64(seed, step, record id, position in the
    record), so a token's mask depends neither on the padding nor on how the global batch is shared out (at
    padding: any value). `target_tokens` counts the targets, the label at position 0 being none: position i is
    predicted from those before.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor
    row_keys: Tensor
    record_ids: tuple[int, ...]
    tokens: int
    target_tokens: int
    segment_lengths: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None
    """The number of each record in its global batch; None where there is none."""

    def folds_of_rows(self, folds: int) -> Tensor | None:
        """By row of `input_ids`, flat: which of `folds` parts its record is in; a batch is dealt out in turn."""
        if self.places is None:
            return None
        of_records = torch.tensor(self.places) % folds
        if self.segment_lengths is None:
            return of_records.repeat_interleave(self.input_ids.shape[1])
        return of_records.repeat_interleave(torch.tensor(self.segment_lengths))

    def pinned(self) -> MicroBatch:
        """Return the batch with what a GPU copies in page-locked memory, so that the copies wait for nothing."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            row_keys=self.row_keys.pin_memory(),
        )


@dataclass(frozen=True)
class GlobalBatch:
    """What one step learns from, over all processes; known on each of them without communication."""

    step: int
    epoch: float
    """How many times the data has been seen after this step."""
    indices: Ints
    """Of all its examples [batch_size], longest first (then as in the stream)."""
    target_tokens: int
    tokens: int
    """Padding is not counted."""
    micro_batches: Iterator[MicroBatch]
    """Those of this process, to be taken once."""


@dataclass(frozen=True)
class ProcessShare:
    """How a batch is shared out: process `rank` of `world_size` takes `micro_batch_size` records at once."""

    world_size: int = 1
    rank: int = 0
    micro_batch_size: int = 1


def total_steps(examples: int, epochs: float, batch_size: int, max_steps: int | None = None) -> int:
    """Return max_steps if given, else ⌊examples · epochs / batch_size⌋, at least 1."""
    return max(1, int(examples * epochs // batch_size) if max_steps is None else max_steps)


class TrainingBatches:
    """The batches of a run, step by step, with this process's micro-batches; padded, or packed (`padding_free`)."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        share: ProcessShare,
        pad_token_id: int,
        *,
        padding_free: bool = False,
        group_by_length: bool = False,
    ):
        """Raise UserError where the global batch is no multiple of the micro-batch times the processes."""
        at_once = share.world_size * share.micro_batch_size
        if batch_size % at_once:
            raise UserError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size "
                f"{share.micro_batch_size} × {share.world_size} processes",
                "batch_size",
                f"choose a multiple of {at_once}",
            )
        self.accumulation = batch_size // at_once
        lengths = examples.lengths if group_by_length else None
        self._order = DataOrder(len(examples), batch_size, seed, lengths)
        self._examples = examples
        self._seed = seed
        self._share = share
        self._packed = padding_free
        self._arrange = pack if padding_free else partial(collate, pad_token_id=pad_token_id)

    def batch(self, step: int, micro_batches: Iterator[MicroBatch] | None = None) -> GlobalBatch:
        """Return the batch of a step; `micro_batches` where they are being made already, else made when asked for.

        Within a step the order of the records is free. Longest first gives every micro-step records of like length:
        less padding, and processes that wait less for each other.
        """
        indices = self._indices(step)
        return GlobalBatch(
            step=step,
            epoch=self._order.epoch(step),
            indices=indices,
            target_tokens=int(self._examples.target_counts[indices].sum()),
            tokens=int(self._examples.lengths[indices].sum()),
            micro_batches=self.micro_batches(step) if micro_batches is None else micro_batches,
        )

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches: number j is `indices[(j·W + p)·m : …+ m]`."""
        indices = self._indices(step)
        size = self._share.micro_batch_size
        for micro_step in range(self.accumulation):
            first = (micro_step * self._share.world_size + self._share.rank) * size
            rows = [self._examples[int(index)] for index in indices[first : first + size]]
            made = self._arrange(rows, seed=self._seed, step=step)
            yield replace(made, places=tuple(range(first, first + size)))

    def largest(self, after: int, last: int) -> MicroBatch:
        """Return the largest micro-batch that this process sees in the steps after `after` to `last`."""
        size = self._share.micro_batch_size
        own = slice(self._share.rank * size, (self._share.rank + 1) * size)
        multiple = None if self._packed else PAD_MULTIPLE
        lengths = self._examples.lengths
        step = step_of_largest(self._order, lengths, own, after, last, multiple=multiple)
        return next(self.micro_batches(step))

    def _indices(self, step: int) -> Ints:
        indices = self._order.indices(step)
        return indices[np.argsort(-self._examples.lengths[indices], kind="stable")]


class ValidationBatches:
    """The validation examples, sorted by length and shared over the processes.

    Every process gets the same number of micro-batches (the collectives of ZeRO-3's forward pass need it):
    where the examples run out it gets a dummy with `target_tokens == 0`. The validation loss is Σ of the
    token losses over all processes / `target_tokens`; take sums, for a mean over a dummy's zero targets is
    NaN.
    """

    def __init__(
        self, examples: Examples, share: ProcessShare, pad_token_id: int, *, padding_free: bool = False
    ):
        self.target_tokens = int(examples.target_counts.sum())
        self._examples = examples
        self._share = share
        self._pad = pad_token_id
        self._arrange = pack if padding_free else partial(collate, pad_token_id=pad_token_id)
        self._sorted = np.argsort(-examples.lengths, kind="stable")

    def __len__(self) -> int:
        """The number of forward passes, the same on every process."""
        at_once = self._share.world_size * self._share.micro_batch_size
        return ceil_div(len(self._examples), at_once)

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._share.micro_batch_size
        for turn in range(len(self)):
            first = (turn * self._share.world_size + self._share.rank) * size
            rows = [self._examples[int(index)] for index in self._sorted[first : first + size]]
            if rows:
                yield self._arrange(rows, seed=0, step=0)
            else:
                yield replace(self._arrange([nothing(self._pad)], seed=0, step=0), record_ids=(), tokens=0)


def collate(rows: list[Example], *, pad_token_id: int, seed: int, step: int) -> MicroBatch:
    """Pad examples on the right into one micro-batch of step `step`."""
    length = round_up(max(len(row.input_ids) for row in rows), PAD_MULTIPLE)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[number, :size] = torch.tensor(row.input_ids)
        attention_mask[number, :size] = 1
        labels[number, :size] = torch.tensor(row.labels)
    record_ids = tuple(row.record_id for row in rows)
    positions = np.arange(length, dtype=np.int64)
    keys = hash64(seed, step, np.asarray(record_ids, dtype=np.int64)[:, None], positions[None, :])
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        position_ids=torch.arange(length).repeat(len(rows), 1),
        row_keys=torch.from_numpy(keys.view(np.int64)),
        record_ids=record_ids,
        tokens=int(attention_mask.sum()),
        target_tokens=int((labels[:, 1:] != IGNORED).sum()),
    )


def pack(rows: list[Example], *, seed: int, step: int) -> MicroBatch:
    """Put examples one behind the other into one row of step `step`: no padding, every position counted anew."""
    lengths = tuple(len(row.input_ids) for row in rows)
    ids = np.repeat(np.asarray([row.record_id for row in rows], dtype=np.int64), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    labels = torch.tensor([[label for row in rows for label in row.labels]])
    labels[0, torch.from_numpy(positions == 0)] = IGNORED  # the token before it is another example's
    return MicroBatch(
        input_ids=torch.tensor([[token for row in rows for token in row.input_ids]]),
        attention_mask=torch.ones_like(labels),
        labels=labels,
        position_ids=torch.from_numpy(positions)[None],
        row_keys=torch.from_numpy(hash64(seed, step, ids, positions).view(np.int64))[None],
        record_ids=tuple(row.record_id for row in rows),
        tokens=len(positions),
        target_tokens=int((labels != IGNORED).sum()),
        segment_lengths=lengths,
    )


def nothing(pad_token_id: int) -> Example:
    """A shortest example without a target: it runs through the model and adds nothing to any sum."""
    return Example(record_id=-1, input_ids=[pad_token_id] * PAD_MULTIPLE, labels=[IGNORED] * PAD_MULTIPLE)
