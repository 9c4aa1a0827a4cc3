"""Which order of sections gives a known hash.

The order of the parts of the published files is not documented; the hash of the whole file identifies it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD, SEPARATOR, TAIL = b"[\n", b",\n", b"\n]"  # around and between the records of json.dumps(..., indent=4)


@dataclass(frozen=True)
class OrderSearch:
    """The order found (positions of the sections) or None, how many were tried, and whether that is all."""

    order: tuple[int, ...] | None
    tried: int
    complete: bool


@dataclass
class _Walk:
    """Depth-first through all orders; orders with a common prefix share its hash state."""

    sections: Sequence[bytes]
    target: str
    deadline: float
    tried: int = 0
    late: bool = False
    chosen: list[int] = field(default_factory=list)

    def search(self, state: Any) -> bool:
        rest = [i for i in range(len(self.sections)) if i not in self.chosen]
        if not rest:
            self.tried += 1
            state.update(TAIL)
            return bool(state.hexdigest() == self.target)
        for i in rest:
            if time.monotonic() > self.deadline:
                self.late = True
                return False
            longer = state.copy()
            longer.update(SEPARATOR if self.chosen else HEAD)
            longer.update(self.sections[i])
            self.chosen.append(i)
            if self.search(longer):
                return True
            self.chosen.pop()
        return False


def find_order(
    sections: Sequence[bytes], sha256: str, first: Iterable[Sequence[int]] = (), seconds: float = 60.0
) -> OrderSearch:
    """Find the order in which `sections` (joined records) make a JSON file with this SHA-256.

    The orders of `first` come first, then all others in lexicographic order, for at most `seconds`. Six
    sections have 720 orders and 1,956 prefixes: every byte is hashed 326 times instead of 720.
    """
    deadline = time.monotonic() + seconds
    tried = 0
    for order in first:
        tried += 1
        digest = hashlib.sha256()
        for chunk in framed([sections[i] for i in order]):
            digest.update(chunk)
        if digest.hexdigest() == sha256:
            return OrderSearch(tuple(order), tried, False)
        if time.monotonic() > deadline:
            return OrderSearch(None, tried, False)
    walk = _Walk(sections, sha256, deadline, tried)
    found = walk.search(hashlib.sha256())
    return OrderSearch(tuple(walk.chosen) if found else None, walk.tried, not found and not walk.late)


def framed(sections: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of a file that holds these sections as one JSON array."""
    start = HEAD
    for section in sections:
        yield start
        yield section
        start = SEPARATOR
    yield TAIL
