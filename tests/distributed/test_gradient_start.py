"""A start from the gradient gives the singular pairs of the whole gradient, at every stage and count of processes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import gradient_worker as worker
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place, make_place

CASES: list[Any] = [
    pytest.param({"stage": 0}, marks=pytest.mark.full),
    pytest.param({"stage": 1}, marks=pytest.mark.full),
    {"stage": 2, "gas": 2},
    pytest.param({"stage": 3}, marks=pytest.mark.full),
    {"stage": 3, "checkpointing": True},
    pytest.param({"stage": 2, "dtype": "bf16"}, marks=pytest.mark.full),
    {"stage": 3, "dtype": "bf16", "zero": {"offload_optimizer": {"device": "cpu"}}},
]


@cache
def exact() -> dict[str, Any]:
    return {
        name: torch.linalg.svd(G.double(), full_matrices=False)
        for name, G in worker.whole_gradients().items()
    }


def check_pairs(result: dict[str, Any], *, loose: bool = False) -> None:
    assert not result["gaussian"]
    led = 0
    for name, (left, sigma, right) in exact().items():
        P, Q = torch.tensor(result["P"][name]).double(), torch.tensor(result["Q"][name]).double()
        assert torch.tensor(result["lam"][name]).count_nonzero() == 0
        assert (P.T @ P - torch.eye(4)).abs().max() < 1e-5
        assert (Q @ Q.T - torch.eye(4)).abs().max() < 1e-5
        leads = sigma[0] >= 1.5 * sigma[1]
        assert result["sigma"][name][0] == pytest.approx(float(sigma[0]), rel=0.02 if leads else 0.05)
        if leads:
            led += 1
            least = 0.95 if loose else 0.98
            assert abs(float(P[:, 0] @ left[:, 0])) > least
            assert abs(float(Q[0] @ right[0])) > least
    assert led >= 3, "the sample has leading pairs to compare"


def check(results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    for result in results:
        check_pairs(result, loose=case.get("dtype") == "bf16")
        assert result["before"] == result["after"], "the output is unchanged to the bit"
        assert result["gradients"] == 0, "no parameter got a gradient"
        assert result["P"] == results[0]["P"] and result["Q"] == results[0]["Q"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(one_process: Processes, case: dict[str, Any]) -> None:
    check(one_process.run(worker.started, case), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes(two_processes: Processes, case: dict[str, Any]) -> None:
    check(two_processes.run(worker.started, case), case)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_goes_on_as_if_the_pairs_had_been_there(two_processes: Processes, stage: int) -> None:
    """The same losses at every stage, and lower ones than at the start."""
    (result, _) = two_processes.run(worker.started, {"stage": stage, "steps": 8})
    (alone, _) = two_processes.run(worker.started, {"stage": 0, "steps": 8})
    assert result["steps"] == pytest.approx(alone["steps"], rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_gaussian_directions(one_process: Processes) -> None:
    (broken,) = one_process.run(worker.started, {"stage": 2, "broken": 2})
    assert set(broken["gaussian"]) == set(exact())
    assert broken["before"] == broken["after"]
    assert broken["sigma"] == {}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.full), 2, 3])
def test_adapters_that_have_learnt_are_refused_by_every_process(two_processes: Processes, stage: int) -> None:
    """With ZeRO a process holds a part of λ only, here perhaps none of what is not 0."""
    for result in two_processes.run(worker.refused, {"stage": stage}):
        name = result["names"][-2]
        assert result["said"].startswith(f"λ is not 0 in {name}, nor in 1 more: with other P and Q")
        assert result["said"].endswith(
            "(start_from_gradient); call it before the first step, on adapters that begin anew"
        )
        assert result["kept"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("gradient"))


def run(processes: Processes, place: Place, out: Path, stage: int = 2, **options: Any) -> list[float]:
    results = processes.run(training.command, place.arguments(out, stage, init="gradient", **options))
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    assert (
        "directions from the gradient" in results[0]["stdout"] + results[0]["stderr"] or "resume" in options
    )
    return training.losses(out)


def test_the_command_starts_from_the_gradient_alike_at_every_stage(
    place: Place, one_process: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    """Ranks change behind the start; the first loss is the base model's, as with a Gaussian start."""
    alone = run(one_process, place, tmp_path / "alone", stage=0)
    sharded = run(two_processes, place, tmp_path / "sharded", stage=3)
    assert sharded == pytest.approx(alone, rel=1e-4)
    arguments = place.arguments(tmp_path / "gaussian", 0)
    (gaussian,) = one_process.run(training.command, arguments)
    assert gaussian["code"] == 0
    assert training.losses(tmp_path / "gaussian")[0] == alone[0], (
        "the output at the start is the same to the bit"
    )
    assert sum(alone[2:8]) < sum(training.losses(tmp_path / "gaussian")[2:8]), "and then it falls sooner"
    assert training.ranks(tmp_path / "sharded") == training.ranks(tmp_path / "alone")


