"""A safetensors file written piece by piece, and one read by rows: no more than a piece of it is in memory."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls each dtype."""
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _NAMES.items()}
"""Those that can be written, by the format's name."""
_PIECE = 1 << 20
"""Elements of one piece at most, but at least one row: 4 MiB of fp32."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""(dtype, shape) of every tensor by name, in the order of the file."""


class TensorFile:
    """Writes the tensors of a `Layout` one after the other, each in as many pieces as one likes. Raises OSError."""

    def __init__(self, path: Path, layout: Layout) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._missing = end

    def write(self, values: Tensor) -> None:
        """The next elements, in the dtype of their tensor."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy()
        self._missing -= len(data)
        self._file.write(data.data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind or not self._missing, f"{self._missing} bytes of the layout were not written"


class TensorReader:
    """Reads a safetensors file that has been checked, by rows and without mapping it: a map counts as memory, too."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self._places = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._begin = 8 + length

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's dtype and shape. Raises KeyError for a dtype that `TensorFile` does not write."""
        entry = self._places[name]
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def whole(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        dtype, shape = self.layout(name)
        return self._read(name, 0, math.prod(shape), dtype).view(shape)

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a tensor, as many at a time as make one piece, and where they stand."""
        dtype, shape = self.layout(name)
        if not shape:
            yield slice(None), self.whole(name).view(1)
            return
        width = math.prod(shape[1:])
        count = max(1, _PIECE // max(1, width))
        for begin in range(0, shape[0], count):
            rows = slice(begin, min(begin + count, shape[0]))
            values = self._read(name, begin * width, (rows.stop - begin) * width, dtype)
            yield rows, values.view(rows.stop - begin, *shape[1:])

    def _read(self, name: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(count, dtype=dtype)
        self._file.seek(self._begin + self._places[name]["data_offsets"][0] + first * dtype.itemsize)
        wanted = values.view(torch.uint8).numpy()
        found = self._file.readinto(wanted.data) if count else 0
        if found != len(wanted):
            raise OSError(errno.EIO, "the file became shorter", self._file.name)
        return values
