"""Whole layers compiled under DeepSpeed: the same losses, one graph for all layers, and none at rank changes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.compiled_run import STEPS, run_beside_plain
from tests.helpers.processes import Processes


def assert_same_in_one_graph(result: dict[str, Any], *, within: float) -> None:
    plain, compiled = result["plain"], result["compiled"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=within)
    assert compiled["ranks"] == plain["ranks"]
    assert compiled["changes"] >= 10
    ranks = [rank for after in compiled["ranks"] for rank in after]
    assert 1 in ranks and max(ranks) >= 3
    assert compiled["graphs"] == [1] * STEPS, "one graph for all layers, compiled in the first step"
    assert not result["breaks"]


def test_every_layer_runs_one_graph_that_no_rank_change_compiles_again(one_process: Processes) -> None:
    case = {"stage": 2, "backend": "inductor"}
    for result in one_process.run(run_beside_plain, case, timeout=400):
        assert_same_in_one_graph(result, within=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"orth_form": "squared", "orth_weight": 1e-2}])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage(stage: int, checkpointing: bool, options: dict[str, Any]) -> None:
    case = {"stage": stage, "backend": "aot_eager", "checkpointing": checkpointing, "options": options}
    with Processes(1, timeout=900) as processes:
        for result in processes.run(run_beside_plain, case):
            assert_same_in_one_graph(result, within=1e-5)
