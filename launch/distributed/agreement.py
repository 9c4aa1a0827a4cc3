"""Small agreements between the processes of a run: every process comes out with the same answer, or the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import flexlora_ds.agreement
from flexlora_ds.errors import CommandError, RunError, UserError
from launch.distributed.process import Process

T = TypeVar("T")

_KINDS: dict[str, type[CommandError]] = {"UserError": UserError, "RunError": RunError}


def gather(process: Process, value: Any) -> list[Any]:
    """The JSON values of all processes, by rank; collective."""
    return flexlora_ds.agreement.gather(value, process.device)


def gather_results(process: Process, work: Callable[[], Any]) -> list[Any]:
    """Each process does its part; the JSON results by rank, or the first failure raised on all of them alike.

    Raises:
        UserError, RunError: what a process raised; an OSError becomes a RunError.
    """
    answers = gather(process, _attempt(work))
    for answer in answers:
        if "error" in answer:
            raise _KINDS[answer["kind"]](*answer["error"])
    return [answer["result"] for answer in answers]


def on_rank_zero(process: Process, work: Callable[[], Any]) -> Any:
    """Process 0 does the work; its JSON result, or its failure, on all processes. Raises as `gather_results`."""
    return gather_results(process, work if process.is_rank_zero else lambda: None)[0]


def on_all_ranks(process: Process, work: Callable[[], T]) -> T:
    """Every process does the same work; its own result, or the first failure on all of them alike.

    So none leaves while another, slower one has yet to find the same fault. Raises as `gather_results`.
    """
    results: list[T] = []
    gather_results(process, lambda: results.append(work()))
    return results[0]


def largest(process: Process, values: Sequence[int]) -> list[int]:
    """The element-wise largest of all processes' numbers; collective."""
    if process.world_size == 1:
        return [int(value) for value in values]
    tensor = torch.tensor(list(values), dtype=torch.int32, device=process.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def _attempt(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": work()}
    except (UserError, RunError) as error:
        kind = next(name for name, known in _KINDS.items() if isinstance(error, known))
        return {"error": [error.fault, error.place, error.mend], "kind": kind}
    except OSError as error:
        return {"error": [disk_fault(error)], "kind": "RunError"}


def disk_fault(error: OSError) -> str:
    """One line for a disk that refuses."""
    place = f" ({error.filename})" if error.filename else ""
    return f"cannot write: {error.strerror or error}{place}; free some space and start the run again"
