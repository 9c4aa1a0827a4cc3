"""How a global batch is divided: batch size = micro-batch × accumulation × processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexlora_ds.errors import UserError
from launch.options.train_options import TrainOptions

MemoryEstimate = Callable[[int], float]
"""Micro-batch (records) -> bytes that one process needs."""


@dataclass(frozen=True)
class BatchLayout:
    """The parts of every global batch; the product of the three is `batch_size`."""

    micro_batch_size: int
    accumulation_steps: int
    processes: int
    fits: bool = True
    """False if even the smallest micro-batch exceeds the memory estimate."""

    @property
    def batch_size(self) -> int:
        """Records in one update."""
        return self.micro_batch_size * self.accumulation_steps * self.processes


def batch_layout(
    options: TrainOptions,
    processes: int,
    memory_estimate: MemoryEstimate | None = None,
    memory_limit: float | None = None,
) -> BatchLayout:
    """Settle the micro-batch: as given, or for `auto` batch_size / processes halved until it fits.

    Args:
        processes: the number of data-parallel processes.
        memory_estimate: bytes that a process needs at a micro-batch; without it `auto` is never halved.
        memory_limit: bytes that a process has.

    Raises:
        UserError: the parts do not multiply to `batch_size`.
    """
    share = _share(options, processes)
    micro = options.micro_batch_size
    if isinstance(micro, int):
        _check_micro(micro, share, options, processes)
        return BatchLayout(micro, share // micro, processes, _fits(micro, memory_estimate, memory_limit))
    micro = share
    while micro > 1 and not _fits(micro, memory_estimate, memory_limit):
        micro = _half(micro, share)
    return BatchLayout(micro, share // micro, processes, _fits(micro, memory_estimate, memory_limit))


def _share(options: TrainOptions, processes: int) -> int:
    """Records of one global batch that each process computes."""
    share, rest = divmod(options.batch_size, processes)
    if rest or not share:
        raise UserError(
            f"batch_size {options.batch_size} does not divide among {processes} processes",
            options.place("batch_size"),
            f"give a multiple of {processes}",
        )
    return share


def _check_micro(micro: int, share: int, options: TrainOptions, processes: int) -> None:
    if share % micro:
        allowed = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise UserError(
            f"micro_batch_size {micro} × accumulation × {processes} processes never makes "
            f"batch_size {options.batch_size}",
            options.place("micro_batch_size"),
            f"give auto or one of {allowed}",
        )


def smaller_micro_batch(layout: BatchLayout) -> int:
    """The next one that `auto` would take, where there is one."""
    return _half(layout.micro_batch_size, layout.micro_batch_size * layout.accumulation_steps)


def _half(micro: int, share: int) -> int:
    """The largest size of at most half of `micro` that divides a process's share."""
    return next(size for size in range(micro // 2, 0, -1) if share % size == 0)


def _fits(micro: int, memory_estimate: MemoryEstimate | None, memory_limit: float | None) -> bool:
    return memory_estimate is None or memory_limit is None or memory_estimate(micro) <= memory_limit
