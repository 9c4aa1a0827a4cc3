"""The processes that proofs run in, started side by side, and what several proofs compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any

from torch import Tensor

from benchmarks.gpu.proofs import worker
from benchmarks.gpu.proofs.proof import Lane
from benchmarks.gpu.section import Conditions
from tests.helpers import gradient_worker, rank_worker, tiny, twin
from tests.helpers.processes import Processes, on_gpus

DUE = {15: 4, 25: 4, 35: 3, 45: 2}
ALONE: tuple[Lane, ...] = ("changes", "memory", "programs")
"""Lanes of one process each; on a CPU they share one."""


class Team:
    """Processes that start once, serve one call at a time, and begin again after a failure."""

    def __init__(self, processes: Processes, begin: Callable[[], str]) -> None:
        self._processes, self._begin = processes, begin
        self._lock = RLock()
        self._open, self._obstacle = False, ""

    def open(self) -> None:
        """Start the processes, unless they run."""
        with self._lock:
            if self._open or self._obstacle:
                return
            try:
                self._processes.run(self._begin)
                self._open = True
            except Exception as error:  # another start for each proof would take all of the time
                print(error, flush=True)
                self._obstacle = (str(error).strip().splitlines() or ["no text"])[-1]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `function` in every process; the results by rank. Raises ProcessError; RuntimeError without a start."""
        with self._lock:
            self.open()
            if self._obstacle:
                raise RuntimeError(f"no process to prove it in: {self._obstacle}")
            try:
                return self._processes.run(function, *args, timeout=timeout)
            except BaseException:
                self._open = False
                raise


class Teams:
    """All teams by lane, and what is computed once."""

    def __init__(self, by_lane: dict[Lane, Team], steps: int, plain_torch: Future[dict[str, Any]]) -> None:
        self._by_lane, self.steps, self.plain_torch = by_lane, steps, plain_torch
        self.whole_gradients: dict[str, Tensor] = gradient_worker.whole_gradients()
        """∂L/∂W of the tiny model by plain torch on a CPU, float64."""
        self._seen: dict[tuple[int, str], dict[str, Any]] = {}
        self._lock = RLock()

    def __getitem__(self, lane: Lane) -> Team:
        return self._by_lane[lane]

    def trajectory(self, stage: int, dtype: str = "fp32") -> dict[str, Any]:
        """Losses, ranks and masters of one process over `steps` steps, at most 30 of them in half precision."""
        with self._lock:
            if (stage, dtype) not in self._seen:
                steps = self.steps if dtype == "fp32" else min(30, self.steps)
                case = {"stage": stage, "dtype": dtype, "steps": steps}
                (self._seen[stage, dtype],) = self["changes"].run(worker.trajectory, case)
            return self._seen[stage, dtype]


@contextmanager
def teams(conditions: Conditions) -> Iterator[Teams]:
    """Start the processes; on a card all at once, on a CPU each when it is needed, and as few as there can be."""
    gpu = conditions.device.type == "cuda"
    steps = 16 if conditions.tiny else 40
    plain_torch = _plain_torch(steps)
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="flexlora-"))
        # Their starting threads must outlive the processes, which end with them.
        threads = stack.enter_context(ThreadPoolExecutor(5))
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLEXLORA_CACHE": cache}
        environment |= on_gpus() if gpu else {}

        def team(size: int, begin: Callable[[], str]) -> Team:
            return Team(stack.enter_context(Processes(size, timeout=90, env=environment)), begin)

        first = team(1, worker.ready)
        made: dict[Lane, Team] = {lane: team(1, worker.ready) if gpu else first for lane in ALONE}
        made["pair"] = team(2, worker.ready_on_one_card)
        found = Teams(made, steps, threads.submit(plain_torch))
        for each in made.values() if gpu else ():
            threads.submit(each.open)
        yield found


def _plain_torch(steps: int) -> Callable[[], dict[str, Any]]:
    """What to call in a thread; the model is made here, for it draws from the process's one generator."""
    config = rank_worker.configuration()
    model = tiny.adapted_llama(config)
    return partial(twin.train, model, config, rank_worker.batches(steps), DUE, 5e-3, 200, 0.05)
