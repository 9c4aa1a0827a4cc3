"""A NaN on one process: every process skips that update alike, nothing moves, and the log says whose it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


def poisoned(arguments: list[str], steps: list[int], process: int, kind: str) -> dict[str, Any]:
    """The training command with a loss or a gradient of NaN on one process in some steps."""
    import os

    from launch import train

    sound = train.token_loss

    def loss_of(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = sound(model, *args, **kwargs)
        due = torch.is_grad_enabled() and model.global_steps + 1 in steps
        if not due or int(os.environ["RANK"]) != process:
            return loss
        if kind == "infinite loss":
            return loss + float("inf")
        loss.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
        return loss

    with patch.object(train, "token_loss", loss_of):
        return training.command(arguments)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("ds", "dtype", "kind"),
    [
        ("zero0", "fp32", "gradient"),
        ("zero3", "fp32", "infinite loss"),
        *(
            pytest.param(ds, dtype, kind, marks=pytest.mark.full)
            for ds, dtype, kind in [
                ("zero0", "fp32", "infinite loss"),
                ("zero0", "bf16", "gradient"),
                ("zero1", "fp32", "gradient"),
                ("zero2", "fp32", "gradient"),
                ("zero2", "bf16", "infinite loss"),
                ("zero1_offload", "fp32", "infinite loss"),
                ("zero2_offload", "fp32", "gradient"),
                ("zero3", "bf16", "gradient"),
                ("zero3_offload", "fp32", "gradient"),
            ]
        ),
    ],
)
@pytest.mark.complaint("LLaMA-Factory 8137", "LLaMA-Factory 8088", "LLaMA-Factory 7263", "DeepSpeed 5242")
def test_an_update_that_is_not_finite_is_skipped_by_all(
    ds: str, dtype: str, kind: str, place: Place, tmp_path: Path, two_processes: Processes
) -> None:
    out = tmp_path / "run"
    options = {"save_every": 2, "keep_checkpoints": 9, "max_steps": 10, "adjust_start": 1, "dtype": dtype}
    arguments = place.arguments(out, ds=f"ds_configs/{ds}.json", micro_batch_size=2, **options)
    results = two_processes.run(poisoned, arguments, [5, 6], 1, kind, timeout=300)
    assert [r["code"] for r in results] == [0, 0], results[0]["stderr"]
    metrics = training.read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics if row["skipped"]] == [5, 6]
    assert metrics[3]["lr"] != metrics[4]["lr"] == metrics[5]["lr"] == metrics[6]["lr"] != metrics[7]["lr"]
    before, after = (tensors(out / "checkpoints" / f"step_0000000{step}") for step in (4, 6))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before), "a skipped update moved something"
    said = results[0]["stderr"]
    assert "step 5: not finite in the " in said and "of process 1 (records " in said
    assert "of process 0 (" not in said and "(2 in a row)" in said
    assert {row["step"] for row in training.read_lines(out / "ranks.jsonl")}.isdisjoint({5, 6})


def test_three_in_a_row_end_the_run(place: Place, tmp_path: Path, two_processes: Processes) -> None:
    out = tmp_path / "run"
    arguments = place.arguments(out, stage=2, max_steps=8, save_every=2)
    results = two_processes.run(poisoned, arguments, [3, 4, 5], 0, "gradient", timeout=300)
    assert [r["code"] for r in results] == [1, 1]
    assert "error: 3 updates in a row were not finite (step 5: " in results[0]["stderr"]
    assert "of process 0 (records " in results[0]["stderr"] and "error:" not in results[1]["stderr"]


@pytest.mark.full
@pytest.mark.parametrize("ds", ["zero0", "zero2", "zero3"])
def test_skips_of_the_loss_scale_are_distinguished(
    ds: str, place: Place, tmp_path: Path, two_processes: Processes
) -> None:
    """A gradient that overflows fp16 lowers the scale; it never ends the run."""
    training.require_fp16()
    out = tmp_path / "run"
    arguments = place.arguments(out, ds=f"ds_configs/{ds}.json", dtype="fp16", max_steps=8)
    results = two_processes.run(poisoned, arguments, [3, 4, 5, 6], 0, "gradient", timeout=300)
    assert [r["code"] for r in results] == [0, 0], results[0]["stderr"]
    assert "step 5: the gradient overflowed fp16; update skipped, loss scale now" in results[0]["stderr"]
    assert "not finite" not in results[0]["stderr"]


def ended_without_success(out: Path, result: dict[str, Any], words: str) -> None:
    """Exit code 1 and one line; nothing that says 'trained'."""
    assert result["code"] == 1, result["stderr"]
    errors = [line for line in result["stderr"].splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0], result["stderr"]
    assert "Traceback" not in result["stderr"]
    assert not (out / "adapter").exists() and not (out / "summary.json").exists()
    assert not list((out / "checkpoints").glob("step_*")) if (out / "checkpoints").exists() else True


@pytest.mark.parametrize(
    ("steps", "poison", "kind", "words"),
    [
        (3, [3], "infinite loss", "the last loss is not finite (step 3)"),
        (2, [1, 2], "gradient", "every update was skipped, so nothing was learnt (2 steps)"),
        pytest.param(1, [1], "infinite loss", "every update was skipped", marks=pytest.mark.full),
    ],
)
def test_a_run_that_learnt_nothing_or_ends_in_nan_is_no_success(
    steps: int,
    poison: list[int],
    kind: str,
    words: str,
    place: Place,
    tmp_path: Path,
    two_processes: Processes,
) -> None:
    out = tmp_path / "run"
    arguments = place.arguments(out, stage=2, max_steps=steps, adjust_size=0, val_size=0, save_every=0)
    results = two_processes.run(poisoned, arguments, poison, 1, kind, timeout=300)
    assert results[1]["code"] == 1 and "error:" not in results[1]["stderr"]
    ended_without_success(out, results[0], words)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 1, "val_size": 0, "method": "lora"},
        {"max_steps": 1, "val_size": 0, "method": "full"},
        {"max_steps": 2},
        pytest.param({"max_steps": 1}, marks=pytest.mark.full),
        pytest.param({"max_steps": 1, "val_size": 0}, marks=pytest.mark.full),
        pytest.param({"max_steps": 2, "val_size": 0, "stage": 3}, marks=pytest.mark.full),
        pytest.param({"max_steps": 1, "val_size": 0, "dtype": "bf16"}, marks=pytest.mark.full),
        pytest.param({"max_steps": 12}, marks=pytest.mark.full),
    ],
)
def test_a_learning_rate_beyond_all_numbers_is_no_success(
    options: dict[str, Any], place: Place, tmp_path: Path, one_process: Processes
) -> None:
    """The last training loss may be that of the weights before; what the last update left is looked at too."""
    out = tmp_path / "run"
    given = {"adjust_size": 0, "warmup_steps": 0, "save_every": 0, **options}
    arguments = place.arguments(out, **{"stage": 2, **given}, lr=1e20)
    (result,) = one_process.run(training.command, arguments, timeout=300)
    ended_without_success(out, result, "not finite")


@pytest.mark.complaint("ainode 186")
def test_an_adapter_of_nan_is_never_written(tmp_path: Path) -> None:
    from flexlora_ds import FlexLoRAConfig
    from flexlora_ds.errors import RunError
    from flexlora_ds.peft_format import AdapterFactors, write_peft_adapter

    factors = AdapterFactors(torch.ones(4, 2), torch.tensor([1.0, 1e20]), torch.full((2, 4), 1e20))
    write_peft_adapter(tmp_path / "adapter", {"layer": factors}, FlexLoRAConfig(rank=2), "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    worse = factors._replace(P=torch.full((4, 2), 1e20))  # P λ is beyond fp32
    with pytest.raises(RunError, match=r"layer\.lora_B\.weight holds numbers that are not finite"):
        write_peft_adapter(tmp_path / "adapter", {"layer": worse}, FlexLoRAConfig(rank=2), "base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
