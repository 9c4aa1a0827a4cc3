"""Layers of packed micro-batches as one node, and replayed: the numbers of layers that run one by one."""

from __future__ import annotations

import pytest

from tests.helpers.processes import Processes
from tests.helpers.replayed_run import run_every_way


@pytest.mark.parametrize("stage", [0, 2])
def test_replayed_layers_train_bit_for_bit_as_computed_ones(one_process: Processes, stage: int) -> None:
    for found in one_process.run(run_every_way, {"stage": stage, "backend": "aot_eager"}, timeout=400):
        single, node, replayed = found["one by one"], found["one node"], found["replayed"]
        assert single["changes"] == 2 and node["alike"]
        for name in ("losses", "norms", "ranks"):
            assert single[name] == node[name] == replayed[name], name
        assert node["replays"][-1] == 0
        assert replayed["replays"][-1] > 8
        assert replayed["forgotten"] == 2, "a rank change moves what recordings read and write"
        assert replayed["graphs"] == node["graphs"] == 0, "nothing is compiled anew for a rounded length"
