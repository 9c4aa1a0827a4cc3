"""Records -> tokenised examples: what the model reads, and which of its tokens it learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from data_prep.prompt import evaluation_prompt, training_text
from data_prep.records import Record
from flexlora_ds.errors import UserError
from launch.hashing import seeded_order

IGNORED = -100
"""The label of a token that is no target (PyTorch's `ignore_index`)."""

_CHUNK = 4096  # records per call of the tokenizer: bounds the memory held as Python lists

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One tokenised record; `record_id` is its index in the data file; one label per input id."""

    record_id: int
    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Tokenised records in flat arrays: 170k of them take some 70 MB a process, as lists they would take a
    GB.

    `lengths`, `target_counts` and `record_ids` are int64 arrays over the examples. The targets of an example
    are the tokens from its `label_start` on, except the first of the sequence, which nothing predicts.
    """

    def __init__(
        self, tokens: npt.NDArray[np.int32], starts: Ints, lengths: Ints, label_starts: Ints, ids: Ints
    ) -> None:
        self._tokens = tokens
        self._starts = starts
        self._label_starts = label_starts
        self.lengths = lengths
        self.record_ids = ids
        self.target_counts = lengths - np.maximum(label_starts, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        start, length = int(self._starts[index]), int(self.lengths[index])
        masked = min(int(self._label_starts[index]), length)
        ids = self._tokens[start : start + length].tolist()
        return Example(int(self.record_ids[index]), ids, [IGNORED] * masked + ids[masked:])

    def digest(self) -> str:
        """Return the SHA-256 of what the examples say and in which order: the data's identity across runs."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            start, length = int(self._starts[index]), int(self.lengths[index])
            digest.update(self._tokens[start : start + length].tobytes())
        for array in (self.lengths, self._label_starts, self.record_ids):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def subset(self, indices: Ints) -> Examples:
        """Return the examples at these indices, in this order; the tokens are shared, not copied."""
        return Examples(
            self._tokens,
            self._starts[indices],
            self.lengths[indices],
            self._label_starts[indices],
            self.record_ids[indices],
        )


@dataclass(frozen=True)
class TokenisedData:
    """The examples of a run; `dropped` are the ids of the records longer than `cutoff_len`."""

    train: Examples
    validation: Examples
    dropped: tuple[int, ...]
    cutoff_len: int

    def dropped_line(self) -> str | None:
        """Say in one line how many records were dropped and which come first; None where none was."""
        if not self.dropped:
            return None
        total = len(self.train) + len(self.validation) + len(self.dropped)
        shown = ", ".join(str(i + 1) for i in self.dropped[:5]) + (", …" if len(self.dropped) > 5 else "")
        return (
            f"dropped {len(self.dropped):,} of {total:,} records longer than cutoff_len {self.cutoff_len} "
            f"(an answer is never cut): records {shown}"
        )


def prepare_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    prompt: str,
    cutoff_len: int,
    train_on_inputs: bool,
    val_size: int,
    seed: int,
) -> TokenisedData:
    """Tokenise all records and set `val_size` of the kept ones aside, chosen by a hash of (seed, index).

    Raises UserError where the tokenizer has no end token, no record fits `cutoff_len`, or nothing is left to
    train on.
    """
    if not records:
        raise UserError("no records to train on (data); give a file with at least one record")
    examples, dropped = tokenise(
        records, tokenizer, prompt=prompt, cutoff_len=cutoff_len, train_on_inputs=train_on_inputs
    )
    if not len(examples):
        raise UserError(
            f"all {len(records):,} records are longer than {cutoff_len} tokens (cutoff_len); raise cutoff_len"
        )
    train, validation = split(examples, val_size, seed)
    return TokenisedData(train, validation, dropped, cutoff_len)


def split(examples: Examples, val_size: int, seed: int) -> tuple[Examples, Examples]:
    """Return disjoint (train, validation) examples, each in the order of the file.

    Raises UserError where nothing is left to train on.
    """
    if not 0 <= val_size < len(examples):
        raise UserError(
            f"val_size {val_size:,} leaves nothing to train on: {len(examples):,} usable records (val_size); "
            f"choose 0 to {len(examples) - 1:,}"
        )
    order = seeded_order(len(examples), seed, "validation")
    return examples.subset(np.sort(order[val_size:])), examples.subset(np.sort(order[:val_size]))


def tokenise(
    records: Sequence[Record], tokenizer: Any, *, prompt: str, cutoff_len: int, train_on_inputs: bool
) -> tuple[Examples, tuple[int, ...]]:
    """Return the examples and the ids of the records whose tokens, the end token included, exceed
    `cutoff_len`.

    `alpaca`: ids of the evaluation prompt (as the tokenizer gives them to the evaluation, BOS included) + ids
    of the answer + EOS, so that training and evaluation agree by construction. `llm_adapters`: the published
    training string tokenised as a whole + EOS; the loss starts after as many tokens as the string without its
    answer has (LLM-Adapters' finetune.py, `generate_and_tokenize_prompt`), whether or not these tokens are
    the same.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token (model); set its eos_token")
    tokens: list[npt.NDArray[np.int32]] = []
    kept: list[tuple[int, int, int]] = []
    dropped: list[int] = []
    encode = _encode_whole if prompt == "llm_adapters" else _encode_by_parts
    for first in range(0, len(records), _CHUNK):
        chunk = records[first : first + _CHUNK]
        for record_id, (ids, prompt_length) in enumerate(encode(chunk, tokenizer, prompt), start=first):
            if len(ids) > cutoff_len:
                dropped.append(record_id)
                continue
            kept.append((record_id, len(ids), 0 if train_on_inputs else prompt_length))
            tokens.append(np.asarray(ids, dtype=np.int32))
    columns = np.asarray(kept, dtype=np.int64).reshape(-1, 3)
    flat = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
    starts = np.cumsum(columns[:, 1]) - columns[:, 1]
    return Examples(flat, starts, columns[:, 1], columns[:, 2], columns[:, 0]), tuple(dropped)


def _encode_by_parts(records: Sequence[Record], tokenizer: Any, style: str) -> list[tuple[list[int], int]]:
    prompts = _ids(tokenizer, [evaluation_prompt(record, style) for record in records])
    answers = _ids(tokenizer, [training_text(record, style)[1] for record in records], special=False)
    eos = tokenizer.eos_token_id
    return [([*prompt, *answer, eos], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _encode_whole(records: Sequence[Record], tokenizer: Any, style: str) -> list[tuple[list[int], int]]:
    parts = [training_text(record, style) for record in records]
    prompts = _ids(tokenizer, [prompt for prompt, _ in parts])
    wholes = _ids(tokenizer, [prompt + answer for prompt, answer in parts])
    eos = tokenizer.eos_token_id
    # The end token is always a target, also where the prompt alone has more tokens than the prompt with its
    # answer.
    return [
        ([*whole, eos], min(len(prompt), len(whole))) for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def _ids(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    """Token ids per text, with the tokenizer's own BOS if `special`, never with an EOS it adds by itself."""
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    eos = tokenizer.eos_token_id
    ids: list[list[int]] = encoded["input_ids"]
    return [row[:-1] if special and row and row[-1] == eos else row for row in ids]
