"""The transaction log of a wandb run, read back: LevelDB's log format behind a header of seven bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = struct.calcsize("<IHB")
_LAST_PARTS = (1, 4)
"""Types of a record's part after which it is whole: full, last."""


def wandb_records(path: Path) -> Iterator[Any]:
    """Its records in order, as wandb's own protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # the rest of a block, too short for a header
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in _LAST_PARTS:
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
