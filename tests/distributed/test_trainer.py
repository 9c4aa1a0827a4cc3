"""FlexLoRA in `transformers.Trainer` and TRL's SFTTrainer: the ranks, losses and adapter of `launch`; resume."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import trainer_worker as worker
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place, relative

STILL: dict[str, Any] = {"dropout": 0.0, "lr_schedule": "constant", "warmup_steps": 0, "init": "gaussian"}
"""Without dropout, whose masks the two draw differently, and at a rate on which both agree."""
WITH_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
FULL = pytest.mark.full

CASES = [
    pytest.param(trainer, world, stage, marks=marks, id=f"{trainer} {world} {stage}")
    for trainer, world, stage, marks in (
        ("Trainer", 1, worker.TORCH, []),
        ("Trainer", 1, 0, [FULL]),
        ("Trainer", 1, 2, [FULL]),
        ("Trainer", 1, 3, [FULL]),
        ("Trainer", 2, worker.TORCH, []),
        ("Trainer", 2, 0, [FULL]),
        ("Trainer", 2, 1, [FULL]),
        ("Trainer", 2, 2, []),
        ("Trainer", 2, 3, []),
        ("SFTTrainer", 1, worker.TORCH, [WITH_TRL]),
        ("SFTTrainer", 1, 0, [WITH_TRL, FULL]),
        ("SFTTrainer", 1, 2, [WITH_TRL, FULL]),
        ("SFTTrainer", 1, 3, [WITH_TRL, FULL]),
        ("SFTTrainer", 2, worker.TORCH, [WITH_TRL, FULL]),
        ("SFTTrainer", 2, 0, [WITH_TRL, FULL]),
        ("SFTTrainer", 2, 2, [WITH_TRL, FULL]),
        ("SFTTrainer", 2, 3, [WITH_TRL, FULL]),
    )
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def launched(place: Place, one_process: Processes) -> Path:
    """The run folder of `launch`."""
    run = place.root / "launched"
    (done,) = one_process.run(training.command, place.arguments(run, 2, **STILL))
    assert done["code"] == 0, done["stderr"]
    return run


def case_of(
    place: Place,
    out: Path,
    stage: int | str,
    trainer: str = "Trainer",
    options: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    words = place.arguments(place.root / "unused", 0, **{**STILL, **(options or {})})
    return {"arguments": words, "out": str(out), "stage": stage, "trainer": trainer, **more}


def run(request: pytest.FixtureRequest, world: int, case: dict[str, Any]) -> dict[str, Any]:
    processes: Processes = request.getfixturevalue("one_process" if world == 1 else "two_processes")
    results = processes.run(worker.train, case)
    assert all(result == results[0] for result in results)
    assert results[0]["deepspeed"] == (case["stage"] != worker.TORCH)
    return results[0]


def assert_same_adapter(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(("trainer", "world", "stage"), CASES)
def test_ranks_losses_and_adapter_are_those_of_launch(
    request: pytest.FixtureRequest,
    place: Place,
    launched: Path,
    tmp_path: Path,
    trainer: str,
    world: int,
    stage: int | str,
) -> None:
    """Two micro-steps an update; three changes in 16 steps."""
    result = run(request, world, case_of(place, tmp_path / "out", stage, trainer, gas=2))
    assert result["ddp"] == (world == 2 and stage == worker.TORCH)
    assert result["ranks"] == training.ranks(launched) and len(result["ranks"]) == 3
    assert len({tuple(ranks.values()) for ranks in result["ranks"]}) == 3, "every change moved a direction"
    assert relative(result["losses"], training.losses(launched)) < 1e-5
    assert_same_adapter(tmp_path / "out", launched / "adapter")


@pytest.mark.parametrize(
    ("world", "stage", "other_world", "other_stage"),
    [
        (2, worker.TORCH, 1, worker.TORCH),
        (1, worker.TORCH, 2, 3),
        pytest.param(2, 3, 2, 3, marks=FULL),
        pytest.param(2, 2, 1, 0, marks=FULL),
        pytest.param(1, 0, 2, worker.TORCH, marks=FULL),
    ],
)
def test_a_resume_goes_on_at_another_stage_and_number_of_processes(
    request: pytest.FixtureRequest,
    place: Place,
    launched: Path,
    tmp_path: Path,
    world: int,
    stage: int | str,
    other_world: int,
    other_stage: int | str,
) -> None:
    """From step 6, one change behind it and two before it."""
    saving = {"arguments_more": {"save_strategy": "steps", "save_steps": 6}}
    run(request, world, case_of(place, tmp_path / "first", stage, **saving))
    checkpoint = tmp_path / "first" / "checkpoint-6"
    assert (checkpoint / "adapter_model.safetensors").exists()
    case = case_of(place, tmp_path / "second", other_stage, resume=str(checkpoint))
    result = run(request, other_world, case)
    assert result["ranks"] == training.ranks(launched)
    assert relative(result["losses"], training.losses(launched)) < 1e-5
    assert_same_adapter(tmp_path / "second", launched / "adapter")


GRADIENT: dict[str, Any] = {"init": "gradient", "init_batches": 3, "new_direction": "gradient"}
MARKET = {**GRADIENT, "importance": "growth"}


def launched_with(place: Place, one_process: Processes, options: dict[str, Any]) -> Path:
    """The run folder of `launch` with more options; made once."""
    folder = place.root / "-".join(map(str, options.values()))
    if not folder.exists():
        (done,) = one_process.run(training.command, place.arguments(folder, 2, **{**STILL, **options}))
        assert done["code"] == 0, done["stderr"]
    return folder


@pytest.mark.parametrize(
    ("trainer", "world", "stage"),
    [
        ("Trainer", 2, worker.TORCH),
        pytest.param("Trainer", 1, worker.TORCH, marks=FULL),
        pytest.param("Trainer", 2, 2, marks=FULL),
        pytest.param("Trainer", 2, 3, marks=FULL),
        pytest.param("SFTTrainer", 2, 3, marks=[WITH_TRL, FULL]),
    ],
)
def test_directions_of_the_gradient_are_those_of_launch(
    request: pytest.FixtureRequest,
    place: Place,
    one_process: Processes,
    tmp_path: Path,
    trainer: str,
    world: int,
    stage: int | str,
) -> None:
    """The start and the new directions; two micro-steps an update."""
    expected = launched_with(place, one_process, GRADIENT)
    result = run(request, world, case_of(place, tmp_path / "out", stage, trainer, GRADIENT, gas=2))
    assert result["ranks"] == training.ranks(expected)
    for ours, theirs in zip(result["noise"], training.read_lines(expected / "ranks.jsonl"), strict=True):
        assert ours and ours == pytest.approx(theirs["noise"], rel=1e-2), (
            "parts of the records, told apart alike"
        )
    assert relative(result["losses"], training.losses(expected)) < 1e-4
    assert_same_adapter(tmp_path / "out", expected / "adapter")


@pytest.mark.full
@pytest.mark.parametrize(("world", "stage"), [(1, worker.TORCH), (2, worker.TORCH), (2, 0), (2, 3)])
def test_the_markets_prices_are_those_of_launch(
    request: pytest.FixtureRequest,
    place: Place,
    one_process: Processes,
    tmp_path: Path,
    world: int,
    stage: int | str,
) -> None:
    """What a direction more would gain and one less cost: the records are told apart as in `launch`."""
    expected = launched_with(place, one_process, MARKET)
    result = run(request, world, case_of(place, tmp_path / "out", stage, options=MARKET, gas=2))
    theirs = [row["market"] for row in training.read_lines(expected / "ranks.jsonl")]
    assert len(result["market"]) == len(theirs) == 3
    for ours, other in zip(result["market"], theirs, strict=True):
        assert max(other["loss"].values()) > 0
        assert ours["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert ours["gain"] == pytest.approx(other["gain"], rel=1e-2)


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{"orth_form": "norm"}, {"importance": "sensitivity"}, {"spectrum": "exact"}], ids=str
)
@pytest.mark.parametrize(("world", "stage"), [(2, worker.TORCH), (1, 2), (2, 3)])
def test_options_mean_what_they_mean_in_launch(
    request: pytest.FixtureRequest,
    place: Place,
    one_process: Processes,
    tmp_path: Path,
    options: dict[str, Any],
    world: int,
    stage: int | str,
) -> None:
    """A penalty is added once an update, whoever counts the micro-steps."""
    expected = launched_with(place, one_process, options)
    result = run(request, world, case_of(place, tmp_path / "out", stage, options=options, gas=2))
    assert result["ranks"] == training.ranks(expected)
    assert relative(result["losses"], training.losses(expected)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("world", "stage"), [(1, worker.TORCH), (2, worker.TORCH), (2, 0), (2, 2), (2, 3)])
def test_bf16_trains_with_and_without_checkpointed_activations(
    request: pytest.FixtureRequest,
    place: Place,
    launched: Path,
    tmp_path: Path,
    world: int,
    stage: int | str,
    checkpointing: bool,
) -> None:
    more = {"bf16": True, "gradient_checkpointing": checkpointing}
    result = run(request, world, case_of(place, tmp_path / "out", stage, gas=2, arguments_more=more))
    assert len({tuple(ranks.values()) for ranks in result["ranks"]}) == 3, "every change moved a direction"
    assert relative(result["losses"], training.losses(launched)) < 0.02
    assert all(
        torch.isfinite(t).all() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )


@pytest.mark.full
@pytest.mark.parametrize(("world", "stage"), [(2, worker.TORCH), (1, 0), (2, 2), (2, 3)])
def test_the_best_checkpoint_comes_back(
    request: pytest.FixtureRequest, place: Place, tmp_path: Path, world: int, stage: int | str
) -> None:
    """Step 8 is the best of 16, with two of the three changes behind it; what is saved at the end is that of step 8."""
    more = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        **{"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4},
    }
    case = case_of(place, tmp_path / "out", stage, arguments_more=more, scores=[0.1, 0.9, 0.2, 0.3])
    result = run(request, world, case)
    assert len(result["ranks"]) == 2
    best, end = (
        load_file(f / "adapter_model.safetensors")
        for f in (tmp_path / "out" / "checkpoint-8", tmp_path / "out")
    )
    last = load_file(tmp_path / "out" / "checkpoint-16" / "adapter_model.safetensors")
    assert all(torch.equal(end[name], best[name]) for name in best)
    assert any(last[name].shape != best[name].shape for name in best)
