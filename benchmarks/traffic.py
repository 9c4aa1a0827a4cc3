"""What collectives move: observed at torch's dispatcher, so from outside and whoever calls them.

`with Traffic(): …` sees every collective of `torch.distributed` that this thread starts inside, DeepSpeed's included,
and leaves nothing behind. It slows what it watches: time something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One collective as one process saw it."""

    name: str
    """torch's: `allreduce_`, `_allgather_base_`, `barrier`, …"""
    elements: int
    """Of the whole: what an all-reduce or broadcast has, what a gather gives, what a scatter takes."""
    bytes: int
    """The same in bytes."""
    processes: int

    @property
    def sent(self) -> float:
        """Bytes that each process sends by a ring, as NCCL counts: the whole times (n − 1)/n, twice to reduce it."""
        share = (self.processes - 1) / self.processes
        return self.bytes * share * (2 if self.name.startswith("allreduce") else 1)


class Traffic(TorchDispatchMode):
    """Records the collectives that start while it is active, in `collectives`."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    @property
    def elements(self) -> int:
        """Σ of the elements of all."""
        return sum(one.elements for one in self.collectives)

    @property
    def sent(self) -> float:
        """Σ of the bytes that each process sends."""
        return sum(one.sent for one in self.collectives)

    @property
    def count(self) -> int:
        """How many moved anything: not barriers."""
        return sum(one.elements > 0 for one in self.collectives)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.collectives.append(_observed(func, args))
        return func(*args, **(kwargs or {}))


def _observed(func: Any, args: Sequence[Any]) -> Collective:
    name = func._schema.name.removeprefix("c10d::")
    if name.startswith(("barrier", "monitored_barrier")):
        return Collective(name, 0, 0, torch.distributed.get_world_size())
    # Gathers name their output first, scatters too: the larger of the two is the whole.
    whole = max((list(_tensors(arg)) for arg in args[:2]), key=_bytes)
    return Collective(name, sum(t.numel() for t in whole), _bytes(whole), _processes(args))


def _processes(args: Sequence[Any]) -> int:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return int(torch.distributed.ProcessGroup.unbox(arg).size())
    return torch.distributed.get_world_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
