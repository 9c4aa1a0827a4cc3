"""A resumed run is the run: bit for bit with the same configuration, within rounding with another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import (
    Runs,
    assert_same_run,
    final_state,
    run_training,
    saving_arguments,
    uninterrupted_run,
    untimed_rows,
)
from tests.helpers.training import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole_runs() -> Runs:
    """Uninterrupted runs by (ds_config, processes, method), each made once."""
    return {}


@pytest.mark.parametrize(
    "ds",
    [
        "zero2",
        *(
            pytest.param(ds, marks=pytest.mark.full)
            for ds in (
                *("zero0", "zero1", "zero3"),
                *("zero1_offload", "zero2_offload", "zero3_offload", "zero3_offload_optimizer"),
            )
        ),
    ],
)
def test_same_configuration_continues_bit_for_bit(
    ds: str, place: Place, whole_runs: Runs, tmp_path: Path, two_processes: Processes
) -> None:
    whole = uninterrupted_run(whole_runs, place, tmp_path.parent, two_processes, ds)
    checkpoint = whole / "checkpoints" / "step_00000007"
    said = run_training(two_processes, saving_arguments(place, tmp_path / "resumed", ds, resume=checkpoint))
    assert "continuing after step 7" in said
    assert_same_run(tmp_path / "resumed", whole)
    assert len(training.ranks(whole)) == 3, "the run must change ranks on both sides of the checkpoint"


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("ds", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_low_precision_continues_bit_for_bit(
    ds: str, dtype: str, place: Place, tmp_path: Path, two_processes: Processes
) -> None:
    """The masters, not the rounded weights; and with fp16 a loss scale that falls before the checkpoint."""
    if dtype == "fp16":
        training.require_fp16()
    given = {"dtype": dtype, "max_steps": 12, "adjust_freeze": 2}
    run_training(two_processes, saving_arguments(place, tmp_path / "whole", ds, **given))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000007"
    run_training(two_processes, saving_arguments(place, tmp_path / "resumed", ds, resume=checkpoint, **given))
    skipped = [row["skipped"] for row in untimed_rows(tmp_path / "whole", "metrics.jsonl")]
    assert skipped[0] is (dtype == "fp16"), "DeepSpeed begins with a scale of 2^16"
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", last=12)


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2])
def test_the_same_seed_gives_the_same_100_steps(
    size: int, place: Place, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the same processes and in new ones."""
    first, second = (
        saving_arguments(place, tmp_path / n, "zero2", max_steps=100, save_every=0) for n in "ab"
    )
    run_training(team(request, size), first)
    with Processes(size, timeout=600) as others:
        run_training(others, second)
    assert len(training.losses(tmp_path / "a")) == 100 and len(training.ranks(tmp_path / "a")) > 25
    assert_same_run(tmp_path / "b", tmp_path / "a", last=100)


@pytest.mark.full
def test_lora_with_dropout_continues_bit_for_bit(
    place: Place, whole_runs: Runs, tmp_path: Path, two_processes: Processes
) -> None:
    whole = uninterrupted_run(whole_runs, place, tmp_path.parent, two_processes, "zero2", "lora")
    checkpoint = whole / "checkpoints" / "step_00000007"
    run_training(
        two_processes,
        saving_arguments(place, tmp_path / "resumed", "zero2", method="lora", resume=checkpoint),
    )
    assert_same_run(tmp_path / "resumed", whole)


CHANGES = [
    ("zero2", 2, "zero3_offload", 1),
    ("zero3", 2, "zero0", 1),
    ("zero0", 1, "zero1", 2),
    ("zero2_offload", 2, "zero2", 1),
    ("zero3_offload", 1, "zero3", 2),
    ("zero1", 2, "zero2", 2),
    ("zero2", 2, "zero3", 2),
    ("zero2", 4, "zero2", 2),
    ("zero3", 4, "zero3", 1),
    ("zero2", 2, "zero2", 4),
]


@pytest.mark.parametrize(
    ("before", "size_before", "after", "size_after"),
    [CHANGES[0], *(pytest.param(*change, marks=pytest.mark.full) for change in CHANGES[1:])],
)
def test_another_stage_and_number_of_processes_continue_within_rounding(
    before: str,
    size_before: int,
    after: str,
    size_after: int,
    place: Place,
    whole_runs: Runs,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    whole = uninterrupted_run(whole_runs, place, tmp_path.parent, team(request, size_before), before)
    resumed = tmp_path / "resumed"
    checkpoint = whole / "checkpoints" / "step_00000007"
    micro = 2 if size_after < 4 else 1
    options = {"resume": checkpoint, "micro_batch_size": micro}
    run_training(team(request, size_after), saving_arguments(place, resumed, after, **options))
    assert [row["step"] for row in untimed_rows(resumed, "metrics.jsonl")] == list(
        range(1, training.STEPS + 1)
    )
    assert training.ranks(resumed) == training.ranks(whole)
    assert training.relative(training.losses(resumed), training.losses(whole)) < 1e-5
    mine, theirs = final_state(resumed), final_state(whole)
    worst = max(
        float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs if n.endswith(":master")
    )
    assert worst < 1e-4 and not math.isnan(worst)


def team(request: pytest.FixtureRequest, size: int) -> Processes:
    """The session's processes of that number."""
    names = {1: "one_process", 2: "two_processes"}
    if size in names:
        found: Processes = request.getfixturevalue(names[size])
        return found
    more = Processes(size, timeout=300)
    request.addfinalizer(more.close)
    return more