@pytest.mark.parametrize("importance", ["entropy", "growth"])
def test_a_resumed_run_is_the_uninterrupted_one(
    place: Place, two_processes: Processes, tmp_path: Path, importance: str
) -> None:
    """It does not start again, and looks at the gradients of the step before the next change (after step 8)."""
    options = {"new_direction": "gradient", "importance": importance, "save_every": 7, "keep_checkpoints": 9}
    whole = run(two_processes, place, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000007"
    rest = run(two_processes, place, tmp_path / "rest", **options, resume=str(checkpoint))
    assert rest[-9:] == whole[-9:]
    changes = [training.read_lines(tmp_path / name / "ranks.jsonl")[-2:] for name in ("whole", "rest")]
    assert [change["sigma"] for change in changes[0]] == [change["sigma"] for change in changes[1]]
    assert [change["market"] for change in changes[0]] == [change["market"] for change in changes[1]]
    for change in changes[0]:
        assert set(change["sigma"]) == set(change["expanded"])
        assert change["expanded"] if importance == "entropy" else change["market"]["gain"]


def test_directions_of_the_gradient_without_changes_are_doubted(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "still", new_direction="gradient", max_steps=2, adjust_size=0)
    (done,) = one_process.run(training.command, arguments)
    assert done["code"] == 0
    assert re.search(r"^no effect: .*new_direction.* \(adjust_size 0\)", done["stderr"], re.MULTILINE)


def test_another_method_says_that_it_has_no_such_directions(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "lora", method="lora", init="gradient", max_steps=2)
    (done,) = one_process.run(training.command, arguments)
    assert done["code"] == 0
    assert re.search(r"^no effect: .*, init \(method lora\)$", done["stderr"], re.MULTILINE)


def test_fewer_records_than_batches_asked_for_are_said(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    arguments = place.arguments(
        tmp_path / "few", init="gradient", init_batches=50, max_steps=2, adjust_size=0
    )
    (done,) = one_process.run(training.command, arguments)
    assert done["code"] == 0
    assert "the records fill 4 batches, fewer than init_batches 50" in done["stderr"] + done["stdout"]


def test_a_language_model_starts_from_the_gradient_unless_told_otherwise(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    """Whoever left the choice to us is told what there was, and not warned of too few batches."""
    short = {"init_batches": 50, "max_steps": 4, "adjust_size": 0}
    asked = run(one_process, place, tmp_path / "asked", **short)
    (done,) = one_process.run(training.command, place.arguments(tmp_path / "auto", init=None, **short))
    said = done["stderr"] + done["stdout"]
    assert done["code"] == 0 and "directions from the gradient of 32 records" in said
    assert training.losses(tmp_path / "auto") == asked
    assert "the records fill 4 batches" in said and "warning: the records" not in said


def test_a_run_that_began_before_auto_goes_on(place: Place, one_process: Processes, tmp_path: Path) -> None:
    """Older runs without `init` began Gaussian; another start that was asked for by name is another run."""
    begun = place.arguments(tmp_path / "run", max_steps=6, save_every=2, keep_checkpoints=9)
    (done,) = one_process.run(training.command, begun)
    assert done["code"] == 0
    checkpoint = f"--resume={tmp_path / 'run' / 'checkpoints' / 'step_00000002'}"
    goes_on = [*place.arguments(tmp_path / "auto", max_steps=6, init=None), checkpoint]
    (done,) = one_process.run(training.command, goes_on)
    assert done["code"] == 0 and "directions from the gradient" not in done["stderr"] + done["stdout"]
    assert training.losses(tmp_path / "auto")[-4:] == training.losses(tmp_path / "run")[-4:]
    other = [*place.arguments(tmp_path / "other", max_steps=6, init="gradient"), checkpoint]
    (done,) = one_process.run(training.command, other)
    assert done["code"] == 1 and "init is gaussian in it and gradient here" in done["stderr"]
