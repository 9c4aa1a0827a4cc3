"""A direction born from the gradient is its top singular pair outside of those that are there, at every stage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import gradient_worker as worker
from tests.helpers.processes import Processes

CASES: list[Any] = [
    {"stage": 2, "gas": 2},
    {"stage": 3},
    pytest.param({"stage": 0}, marks=pytest.mark.full),
    pytest.param({"stage": 1}, marks=pytest.mark.full),
    pytest.param({"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}}, marks=pytest.mark.full),
]
_REFERENCE: dict[str, Any] = {}


def reference(processes: Processes) -> dict[str, Any]:
    """Stage 0 on one process, compared with the whole gradient."""
    if not _REFERENCE:
        (result,) = processes.run(worker.grown, {"stage": 0, "compare": True})
        _REFERENCE.update(result)
    return _REFERENCE


def test_the_new_direction_is_the_top_pair_of_the_whole_gradient(one_process: Processes) -> None:
    (change,) = reference(one_process)["changes"]
    assert len(change["compared"]) == len(change["expanded"]) == 5
    led = 0
    for name, (first, second, left, right) in zip(change["expanded"], change["compared"], strict=True):
        if first >= 1.5 * second:
            led += 1
            assert change["sigma"][name] == pytest.approx(first, rel=0.02)
            assert min(left, right) >= 0.98
    assert led >= 3, "the sample has leading pairs to compare"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_everywhere(
    one_process: Processes, two_processes: Processes, case: dict[str, Any]
) -> None:
    expected = reference(one_process)
    for result in two_processes.run(worker.grown, case):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        (change,), (known,) = result["changes"], expected["changes"]
        assert change["expanded"] == known["expanded"]
        assert change["sigma"] == pytest.approx(known["sigma"], rel=1e-3)
        assert change["before"] == change["after"], "the output is unchanged to the bit"
        assert change["overlap"] < 1e-5, "orthogonal to the directions that were there"


def test_a_start_from_the_gradient_leaves_the_sketch_of_the_first_step(one_process: Processes) -> None:
    """Ranks change after step 1, whose sketch began before P and Q were written."""
    (result,) = one_process.run(worker.first_change, {"stage": 0})
    assert set(result["market"]["gain"]) == set(result["exact"])
    assert all(any(gradient) for gradient in result["exact"].values()), "there is something to compare"
    for name, gradient in result["exact"].items():
        assert result["found"][name] == pytest.approx(gradient, rel=1e-3, abs=1e-7)


def test_a_state_of_before_steps_were_noted_goes_on(one_process: Processes) -> None:
    (grew,) = one_process.run(worker.continued, {"stage": 0})
    assert len(grew) == 5


def test_bf16(two_processes: Processes) -> None:
    for result in two_processes.run(worker.grown, {"stage": 2, "dtype": "bf16"}):
        (change,) = result["changes"]
        assert change["before"] == change["after"]
        assert set(change["sigma"]) == set(change["expanded"])


@pytest.mark.parametrize(
    "case", [{"stage": 2, "gas": 2}, pytest.param({"stage": 3}, marks=pytest.mark.full)], ids=str
)
def test_the_market_prices_what_autograd_says(
    one_process: Processes, two_processes: Processes, case: dict[str, Any]
) -> None:
    """A direction costs by ∂L/∂λ of the step's records, the same at every stage and count of processes."""
    (alone,) = one_process.run(worker.priced, {"stage": 0})
    assert len(alone["exact"]) > 4
    for name, gradient in alone["exact"].items():
        assert alone["found"][name] == pytest.approx(gradient, rel=1e-3, abs=1e-7)
    for result in two_processes.run(worker.priced, case):
        for name, gradient in alone["found"].items():
            assert result["found"][name] == pytest.approx(gradient, rel=1e-3, abs=1e-6)
        assert result["total"] == alone["total"], "the budget is kept"
        for change in (*result["changes"], *alone["changes"]):
            market = change["market"]
            assert set(market["gain"]) == set(market["loss"]) == set(alone["found"])
            assert len(change["pruned"]) == len(change["expanded"])
            assert market["expected_gain"] > market["expected_loss"] or not change["expanded"]
