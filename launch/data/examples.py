"""Tokenised examples in flat arrays: what the model reads, and which of its tokens it learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

from flexlora_ds.errors import UserError
from flexlora_ds.terminal.counted import counted
from launch.data.hashing import seeded_order

IGNORED = -100
"""The label of a token that is no target (PyTorch's `ignore_index`)."""

Ints: TypeAlias = npt.NDArray[np.int64]
Tokens: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """One tokenised record; `record_id` is its index in the data file; one label per input id."""

    record_id: int
    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Tokenised records in flat arrays: 170k of them take some 80 MB (memory-mapped from the cache: shared by
    all processes), as lists they would take a GB each.

    `lengths`, `target_counts` and `record_ids` are int64 arrays over the examples. The targets of an example
    are the tokens marked in `learnt`, except the first of the sequence, which nothing predicts.
    """

    def __init__(
        self, tokens: Tokens, learnt: Mask, starts: Ints, lengths: Ints, target_counts: Ints, record_ids: Ints
    ) -> None:
        self._tokens = tokens
        self._learnt = learnt
        self._starts = starts
        self.lengths = lengths
        self.target_counts = target_counts
        self.record_ids = record_ids

    @classmethod
    def pack(cls, rows: Iterable[tuple[int, Tokens, Mask]]) -> Examples:
        """Pack (record id, token ids, which of them are learnt) into flat arrays."""
        record_ids, tokens, learnt = [], [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
        for record_id, ids, mask in rows:
            record_ids.append(record_id)
            tokens.append(ids)
            learnt.append(mask)
        lengths = np.asarray([len(ids) for ids in tokens[1:]], dtype=np.int64)
        counts = np.asarray([np.count_nonzero(mask[1:]) for mask in learnt[1:]], dtype=np.int64)
        flat, mask = np.concatenate(tokens), np.concatenate(learnt)
        numbers = np.asarray(record_ids, dtype=np.int64)
        return cls(flat, mask, np.cumsum(lengths) - lengths, lengths, counts, numbers)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        piece = slice(int(self._starts[index]), int(self._starts[index] + self.lengths[index]))
        ids = self._tokens[piece]
        labels = np.where(self._learnt[piece], ids, IGNORED)
        return Example(int(self.record_ids[index]), ids.tolist(), labels.tolist())

    def digest(self) -> str:
        """Return the SHA-256 of what the examples say and in which order: the data's identity across runs."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            piece = slice(int(self._starts[index]), int(self._starts[index] + self.lengths[index]))
            digest.update(self._tokens[piece].tobytes())
            digest.update(self._learnt[piece].tobytes())
        for array in (self.lengths, self.record_ids):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def first_beyond(self, limit: int, *, learnt: bool) -> tuple[int, int] | None:
        """(record id, token) of the first example with a token id of at least `limit`; with `learnt`, as a target."""
        wrong = np.flatnonzero(self._tokens >= limit)
        if learnt:
            wrong = wrong[self._learnt[wrong]]
        if not len(wrong):
            return None
        # The arrays are shared with other examples: those of a record of ours count.
        for start, length, record in zip(self._starts, self.lengths, self.record_ids, strict=True):
            place = np.searchsorted(wrong, start)
            if place < len(wrong) and wrong[place] < start + length:
                return int(record), int(self._tokens[wrong[place]])
        return None

    def first_longer(self, length: int) -> tuple[int, int] | None:
        """(record id, tokens) of the first record with more than `length` tokens."""
        longer = np.flatnonzero(self.lengths > length)
        if not len(longer):
            return None
        first = longer[np.argmin(self.record_ids[longer])]
        return int(self.record_ids[first]), int(self.lengths[first])

    def count_longer(self, length: int) -> int:
        """How many records have more than `length` tokens."""
        return int((self.lengths > length).sum())

    def subset(self, indices: Ints) -> Examples:
        """Return the examples at these indices, in this order; the tokens are shared, not copied."""
        return Examples(
            self._tokens,
            self._learnt,
            self._starts[indices],
            self.lengths[indices],
            self.target_counts[indices],
            self.record_ids[indices],
        )

    def save(self, folder: Path) -> None:
        """Write the arrays to files that `open` maps. Only for examples in the order in which `pack` put them."""
        np.save(folder / "tokens.npy", self._tokens)
        np.save(folder / "learnt.npy", self._learnt)
        np.save(folder / "examples.npy", np.stack([self.record_ids, self.lengths, self.target_counts]))

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Map the files that `save` wrote: pages are read when used, and shared with other processes.

        Raises OSError or ValueError where a file is missing or damaged.
        """
        # Still mapped; a plain array is quicker.
        tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r"))
        learnt = np.asarray(np.load(folder / "learnt.npy", mmap_mode="r"))
        record_ids, lengths, counts = np.load(folder / "examples.npy")
        if not lengths.sum() == len(tokens) == len(learnt):
            raise ValueError("the arrays do not fit together")
        return cls(tokens, learnt, np.cumsum(lengths) - lengths, lengths, counts, record_ids)


@dataclass(frozen=True)
class TokenisedData:
    """The examples of a run; `dropped` are the ids of the records longer than `cutoff_len`."""

    train: Examples
    validation: Examples
    dropped: tuple[int, ...]
    cutoff_len: int

    def kept_words(self) -> str:
        """How many records are trained on, and how many more are held out."""
        trained = counted(len(self.train), "record")
        return f"{trained} and {len(self.validation):,} held out" if len(self.validation) else trained

    def dropped_line(self) -> str | None:
        """Say in one line how many records were dropped and which come first; None where none was."""
        if not self.dropped:
            return None
        total = len(self.train) + len(self.validation) + len(self.dropped)
        shown = ", ".join(str(i + 1) for i in self.dropped[:5]) + (", …" if len(self.dropped) > 5 else "")
        return (
            f"dropped {len(self.dropped):,} of {total:,} records longer than cutoff_len {self.cutoff_len} "
            f"(an answer is never shortened): records {shown}"
        )


def arrange(
    examples: Examples, dropped: Sequence[int], *, cutoff_len: int, val_size: int, seed: int
) -> TokenisedData:
    """Set `val_size` examples aside, chosen by a hash of (seed, index).

    Raises UserError where no record fits `cutoff_len`, or nothing is left to train on.
    """
    if not len(examples):
        raise UserError(
            f"not one of {counted(len(dropped), 'record')} fits into {counted(cutoff_len, 'token')}",
            "cutoff_len",
            "raise cutoff_len",
        )
    train, validation = split(examples, val_size, seed)
    return TokenisedData(train, validation, tuple(dropped), cutoff_len)


def split(examples: Examples, val_size: int, seed: int) -> tuple[Examples, Examples]:
    """Return disjoint (train, validation) examples, each in the order of the file.

    Raises UserError where nothing is left to train on.
    """
    if not 0 <= val_size < len(examples):
        raise UserError(
            f"val_size {val_size:,} leaves nothing to train on: {counted(len(examples), 'usable record')}",
            "val_size",
            f"choose 0 to {len(examples) - 1:,}" if len(examples) > 1 else "choose 0",
        )
    order = seeded_order(len(examples), seed, "validation")
    return examples.subset(np.sort(order[val_size:])), examples.subset(np.sort(order[:val_size]))
