"""Section `change`: rank changes and saves at stages 2 and 3, in seconds and in steps.

Changes are timed three times on one engine: with random new directions, with directions from the gradient, and where
the market decides. The last two look at the gradients of the step before a change, so that step is longer, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import STEPS, Contender, Kind, options_of
from benchmarks.gpu.base import build_base
from benchmarks.gpu.clock import seconds_of
from benchmarks.gpu.section import Conditions, Report
from benchmarks.shapes import SHAPES, records
from flexlora_ds.checkpoint.state import take_snapshot
from launch.distributed.process import join_processes
from launch.engine.methods.flexlora import FlexLoRA

RANK, RECORDS = 32, 16
EVERY = 2
"""Steps from one change to the next: a step with one, a step without."""
SETTLED = 4
"""Uncounted steps, two of them with a change."""
FROM_GRADIENT: dict[str, dict[str, str]] = {
    "directions from the gradient": {"new_direction": "gradient"},
    "the market": {"new_direction": "gradient", "importance": "growth"},
}
"""What each way to change sets, beside the options' own."""


def run(conditions: Conditions, report: Report) -> None:
    """Both at stage 2, then at stage 3."""
    device = join_processes().device
    for stage in (2, 3):
        place = f"stage {stage}"
        if conditions.left < 15:
            report.absent(place, "no time left")
            continue
        with report.attempt(place), training(conditions, stage, device) as trainer:
            report.figure(f"{place}: ready after", time.monotonic() - conditions.started, "s of the section")
            time_changes(trainer, report, place, 4 if conditions.tiny else 16)
            time_saves(trainer, report, place)
            for way, options in FROM_GRADIENT.items():
                if conditions.left < 10:
                    report.absent(f"{place}, {way}", "no time left")
                    continue
                with report.attempt(f"{place}, {way}"):
                    trainer.change_by(options)
                    time_changes(trainer, report, f"{place}, {way}", 4 if conditions.tiny else 8)


class Trainer:
    """A contender whose ranks change, and its records."""

    def __init__(self, conditions: Conditions, stage: int, device: torch.device) -> None:
        self.count = 4 if conditions.tiny else RECORDS
        self.vocabulary = SHAPES[conditions.shape]["vocab_size"]
        base = build_base(conditions.shape, device, tiny=conditions.tiny)
        dtype = "fp32" if device.type == "cpu" else "bf16"
        options = options_of(conditions.shape, stage, dtype, RANK, 0.05, False, self.count)
        kind = Kind("FlexLoRA rank changes", FlexLoRA, changes=True, packed=True)
        self.contender = Contender(kind, base, options, EVERY, device)
        self.steps, self.change = 0, None

    def change_by(self, options: dict[str, str]) -> None:
        """Go on with other options of rank changes, right after a change: nothing looks at the next step then."""
        while self.change is None:
            self.step()
        method: Any = self.contender.method
        method.options = method.options.replace(**options)
        method.config = method.options.to_flexlora_config()
        method.attach(self.contender.engine, STEPS, None)

    def step(self) -> None:
        """One step on the same records; `change` is what came after it, if there was one."""
        self.steps += 1
        rows = records(self.count, self.vocabulary, train_on_inputs=False, seed=1)
        self.contender.update(self.contender.batch_of(rows, self.steps))
        self.change = self.contender.method.after_step(self.steps)

    def seconds(self, work: Callable[[], object] | None = None) -> float:
        """Of a step, or of other work on its device."""
        return seconds_of(work or self.step, self.contender.device)


@contextmanager
def training(conditions: Conditions, stage: int, device: torch.device) -> Iterator[Trainer]:
    """A trainer, whose memory is free again afterwards."""
    trainer = Trainer(conditions, stage, device)
    try:
        yield trainer
    finally:
        trainer.contender.engine.destroy()
        del trainer
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Counted:
    """What the counted steps took."""

    with_change: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    """Seconds of the changes alone."""
    moved: int = 0
    """Directions that were added."""
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Bytes allocated and reserved after each step."""
    peaks: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    """Bytes at the peak, of steps with a change and without."""

    def add(self, took: float, change: Any, device: torch.device) -> None:
        """One step."""
        (self.without if change is None else self.with_change).append(took)
        if change is not None:
            self.inside.append(change.seconds)
            self.moved += len(change.expanded)
        if device.type == "cuda":
            self.memory.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
            changed = change is not None
            self.peaks[changed] = max(self.peaks[changed], torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)


def time_changes(trainer: Trainer, report: Report, place: str, steps: int) -> None:
    """Seconds inside a change, what a step with one takes longer and more, and what the allocator holds over them."""
    counted, device = Counted(), trainer.contender.device
    for number in range(1, SETTLED + steps + 1):
        took = trainer.seconds()
        if number > SETTLED:
            counted.add(took, trainer.change, device)
        elif device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    plain, change = statistics.median(counted.without), statistics.median(counted.inside)
    report.figure(f"{place}: step", plain * 1e3, "ms", all=counted.without)
    report.figure(f"{place}: inside a change", change * 1e3, "ms", all=counted.inside, moved=counted.moved)
    report.figure(f"{place}: change : step", change / plain, aim="1")
    lost = (statistics.median(counted.with_change) - plain) / plain
    report.figure(f"{place}: a step with a change takes longer by", lost, "steps", all=counted.with_change)
    if not counted.memory:
        return
    more = (counted.peaks[True] - counted.peaks[False]) / 2**20
    report.figure(f"{place}: the peak of a step with a change is higher by", more, "MiB")
    for what, first, last in zip(
        ("allocated", "reserved"), counted.memory[0], counted.memory[-1], strict=True
    ):
        grown = (last - first) / 2**20
        report.figure(f"{place}: {what} memory grown over {len(counted.inside)} changes", grown, "MiB")


def time_saves(trainer: Trainer, report: Report, place: str) -> None:
    """Seconds in which training stands still for a save, and in which the copy is written beside it."""
    trainer.step()
    plain = statistics.median(trainer.seconds() for _ in range(4))
    method, engine = trainer.contender.method, trainer.contender.engine
    copies, writes, adapters = [], [], []
    taken: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        part, adapter = Path(scratch) / "part", Path(scratch) / "adapter"
        part.mkdir()
        for _ in range(3):
            taken.clear()
            copies.append(
                trainer.seconds(
                    lambda: taken.append(take_snapshot(engine, 9, controller=method.controller, run={}))
                )
            )
            writes.append(trainer.seconds(lambda: taken[0].write(part)))
            adapters.append(trainer.seconds(lambda: method.save(adapter, "base")))
    report.figure(f"{place}: standing still for a save", statistics.median(copies) * 1e3, "ms", all=copies)
    report.figure(f"{place}: save : step", statistics.median(copies) / plain, aim="1")
    report.figure(f"{place}: writing beside the training", statistics.median(writes) * 1e3, "ms", all=writes)
    report.figure(f"{place}: writing the adapter", statistics.median(adapters) * 1e3, "ms", all=adapters)
