"""What a GPU runs as Triton kernels computes, on a CPU, what plain torch does: by Triton's own interpreter."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from tests.helpers.processes import run_script

WITH_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
WITH_LIGER = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


def interpreted(what: str) -> Any:
    (result,) = run_script(["-m", "tests.helpers.interpreted_kernels", what], 1)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@WITH_TRITON
def test_the_triton_kernel_drops_what_the_mask_drops() -> None:
    assert interpreted("differing_bits") == 0


@WITH_TRITON
@WITH_LIGER
def test_ligers_kernels_compute_what_the_base_does() -> None:
    found = interpreted("liger_apart")
    assert found["loss apart"] < 1e-5 * found["loss"]
    assert found["gradients apart"] < 1e-5 * found["largest gradient"]
