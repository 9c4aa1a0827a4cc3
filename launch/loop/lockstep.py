"""Equal numbers of forward passes on all processes, where one has more to compute than another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from launch.distributed.agreement import largest
from launch.distributed.process import Process

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Lockstep:
    """Calls an engine's model. At ZeRO-3 each call gathers the weights, which takes all processes.

    Whoever has nothing left to compute is in `finish`, and makes an empty pass for each pass of another.

    Args:
        needed: whether a forward pass is collective.
    """

    def __init__(self, engine: DeepSpeedEngine, process: Process, *, needed: bool) -> None:
        self._engine, self._process, self._needed = engine, process, needed

    def __call__(self, **arguments: Any) -> Any:
        """The model's output for these arguments of its forward pass."""
        if self._needed:
            largest(self._process, [1])  # others learn that there is a pass to make
        return self._engine(**arguments)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until no process has a pass to make; collective."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self._process.device)
        while self._needed and largest(self._process, [0])[0]:
            self._engine(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
