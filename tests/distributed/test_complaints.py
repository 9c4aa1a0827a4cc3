"""What users of such software report, each under the report's own name (docs/complaints.md lists them all)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place, make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("complaints"))


@pytest.fixture(scope="module")
def sharded(place: Place, two_processes: Processes) -> Path:
    """A run at ZeRO-3 in two processes."""
    out = place.root / "sharded"
    results = two_processes.run(training.command, place.arguments(out, 3, save_every=8, keep_checkpoints=9))
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    return out


@pytest.mark.complaint("peft 2892", "peft 2500", "peft 2450", "trl 4416", "DeepSpeed 4295", "InternVL 905")
def test_peft_2892_an_adapter_saved_at_zero_3_is_whole_and_has_learnt(sharded: Path) -> None:
    tensors = load_file(sharded / "adapter" / "adapter_model.safetensors")
    ranks = training.read_lines(sharded / "ranks.jsonl")[-1]["ranks"]
    assert len(tensors) == 2 * len(ranks)
    for name, rank in ranks.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert a.shape[0] == b.shape[1] == rank and a.numel() and b.numel()
        assert bool(a.isfinite().all() and b.isfinite().all())
        assert float(b.abs().max()) > 0, "lora_B stayed 0"


@pytest.mark.complaint("DeepSpeed 6691", "DeepSpeed 5430", "LLaMA-Factory 8295")
def test_deepspeed_6691_a_run_resumes_in_another_number_of_processes_where_it_was(
    place: Place, sharded: Path, one_process: Processes, tmp_path: Path
) -> None:
    checkpoint = sharded / "checkpoints" / "step_00000008"
    arguments = place.arguments(tmp_path / "alone", 2, resume=str(checkpoint))
    (done,) = one_process.run(training.command, arguments)
    assert done["code"] == 0, done["stderr"]
    rest = training.losses(tmp_path / "alone")[-8:]
    assert rest == pytest.approx(training.losses(sharded)[8:], rel=1e-4)


@pytest.mark.complaint("peft 1801", "peft 432", "peft 3373", "peft 1539")
def test_peft_1801_the_loop_calls_the_allocator_and_no_rank_becomes_0(sharded: Path) -> None:
    rows = training.read_lines(sharded / "ranks.jsonl")
    assert [row["step"] for row in rows] == training.CHANGES
    assert all(row["pruned"] and row["expanded"] for row in rows), "nobody had to call anything"
    ranks = rows[-1]["ranks"]
    assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1


@pytest.mark.complaint("peft 1745")
def test_peft_1745_adalora_with_checkpointing_in_several_processes(
    place: Place, two_processes: Processes, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "run", 2, method="adalora", gradient_checkpointing="true")
    results = two_processes.run(training.command, arguments)
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    totals = [row["total_rank"] for row in training.read_lines(tmp_path / "run" / "ranks.jsonl")]
    assert totals[-1] < totals[0]


@pytest.mark.complaint("ms-swift 6815")
def test_ms_swift_6815_the_gradient_norm_is_one_figure_at_every_stage(
    place: Place, sharded: Path, one_process: Processes, tmp_path: Path
) -> None:
    (done,) = one_process.run(training.command, place.arguments(tmp_path / "whole", 0))
    assert done["code"] == 0, done["stderr"]
    norms = [
        [row["grad_norm"] for row in training.read_lines(out / "metrics.jsonl")][:3]
        for out in (tmp_path / "whole", sharded)
    ]
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-4) and norms[0][0] > 0


@pytest.mark.complaint("LLaMA-Factory 8482", "DeepSpeed 3719", "DeepSpeed 5195", "accelerate 2821")
def test_llama_factory_8482_a_4_bit_base_is_refused_in_one_line(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    """Its packed weights cannot be sharded, nor has an adapter's input their precision."""
    shutil.copytree(place.model, tmp_path / "four_bit")
    config = tmp_path / "four_bit" / "config.json"
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": four_bit}))
    for stage in (2, 3):
        arguments = place.arguments(tmp_path / f"run_{stage}", stage, model=tmp_path / "four_bit")
        (done,) = one_process.run(training.command, arguments)
        assert done["code"] == 2, done["stderr"]
        last = done["stderr"].strip().splitlines()[-1]
        assert last.startswith("error: ") and "bitsandbytes" in last and str(tmp_path / "four_bit") in last
        assert not (tmp_path / f"run_{stage}" / "adapter").exists()
