"""DistributedDataParallel around parameters of new shapes: its reducer is built anew, inside the same object.

A new object would leave every other holder, such as a trainer's loop, with a dead one.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Give `ddp` buckets of its parameters' present shapes; collective, and nothing of the model is sent.

    What it was built with, its communication hooks and its mode stay.
    """
    options, hooks, training = _options(ddp), list(getattr(ddp, "_comm_hooks", [])), ddp.training
    ddp.__init__(ddp.module, **options, init_sync=False)  # type: ignore[misc]
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    ddp.training = training


def _options(ddp: Any) -> dict[str, Any]:
    """The arguments of the constructor, as its attributes tell them (torch 2.6 to 2.13)."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "process_group": ddp.process_group,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        buffers: getattr(ddp, buffers),
    }
    if not getattr(ddp, "bucket_bytes_cap_default", False):
        options["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    return options
