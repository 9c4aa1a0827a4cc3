"""How many kernels a step starts, and where the count can be had without a GPU, how many operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
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


@contextmanager
def named_graph_kernels() -> Iterator[None]:
    """Graphs that are compiled for a CPU meanwhile name their kernels to the profiler."""
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def count_operations(run: Callable[[], object]) -> int:
    """Operations that compute on a CPU, the kernels of graphs compiled under `named_graph_kernels` included.

    `count_kernels` cannot look into compiled graphs. Where there are none, this one counts up to 6 % more: what an
    operation hands on inside, such as autograd's own.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(_below(event) for event in seen.events() or [] if event.cpu_parent is None)


def _below(event: Any) -> int:
    """The operations inside of one; itself where nothing inside computes."""
    inside = sum(_below(child) for child in event.cpu_children)
    return inside or int(_computes(event.name))


@cache
def _computes(name: str) -> bool:
    """Whether an event of the profiler is a graph's kernel, or an operation: no view, no room, not made of others."""
    space, _, short = name.partition("::")
    if space != "aten":
        return "_cpp_fused_" in name or space == "flexlora"
    packet = getattr(torch.ops.aten, short, None)
    if packet is None or short in _ROOM:
        return False
    forms = [getattr(packet, form) for form in packet.overloads()]
    return not any(form.is_view for form in forms) and not all(map(_made_of_others, forms))


def _made_of_others(form: Any) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(form.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # a form of TorchScript alone, which the dispatcher does not know
        return True
