"""Directions taken out of a live model for a moment: the loss rises as in a model without them, and no bit stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import rank_worker as worker
from tests.helpers.processes import Processes

CASES: list[Any] = [
    {"stage": 3},
    {"stage": 2, "dtype": "bf16"},
    *(pytest.param({"stage": stage}, marks=pytest.mark.full) for stage in (0, 1, 2)),
    pytest.param({"stage": 0, "dtype": "bf16"}, marks=pytest.mark.full),
    pytest.param({"stage": 3, "dtype": "bf16", "direction": "expand"}, marks=pytest.mark.full),
]


def check(result: dict[str, Any], case: dict[str, Any]) -> None:
    assert result["steps"] == [5, 8] and len(result["rises"]) == 3
    exact = case.get("dtype", "fp32") == "fp32"
    assert result["rises"] == pytest.approx(result["expected"], rel=1e-3, abs=1e-5 if exact else 0.02)
    if exact:
        assert min(map(abs, result["expected"])) > 1e-4, "there is something to measure"
    assert result["failed"] and result["tensors"] == 14 * 3 * 5 and result["changed"] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rises_are_those_of_a_plain_model_and_no_bit_stays(
    two_processes: Processes, case: dict[str, Any]
) -> None:
    first, second = two_processes.run(worker.weighed, case)
    check(first, case)
    check(second, case)
    assert first["rises"] == second["rises"]


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_process(one_process: Processes, stage: int) -> None:
    (result,) = one_process.run(worker.weighed, {"stage": stage})
    check(result, {"stage": stage})
