"""What the decoder layers get of a packed micro-batch, made as long as others: with a filler segment behind it.

What is recorded for one length serves another of the same rounded length. The filler is a segment of its own, of zeros:
no example sees it, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora_ds.rounding import round_up

_BY_TOKEN = ("position_ids", "position_embeddings")
"""[1, tokens, ...], or a tuple of such."""
_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""int32 [segments + 1], from 0."""
_LONGEST = ("max_length_q", "max_length_k")
_PARTS = 16
_LEAST = 128


@dataclass(frozen=True)
class PackedInputs:
    """The arguments of a layer, filler included."""

    hidden: Tensor
    """[1, rounded tokens, features]."""
    row_keys: Tensor | None
    """int64 [rounded tokens], or None."""
    others: dict[str, Any]
    tokens: int
    """Without the filler."""

    @property
    def key(self) -> Hashable:
        """What calls have in common that one recording serves."""
        tensors = tuple((tuple(t.shape), t.dtype) for t in self._tensors())
        return tensors, tuple((n, v) for n, v in self.others.items() if not isinstance(v, Tensor | tuple))

    def copy(self) -> PackedInputs:
        """The same in memory of its own."""
        copies = {id(t): t.detach().clone() for t in self._tensors()}

        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(of(part) for part in value)
            return copies[id(value)] if isinstance(value, Tensor) else value

        others = {name: of(value) for name, value in self.others.items()}
        return PackedInputs(of(self.hidden), of(self.row_keys), others, self.tokens)

    def take(self, new: PackedInputs) -> None:
        """The values of other inputs with the same key, in place."""
        torch._foreach_copy_([*self._tensors()], [t.detach() for t in new._tensors()])

    def _tensors(self) -> list[Tensor]:
        """Each once, in a fixed order."""
        found = [self.hidden, *([] if self.row_keys is None else [self.row_keys])]
        for value in self.others.values():
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Tensor)]
        return [*{id(t): t for t in found}.values()]


def pack_inputs(hidden: Tensor, row_keys: Tensor | None, others: Mapping[str, Any]) -> PackedInputs | None:
    """A call's arguments at their rounded length; None: there is one among them that is not known here."""
    if hidden.dim() != 3 or len(hidden) != 1 or not all(name in others for name in (*_ENDS, *_LONGEST)):
        return None
    tokens = hidden.shape[1]
    length = rounded_length(tokens)
    padded: dict[int, Tensor] = {}  # layers are given one tensor under two names, and code is made for that

    def by_token(t: Tensor) -> Tensor:
        return padded.setdefault(id(t), pad_tokens(t.detach(), length))

    def with_filler(ends: Tensor) -> Tensor:
        return padded.setdefault(id(ends), F.pad(ends, (0, 1), value=length))

    found: dict[str, Any] = {}
    for name, value in others.items():
        parts = value if isinstance(value, tuple) else (value,)
        if name in _BY_TOKEN and all(isinstance(p, Tensor) and p.shape[:2] == (1, tokens) for p in parts):
            found[name] = tuple(map(by_token, parts)) if isinstance(value, tuple) else by_token(value)
        elif name in _ENDS:
            found[name] = with_filler(value)
        elif name in _LONGEST:
            found[name] = max(round_up(value, 4 * _LEAST), length - tokens)
        elif isinstance(value, bool | int | None):
            found[name] = value
        else:
            return None
    keys = None if row_keys is None else F.pad(row_keys.reshape(-1), (0, length - tokens))
    return PackedInputs(pad_tokens(hidden.detach(), length), keys, found, tokens)


def rounded_length(tokens: int) -> int:
    """A sixteenth longer at most, or the next multiple of 128."""
    step = _LEAST
    while step * 2 * _PARTS <= tokens:
        step *= 2
    return round_up(tokens, step)


def pad_tokens(t: Tensor, length: int) -> Tensor:
    """[1, tokens, ...] -> [1, length, ...], zeros behind; `t` itself where it is as long."""
    missing = length - t.shape[1]
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
