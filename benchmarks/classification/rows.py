"""Rows of a GLUE task as batches of token ids, of similar length within a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.json_items import iter_objects
from flexlora_ds.errors import UserError

TASKS = ("sst2", "cola")
LONGEST = 64
"""Tokens of a sentence, at most."""
BATCHES_IN_A_BLOCK = 20
"""Sentences of so many batches are sorted by length: less padding, and the order stays random enough."""

Sentence = tuple[list[int], int]
"""Token ids and the label."""


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask [n, longest], labels [n]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def read_sentences(path: Path, tokenizer: Any) -> list[Sentence]:
    """All rows of a file in the hub's columns, `sentence` and `label`.

    Raises:
        UserError: the file is missing or damaged, or a row lacks a column.
    """
    rows = [(number, row) for number, row in iter_objects(path)]
    for number, row in rows:
        if not isinstance(row.get("sentence"), str) or row.get("label") not in (0, 1):
            raise UserError(
                "a row without a sentence and a label of 0 or 1",
                f"{path}, row {number}",
                "take GLUE's own rows",
            )
    if not rows:
        raise UserError("no rows", str(path), "take GLUE's own rows")
    texts = [row["sentence"] for _, row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    return [(ids, row["label"]) for ids, (_, row) in zip(encoded, rows, strict=True)]


def training_batches(sentences: Sequence[Sentence], size: int, count: int, seed: int) -> list[Batch]:
    """`count` batches in an order that depends on the seed alone; the rows are repeated where they run out."""
    rng = random.Random(seed)
    pool: list[Sentence] = []
    while len(pool) < count * size:
        pool += rng.sample(sentences, len(sentences))
    found: list[Batch] = []
    block = BATCHES_IN_A_BLOCK * size
    for start in range(0, count * size, block):
        ordered = sorted(pool[start : start + block], key=lambda s: len(s[0]))
        batches = [collate(ordered[k : k + size]) for k in range(0, len(ordered), size)]
        rng.shuffle(batches)
        found += batches
    return found[:count]


def evaluation_batches(sentences: Sequence[Sentence], size: int = 64) -> list[Batch]:
    """Every sentence once."""
    ordered = sorted(sentences, key=lambda s: len(s[0]))
    return [collate(ordered[k : k + size]) for k in range(0, len(ordered), size)]


def collate(sentences: Sequence[Sentence]) -> Batch:
    """Padded on the right with token 0, which the mask hides."""
    ids = [torch.tensor(tokens) for tokens, _ in sentences]
    masks = [torch.ones_like(tokens) for tokens in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = torch.tensor([label for _, label in sentences])
    return Batch(pad(ids, batch_first=True), pad(masks, batch_first=True), labels)
