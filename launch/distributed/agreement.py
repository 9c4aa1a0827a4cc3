"""Small agreements between the processes of a run: every process comes out with the same answer, or the same error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flexlora_ds.errors import CommandError, RunError, UserError
from launch.distributed.process import Process

T = TypeVar("T")

_KINDS: dict[str, type[CommandError]] = {"UserError": UserError, "RunError": RunError}


def gather(process: Process, value: Any) -> list[Any]:
    """The JSON values of all processes, by rank; collective."""
    data = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=process.device) for _ in range(process.world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=process.device))
    width = max(1, *(int(size) for size in sizes))
    mine = torch.zeros(width, dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    texts = [torch.zeros(width, dtype=torch.uint8, device=process.device) for _ in sizes]
    dist.all_gather(texts, mine.to(process.device))
    return [_decode(text, int(size)) for text, size in zip(texts, sizes, strict=True)]


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


def _decode(text: Tensor, size: int) -> Any:
    return json.loads(bytes(text[:size].tolist()).decode())
