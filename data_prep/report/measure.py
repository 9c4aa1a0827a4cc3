"""Measures of a data file: duplicates, overlaps, lengths, balance."""

from __future__ import annotations

import hashlib
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.prompt import training_text
from data_prep.records import Record, iter_records
from data_prep.sources import quiet_retries
from flexlora_ds.errors import UserError

CountTokens = Callable[[list[str]], list[int]]

_BATCH = 1_000


def count_words(texts: list[str]) -> list[int]:
    """Words between white space: the unit of length where no tokenizer is given."""
    return [len(text.split()) for text in texts]


def token_counter(tokenizer: str) -> CountTokens:
    """Counts tokens (without the special ones) with a tokenizer: a hub id, a local folder or a .gguf file.

    Raises UserError where it cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            "the package 'transformers' is not installed", mend="install it or omit --tokenizer"
        ) from None
    path = Path(tokenizer)
    remedy = "give a hub id, a local folder or a .gguf file"
    if not path.exists() and (path.is_absolute() or tokenizer.startswith(".") or path.suffix == ".gguf"):
        raise UserError("no tokenizer is there", tokenizer, remedy)
    try:
        with quiet_retries():
            if path.suffix == ".gguf":
                loaded = AutoTokenizer.from_pretrained(
                    path.parent, gguf_file=path.name, trust_remote_code=False
                )
            else:
                loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    # a tokenizer that is not there, gated or damaged shows as many unrelated types
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"tokenizer cannot be loaded: {reason}", tokenizer, remedy) from None

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in loaded(texts, add_special_tokens=False)["input_ids"]]

    return count


def normalised(text: str) -> str:
    """Letters and digits only: compatibility forms unified; case, punctuation and spacing ignored."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


@dataclass
class Seen:
    """The instructions of the training data, exact and normalised, as digests."""

    exact: set[bytes] = field(default_factory=set)
    normalised: set[bytes] = field(default_factory=set)

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self.exact.add(_digest(record["instruction"]))
            self.normalised.add(_digest(normalised(record["instruction"])))

    def overlaps(self, records: Iterable[Record]) -> tuple[int, int]:
        """How many of these instructions have been seen: exactly, and normalised."""
        texts = [record["instruction"] for record in records]
        exact = sum(_digest(text) in self.exact for text in texts)
        return exact, sum(_digest(normalised(text)) in self.normalised for text in texts)


@dataclass
class Measures:
    """Of one file.

    `duplicates`: records whose instruction and answer occurred before; `conflicts`: those whose instruction
    occurred before with other answers only. Overlaps (test files only, else None): records whose
    instruction is in the training data.
    """

    records: int = 0
    duplicates: int = 0
    conflicts: int = 0
    overlap: int | None = None
    overlap_normalised: int | None = None
    answers: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def summary(self, cutoff: int) -> dict[str, Any]:
        """The measures as JSON; lengths as mean, median, 95th percentile, maximum, number over `cutoff`."""
        ordered = sorted(self.lengths)
        return {
            "records": self.records,
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "overlap": self.overlap,
            "overlap_normalised": self.overlap_normalised,
            "answers": dict(sorted(self.answers.items())),
            "length_mean": round(statistics.fmean(ordered), 1),
            "length_median": statistics.median(ordered),
            "length_p95": ordered[int(0.95 * (len(ordered) - 1))],
            "length_max": ordered[-1],
            "over_cutoff": sum(length > cutoff for length in ordered),
        }


def measure(path: Path, count: CountTokens, style: str, training: Seen | None) -> Measures:
    """Measure one file, record by record; overlaps with `training` where it is given.

    The length of a record is that of its training text (prompt and answer) in `style`. Raises UserError for a
    malformed or empty file.
    """
    found = Measures()
    answers_of: dict[bytes, set[str]] = {}
    for batch in _batches(iter_records(path)):
        for record in batch:
            answers = answers_of.setdefault(_digest(record["instruction"]), set())
            found.duplicates += record["answer"] in answers
            found.conflicts += bool(answers) and record["answer"] not in answers
            answers.add(record["answer"])
            found.answers[record["answer"]] += 1
        found.records += len(batch)
        try:
            texts = ["".join(training_text(record, style)) for record in batch]
        except UserError as error:
            raise error.at(str(path)) from None
        found.lengths += count(texts)
        if training is not None:
            exact, loose = training.overlaps(batch)
            found.overlap = (found.overlap or 0) + exact
            found.overlap_normalised = (found.overlap_normalised or 0) + loose
    if not found.records:
        raise UserError("holds no records", str(path))
    return found


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    while batch := list(islice(records, _BATCH)):
        yield batch
