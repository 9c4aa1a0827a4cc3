"""The losses of a run are those that are kept, to the last bit: no change of the code moved a number unseen.

Bit for bit where torch, transformers, DeepSpeed, torch's CPU capability and the processor are those of `losses.json`;
elsewhere within a relative tolerance of 1e-5, because other instructions round otherwise. `make golden` renews it.
"""

from __future__ import annotations

import pytest

from tests.golden.runs import CASES, STEPS, TOLERANCE, environment, load_golden, train_case
from tests.helpers import training
from tests.helpers.training import Place

FAST = "stage 3, 2 processes"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize(
    "case", [case if case == FAST else pytest.param(case, marks=pytest.mark.full) for case in CASES]
)
def test_losses_are_the_kept_ones(case: str, place: Place) -> None:
    golden = load_golden()
    kept, made = golden["cases"][case], train_case(place, case)
    assert len(made["losses"]) == STEPS and len(made["rank_change_steps"]) > 8
    if environment() == golden["environment"]:
        assert made == kept
        return
    assert made["rank_change_steps"] == kept["rank_change_steps"]
    for name in ("losses", "validation_losses"):
        assert training.relative(made[name], kept[name]) <= TOLERANCE, name
