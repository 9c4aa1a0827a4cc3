"""Errors of DeepSpeed, NCCL and torch that a run knows, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flexlora_ds.devices import is_out_of_memory
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.terminal.plain_text import one_line

_SMALLEST_SCALE = "loss scale already at minimum"  # DeepSpeed: a bare Exception (loss_scaler.py, 0.19.8)
_SHARED_GPU = "Duplicate GPU detected"  # NCCL, by torch's DistBackendError
_LONGEST_REASON = 200
"""Characters of torch's text in our line."""


@contextmanager
def known_failures() -> Iterator[None]:
    """Say in one line what is known: a loss scale that cannot become smaller, memory that ran out, a shared GPU.

    Raises:
        RunError: the first two. UserError: the last.
    """
    try:
        yield
    except Exception as error:
        if _SMALLEST_SCALE in str(error):
            raise RunError(
                "fp16 gradients overflow at the smallest loss scale",
                "dtype",
                "use bf16 or fp32, or a lower lr",
            ) from error
        if _SHARED_GPU in str(error):
            raise UserError(
                "two processes have the same GPU", "environment", "start one process for each GPU"
            ) from error
        if is_out_of_memory(error):
            raise _out_of_memory(error) from error
        raise


def _out_of_memory(error: Exception) -> RunError:
    fault = RunError(
        f"out of memory ({one_line(str(error), _LONGEST_REASON) or type(error).__name__})",
        mend="lower micro_batch_size, set gradient_checkpointing true, or share the base out with "
        "ds_configs/zero3.json; the same command goes on from the last checkpoint",
    )
    fault.said_here = True  # it may have happened in this process alone
    return fault
