"""ZeRO-3 where stage 2 would do: the warning, and what it says of the cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.distributed.bandwidth import Rate
from launch.options.train_options import parse_options
from launch.planning.memory_estimate import GIB
from launch.planning.memory_plan import MemoryPlan, memory_of
from launch.planning.settle import settle
from launch.planning.stage_choice import needless_stage_three
from tests.helpers import startup_worker as worker
from tests.helpers.processes import ROOT, Processes
from tests.helpers.training import Place, make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


def doubt(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    limit: float | None,
    processes: int = 1,
    ds: str = "zero3",
) -> str | None:
    """Of a run at stage 3 on devices of so many bytes, between which 64 MiB take half a second."""
    monkeypatch.chdir(ROOT)
    arguments = place.arguments("run", ds=f"ds_configs/{ds}.json", micro_batch_size=2)
    settled = settle(parse_options(arguments), processes)
    monkeypatch.setattr(MemoryPlan, "limit", limit)
    rate = Rate(64 * 2**20, 0.5, processes) if processes > 1 else None
    return needless_stage_three(memory_of(settled), settled.layout, rate)


def base_bytes(place: Place) -> int:
    """Of the weights in fp32, by the file that holds them."""
    header = (place.model / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + size])
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in tensors.items()
        if name != "__metadata__"
    )


@pytest.mark.complaint("LLaMA-Factory 3499", "LLaMA-Factory 7584", "DeepSpeed 6507")
def test_it_says_what_moves_in_a_step_and_how_long_that_takes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 8 over four processes in micro-batches of 2: one a step, of which each gathers three quarters twice."""
    text = doubt(place, monkeypatch, 80 * GIB, 4)
    moved, rate = 2 * 0.75 * base_bytes(place), 1.5 * 64 * 2**20 / 0.5
    assert text is not None
    assert text.startswith("ZeRO stage 3 is not needed: at stage 2 this run takes 0.0 of 80.0 GiB; ")
    assert f"twice a micro-batch: {moved / 1e9:.3g} GB a step, {moved / rate:.2g} s at the 0.201 GB/s" in text
    assert text.endswith("; choose ds_configs/zero2.json")


def test_one_process_divides_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = doubt(place, monkeypatch, 80 * GIB)
    assert alone is not None and "stage 3 divides nothing in one process" in alone
    offloaded = doubt(place, monkeypatch, 80 * GIB, ds="zero3_offload")
    moved = 2 * 4 * base_bytes(place)
    assert offloaded is not None and f"from the host twice a micro-batch: {moved / 1e9:.3g} GB" in offloaded


def test_no_doubt_where_stage_two_needs_more_than_there_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices hold a process's part of the base and all else, and not the whole base."""
    monkeypatch.chdir(ROOT)
    settled = settle(parse_options(place.arguments("run", micro_batch_size=2)), 4)
    needed = memory_of(settled).at(2).total
    assert doubt(place, monkeypatch, needed - 1, 4) is None
    assert doubt(place, monkeypatch, needed + 1, 4) is not None
    assert doubt(place, monkeypatch, None, 4) is None, "the memory is not known"


def test_a_run_warns(one_process: Processes, place: Place, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path / "run", 3, max_steps=1, adjust_size=0, val_size=0)
    (result,) = one_process.run(worker.on_a_device_of, 80, arguments)
    assert result["code"] == 0, result["stderr"]
    assert "warning: ZeRO stage 3 is not needed: at stage 2" in result["stderr"]
    arguments = place.arguments(tmp_path / "other", 2, max_steps=1, adjust_size=0, val_size=0)
    (result,) = one_process.run(worker.on_a_device_of, 80, arguments)
    assert "ZeRO stage 3" not in result["stderr"]
