"""PEFT's LoRA-GA in our loop: its start, its checkpoint, and an adapter that belongs on the original base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexlora_ds import export
from flexlora_ds.checkpoint.state import open_checkpoint
from tests.helpers import training
from tests.helpers.lora_ga_reference import mean_gradients
from tests.helpers.model_logits import apart, logits
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import assert_same_run
from tests.helpers.training import Place, make_place
from tests.helpers.training_logits import IDS, TRAINING_LOGITS, with_logits

RANK, BATCHES = 4, 2
STILL: dict[str, Any] = {"method": "lora_ga", "dropout": 0.0, "init_batches": BATCHES, "val_size": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("lora_ga"))


def run(processes: Processes, place: Place, out: Path, stage: int = 2, **options: Any) -> str:
    results = processes.run(with_logits, place.arguments(out, stage, **{**STILL, **options}))
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    return str(results[0]["stdout"] + results[0]["stderr"])


@pytest.fixture(scope="module")
def alone(place: Place, one_process: Processes) -> Path:
    run(one_process, place, place.root / "alone", 0)
    return place.root / "alone"


@pytest.fixture(scope="module")
def two(place: Place, two_processes: Processes) -> Path:
    run(two_processes, place, place.root / "two", 2, micro_batch_size=2)
    return place.root / "two"


def beginning(out: Path) -> dict[str, Tensor]:
    """A₀ and B₀ by `MODULE.lora_A` and `MODULE.lora_B`, from the last checkpoint."""
    constants = open_checkpoint(out / "checkpoints" / f"step_{training.STEPS:08d}").constants()
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value
        for name, value in constants.items()
    }


def base_of(place: Place) -> Any:
    return AutoModelForCausalLM.from_pretrained(place.model)


def test_it_begins_with_the_singular_pairs_of_the_mean_gradient(place: Place, alone: Path) -> None:
    """As the paper says with PEFT's defaults: A₀ the first right vectors, B₀ the next left ones, at a scale."""
    found = beginning(alone)
    gradients = mean_gradients(
        place, steps=BATCHES, targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    )
    assert {name.rpartition(".")[0] for name in found} == set(gradients)
    for name, gradient in gradients.items():
        U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        A, B = found[f"{name}.lora_A"].double(), found[f"{name}.lora_B"].double()
        scale = gradient.shape[0] ** 0.25 / 16**0.5
        assert (A @ A.T - torch.eye(RANK)).abs().max() < 1e-4
        assert B.norm(dim=0) == pytest.approx(scale * S[RANK : 2 * RANK], rel=0.02)
        # The spaces, for pairs of nearly equal σ may turn within them.
        assert float((A @ Vh[: RANK + 1].T).norm() ** 2) == pytest.approx(RANK, rel=0.01)
        assert float((U[:, : 2 * RANK + 1].T @ B).norm() / B.norm()) == pytest.approx(1, rel=0.01)


def test_the_first_loss_is_the_bases_and_the_next_ones_are_another_runs(
    place: Place, alone: Path, one_process: Processes, tmp_path: Path
) -> None:
    run(one_process, place, tmp_path / "lora", 0, method="lora")
    plain, mine = training.losses(tmp_path / "lora"), training.losses(alone)
    assert mine[0] == pytest.approx(plain[0], rel=1e-5)
    assert sum(mine[1:8]) < sum(plain[1:8])


def test_processes_and_stages_begin_and_train_alike(alone: Path, two: Path) -> None:
    one, other = beginning(alone), beginning(two)
    assert one.keys() == other.keys()
    for name, value in one.items():
        directions = [v if name.endswith("lora_A") else v.T for v in (value, other[name])]
        cosines = torch.nn.functional.cosine_similarity(*directions, dim=1)
        # A singular vector's sign may turn with the rounding of the sum.
        assert cosines.abs().min() > 0.999, name
        assert float(other[name].norm()) == pytest.approx(float(value.norm()), rel=1e-4), name
    mine, theirs = training.losses(two), training.losses(alone)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert mine == pytest.approx(theirs, rel=1e-2), "rounding, 16 steps on"


@pytest.mark.parametrize("name", ["alone", "two"])
def test_the_adapter_belongs_on_the_original_base(
    place: Place, name: str, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(name)
    expected = load_file(out / TRAINING_LOGITS)["logits"]
    by_peft = PeftModel.from_pretrained(base_of(place), out / "adapter")
    assert by_peft.peft_config["default"].r == 2 * RANK
    assert apart(logits(base_of(place), IDS), expected) > 1e-2
    assert apart(logits(by_peft, IDS), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["peft-uniform", "merged"])
def test_the_exports_take_it(place: Place, alone: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "export"
    assert export.main(["--run", str(alone), "--to", kind, "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out) if kind == "merged" else base_of(place)
    model = model if kind == "merged" else PeftModel.from_pretrained(model, out)
    assert apart(logits(model, IDS), load_file(alone / TRAINING_LOGITS)["logits"]) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        ("fp32", 2),
        pytest.param("bf16", 1, marks=pytest.mark.full),
        pytest.param("bf16", 0, marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    dtype: str, stage: int, place: Place, two_processes: Processes, tmp_path: Path
) -> None:
    """The base that it changed included: the losses are the same to the bit."""
    options = {"dtype": dtype, "dropout": 0.2, "save_every": 7, "keep_checkpoints": 9}
    run(two_processes, place, tmp_path / "whole", stage, **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000007"
    said = run(two_processes, place, tmp_path / "rest", stage, **options, resume=checkpoint)
    assert "LoRA-GA from the gradient" not in said, "it does not begin again"
    assert_same_run(tmp_path / "rest", tmp_path / "whole")


def test_fewer_records_than_batches_asked_for_are_said(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    said = run(one_process, place, tmp_path / "few", init_batches=50, max_steps=1, init="gradient")
    assert "LoRA-GA from the gradient of 40 records" in said
    assert "warning: the records fill 5 batches, fewer than init_batches 50" in said
    assert re.search(r"^no effect: .*, init \(method lora_ga\)$", said, re.MULTILINE)
