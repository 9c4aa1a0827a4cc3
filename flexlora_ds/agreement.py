"""JSON values between the processes of a run: every process gets those of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexlora_ds.errors import RunError


def gather(value: Any, device: torch.device) -> list[Any]:
    """The JSON values of all processes, by rank; collective.

    Args:
        device: where the communication takes its tensors.
    """
    data = json.dumps(value).encode()
    if not dist.is_initialized():
        return [json.loads(data)]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    width = max(1, *(int(size) for size in sizes))
    mine = torch.zeros(width, dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    texts = [torch.zeros(width, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(texts, mine.to(device))
    return [_decode(text, int(size)) for text, size in zip(texts, sizes, strict=True)]


def gather_writes(work: Callable[[], Any], device: torch.device, *, alone: bool) -> list[Any]:
    """Each process writes its part; the JSON results by rank; collective, unless this process trains `alone`.

    Raises:
        RunError: the disk refuses on a process, or a value is no JSON; raised on all of them alike.
    """
    try:
        answer: dict[str, Any] = {"result": work()}
    except OSError as error:
        answer = {
            "fault": f"cannot write: {error.strerror or error}",
            "place": str(error.filename or ""),
            "mend": "free some space, and save again or resume",
        }
    except (TypeError, ValueError) as error:  # json's, for what it does not know and for NaN
        answer = {"fault": f"cannot write: {error}", "place": "", "mend": "give JSON"}
    answers = [answer] if alone else gather(answer, device)
    for one in answers:
        if "fault" in one:
            raise RunError(one["fault"], one["place"], one["mend"])
    return [one["result"] for one in answers]


def _decode(text: Tensor, size: int) -> Any:
    return json.loads(bytes(text[:size].tolist()).decode())
