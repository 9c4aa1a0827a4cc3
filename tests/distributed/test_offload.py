"""The optimizer in the host's memory: the same training, rank changes included."""

from __future__ import annotations

import pytest

from tests.helpers import rank_worker as worker
from tests.helpers.processes import Processes


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_the_optimizer_on_the_host_trains_as_on_the_device(one_process: Processes, stage: int) -> None:
    case = {"stage": stage, "steps": 20}
    (kept,) = one_process.run(worker.trajectory, case)
    (moved,) = one_process.run(worker.trajectory, {**case, "zero": {"offload_optimizer": {"device": "cpu"}}})
    assert len(kept["ranks"]) == 1
    assert moved == kept
