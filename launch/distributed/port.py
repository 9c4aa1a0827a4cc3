"""A port that nobody answers at, or that is taken, in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from flexlora_ds.errors import UserError


@contextlib.contextmanager
def port_faults() -> Iterator[None]:
    """Name the port where process 0 cannot listen, or nobody answers.

    Raises:
        UserError: the port is in use.
    """
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise UserError(
            f"port {port} is in use on this machine",
            "MASTER_PORT",
            "choose another: deepspeed --master_port PORT, torchrun --master-port PORT",
        ) from error
