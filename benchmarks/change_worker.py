"""One setting of `benchmarks.rank_change`: each of its processes trains and prints what rank changes took, as JSON."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from flexlora_ds.terminal.command import exit_code_of
from launch.command import quiet_libraries


@dataclass(frozen=True)
class Setting:
    """What one run measures; the same in all its processes."""

    shape: str
    rank: int
    stage: int
    processes: int
    dtype: str
    batch_size: int
    """Records of each process in a step."""
    adjust_size: int
    changes: int
    block: int
    """Timed: `changes` pairs of `block` steps with a change and as many without. 0: a change after every step."""


def run(setting: Setting) -> dict[str, Any]:
    """Join the other processes, build the engine, measure."""
    from launch.distributed.process import join_processes

    process = join_processes()
    trainer = Trainer(setting, process)
    trainable = trainer.contender.trainable
    found = trainer.memory() if setting.block == 0 else trainer.timing()
    return {"rank": process.rank, "trainable": trainable, **found}


class Trainer:
    """A contender whose ranks change every 2 · block steps, and its step count."""

    def __init__(self, setting: Setting, process: Any) -> None:
        from benchmarks.contenders import KINDS, Contender, options_of
        from benchmarks.shapes import SHAPES, random_model
        from flexlora_ds.base_model.precision import TORCH_DTYPES
        from launch.model.packed_attention import register_packed_sdpa

        self.setting, self.process, self.steps = setting, process, 0
        self.vocabulary = SHAPES[setting.shape]["vocab_size"]
        base: Any = random_model(setting.shape, TORCH_DTYPES[setting.dtype], register_packed_sdpa())
        options = options_of(
            setting.shape, setting.stage, setting.dtype, setting.rank, 0.05, False, setting.batch_size
        ).replace(adjust_size=setting.adjust_size, batch_size=setting.batch_size * setting.processes)
        kind = next(kind for kind in KINDS if kind.changes)
        every = max(1, 2 * setting.block)
        self.contender = Contender(kind, base.to(process.device), options, every, process.device)

    def step(self, seed: int) -> float:
        """One step; seconds. Every process has records of its own."""
        from benchmarks.shapes import records

        self.steps += 1
        seed = seed * self.setting.processes + self.process.rank
        rows = records(self.setting.batch_size, self.vocabulary, train_on_inputs=False, seed=seed)
        self.contender.step(self.steps, rows, counted=True)
        return self.contender.took.seconds[-1]

    def timing(self) -> dict[str, Any]:
        """Seconds of the changes, and of the blocks of steps with and without one; a warm-up with one counts bytes."""
        block, took = self.setting.block, self.contender.took
        for number in range(1, 2 * block - 1):
            self.step(number)
        with counting(self.contender.method) as ordinary:
            self.step(0)
        with counting(self.contender.method) as changing:
            self.step(0)
        assert len(took.changes) == 1, "the first change is due after the first 2 · block steps"
        for number in range(1, 2 * block):
            self.step(number)
        took.changes.clear()
        pairs = []
        for pair in range(self.setting.changes):
            halves = [[self.step(1000 + pair * block + i) for i in range(block)] for _ in range(2)]
            pairs.append(halves)
        assert len(took.changes) == len(pairs), "one change a pair"
        return {
            "change_seconds": list(took.changes),
            "steps_with": [a for a, _ in pairs],
            "steps_without": [b for _, b in pairs],
            "sent_bytes": changing.sent - ordinary.sent,
            "collectives": changing.count - ordinary.count,
            "sent_bytes_every_step": ordinary.sent,
        }

    def memory(self) -> dict[str, Any]:
        """Resident memory, in MiB, after every tenth of the changes, one change after every step."""
        import psutil

        samples = {}
        changes = self.setting.changes
        for number in range(1, changes + 1):
            self.step(number % 7)
            if number % max(1, changes // 10) == 0:
                gc.collect()  # what Python has not freed yet is no growth
                samples[number] = psutil.Process().memory_info().rss / 2**20
        assert len(self.contender.took.changes) == changes, "a change after every step"
        took = self.contender.took
        return {
            "resident_mib": samples,
            "change_seconds": statistics.median(took.changes),
            "step_seconds": statistics.median(took.seconds),
        }


@contextmanager
def counting(method: Any) -> Iterator[Any]:
    """Count what collectives move in `method.after_step` meanwhile."""
    from benchmarks.traffic import Traffic

    traffic, original = Traffic(), method.after_step

    def after_step(step: int) -> Any:
        with traffic:
            return original(step)

    method.after_step = after_step
    try:
        yield traffic
    finally:
        del method.after_step


def measure(setting: Setting, *, cpu: bool) -> list[dict[str, Any]]:
    """Run a setting in processes of its own; what each found, by rank. Raises UserError, RunError."""
    from benchmarks.workers import run_together

    command = ["-m", "benchmarks.change_worker", json.dumps(asdict(setting))]
    place = f"{setting.shape}, rank {setting.rank}, stage {setting.stage}, {setting.processes} process(es)"
    return [json.loads(line) for line in run_together(command, setting.processes, cpu=cpu, place=place)]


def main() -> NoReturn:
    """Print the figures of the setting on the command line, and end with an exit code."""
    quiet_libraries()
    from launch.distributed.process import end_process

    setting = Setting(**json.loads(sys.argv[1]))
    end_process(exit_code_of(lambda: print("\n" + json.dumps(run(setting)), flush=True)))


if __name__ == "__main__":
    main()
