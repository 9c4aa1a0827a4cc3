"""What stands for CUDA graphs on a CPU: recorded work is done again, on the tensors that it was recorded with."""

from __future__ import annotations

from collections.abc import Callable


class Rerun:
    """`launch.model.cuda_graphs.Recorder` without a GPU."""

    def __init__(self, room: int = 2**40) -> None:
        self.room, self.recorded, self.forgotten = room, 0, 0
        self.allocated, self.taken = 0, 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Done now, as a recording must be made of something, and at every replay."""
        self.recorded += 1
        work()
        return work

    def has_room(self, need: int) -> bool:
        """Up to `room`."""
        return need <= self.room

    def kept(self) -> int:
        """More each time."""
        self.allocated += 100
        return self.allocated

    def forget(self) -> None:
        """Count it."""
        self.forgotten += 1
