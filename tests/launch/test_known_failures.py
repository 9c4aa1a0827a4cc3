"""Errors of DeepSpeed and NCCL that a run knows, in our words; all others stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import DistBackendError

from flexlora_ds.errors import RunError, UserError
from launch.loop.known_failures import known_failures

NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version "
    "2.27.7\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
)


def test_two_processes_on_one_gpu_are_the_users_to_mend() -> None:
    words = r"two processes have the same GPU .*; start one process for each GPU"
    with pytest.raises(UserError, match=words), known_failures():
        raise DistBackendError(NCCL)


def test_a_loss_scale_at_its_minimum_is_a_failure_of_the_run() -> None:
    with (
        pytest.raises(RunError, match="fp16 gradients overflow at the smallest loss scale"),
        known_failures(),
    ):
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na total capacity of 79.15 GiB"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_after_the_start_names_what_takes_less(error: Exception) -> None:
    with (
        pytest.raises(RunError, match=r"out of memory \(.*lower micro_batch_size, .*") as raised,
        known_failures(),
    ):
        raise error
    assert "\n" not in str(raised.value)
    assert raised.value.said_here, "the process that has no memory says so, whichever it is"


def test_our_own_errors_are_not_read_again() -> None:
    error = UserError("too little memory for the run's largest micro-batch (CUDA out of memory)")
    with pytest.raises(UserError) as raised, known_failures():
        raise error
    assert raised.value is error


def test_an_unknown_error_stays_as_it_is() -> None:
    error = DistBackendError("NCCL communicator was aborted")
    with pytest.raises(DistBackendError) as raised, known_failures():
        raise error
    assert raised.value is error
