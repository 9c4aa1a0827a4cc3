"""Work on a GPU recorded once and replayed: the host asks for one graph instead of thousands of kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

_SPARED = 0.06
"""Of the card's memory, left free for what a recording does not count."""


class Recorder(Protocol):
    """Records work for later."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the work again, reading and writing where it did now. It may be that the work is not done now."""

    def has_room(self, need: int) -> bool:
        """Whether recordings may take `need` bytes more than they have."""

    def kept(self) -> int:
        """Bytes that are allocated now."""

    def forget(self) -> None:
        """All recordings are given up."""

    @property
    def taken(self) -> int:
        """Bytes that recordings hold."""


class CudaGraphs:
    """Recordings of one process, whose intermediate values share one pool of memory: only one is at work at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self.taken, self._highest = 0, 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of all that `work` starts, in the backward pass's thread, too; nothing of it runs yet."""
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with _no_collection(), torch.cuda.stream(self._stream):
            # Threads that make batches and watch NCCL may go on: what they ask of the driver concerns no recording.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self._break_off(graph)
                raise
        self.taken += max(0, torch.cuda.memory_reserved(self.device) - before)
        replay: Callable[[], None] = graph.replay
        return replay

    def _break_off(self, graph: torch.cuda.CUDAGraph) -> None:
        """Put torch back to where it records nothing: its `capture_end` leaves that to be done after an error.

        torch 2.11, aten/src/ATen/cuda/CUDAGraph.cpp: the allocator goes on to serve the recording's pool, and the
        random generator to count for it.
        """
        with suppress(Exception):
            graph.capture_end()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        generator: Any = torch.cuda.default_generators[index]
        with suppress(Exception):
            generator.graphsafe_set_state(generator.clone_state())
        self._pool = torch.cuda.graph_pool_handle()

    def has_room(self, need: int) -> bool:
        """Whether the largest step so far would still fit beside the recordings and `need` bytes more.

        A longer length finds no block of the shared pool that is large enough, and may take all of it anew.
        """
        self.kept()
        total = torch.cuda.get_device_properties(self.device).total_memory
        if self._highest + self.taken + need > (1 - _SPARED) * total:
            return False
        if torch.cuda.mem_get_info(self.device)[0] < need:
            torch.cuda.empty_cache()  # the allocator cannot, while something is recorded
        return torch.cuda.mem_get_info(self.device)[0] >= need

    def kept(self) -> int:
        """Bytes of torch's tensors."""
        self._highest = max(self._highest, torch.cuda.max_memory_allocated(self.device))
        return torch.cuda.memory_allocated(self.device)

    def forget(self) -> None:
        """Wait until no recording is at work; the next ones take memory anew."""
        torch.cuda.synchronize(self.device)
        self._pool, self.taken = torch.cuda.graph_pool_handle(), 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python frees nothing by itself, which the driver might refuse in the middle of a recording."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
