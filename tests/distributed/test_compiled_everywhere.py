"""One process that cannot compile its layers: all take them as they are, and add like gradients to like."""

from __future__ import annotations

import pytest

from tests.helpers.fallback_run import run
from tests.helpers.processes import Processes


def test_where_one_process_cannot_compile_all_take_layers_as_they_are(two_processes: Processes) -> None:
    compiled = two_processes.run(run, {"fails": []}, timeout=200)
    mixed = two_processes.run(run, {"fails": [1]}, timeout=200)
    assert [len(process["said"]) for process in compiled] == [0, 0]
    assert [len(process["said"]) for process in mixed] == [1, 1]
    assert "another process cannot compile them" in mixed[0]["said"][0]
    assert "Python.h" in mixed[1]["said"][0]
    for one, other in zip(compiled, mixed, strict=True):
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-4)
