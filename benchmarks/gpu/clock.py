"""Seconds of work on a device, and how much of them its kernels fill."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one run, its work on the device included."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median of `repeats` runs, after three that do not count."""
    for _ in range(3):
        work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))


@dataclass(frozen=True)
class Kernels:
    """The kernels that one piece of work started."""

    count: int
    busy: float
    """Seconds in which at least one ran."""
    longest: list[tuple[str, int, float]]
    """(name, how often, seconds in all), the most expensive first."""
    host: list[tuple[str, int, float]]
    """The same of operations and of what started kernels, by the host's own seconds under the profiler."""


def kernels_of(work: Callable[[], object], device: torch.device) -> Kernels:
    """Profile one run on a GPU. The profiler slows the host, not the kernels: `busy` holds without it."""
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        synchronise(device)
    events = [e for e in seen.events() or [] if e.device_type == DeviceType.CUDA]
    sums: dict[str, tuple[int, float]] = {}
    for event in events:
        count, seconds = sums.get(event.name, (0, 0.0))
        sums[event.name] = (count + 1, seconds + event.time_range.elapsed_us() / 1e6)
    longest = sorted(((n, c, s) for n, (c, s) in sums.items()), key=lambda row: -row[2])
    spans = ((e.time_range.start, e.time_range.end) for e in events)
    averages = ((a.key, a.count, a.self_cpu_time_total / 1e6) for a in seen.key_averages())
    host = sorted(averages, key=lambda row: -row[2])
    return Kernels(len(events), union(spans) / 1e6, longest, host)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
