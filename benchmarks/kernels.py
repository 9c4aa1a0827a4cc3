"""How many kernels a step starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class _Operations(TorchDispatchMode):
    """Counts what reaches the kernels below autograd and computes: no views, no room made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += not function.is_view and function.overloadpacket.__name__ not in _ROOM
        return function(*args, **(kwargs or {}))


def count_kernels(run: Callable[[], object], device: torch.device) -> int:
    """Kernels that `run` starts on a GPU; on a CPU, operations of torch that compute."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
        return sum(event.device_type == DeviceType.CUDA for event in seen.events() or [])
    with _Operations() as operations:
        run()
    return operations.count
