"""Runs measured on further records: which ones, their loss against plain torch, and nothing measured twice."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.held_out import FinishedRun
from benchmarks.learning.further import COUNT, FILE, FURTHER, FurtherRecords, Measured, further_records
from benchmarks.learning.runs import Run, Runner
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.peft_format import PREFIX, WEIGHTS_FILE
from tests.helpers.processes import Processes
from tests.helpers.training import SMALL, command, make_place

COUNT_OF_TEST = 6


def merged_loss(run: FinishedRun) -> float:
    """By transformers alone: the rounded base in fp32 with s B A added, one record at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.options.model, dtype=torch.bfloat16).float().eval()
    factors = load_file(run.folder / "adapter" / WEIGHTS_FILE)
    scale = run.options.alpha / run.options.rank
    total, targets = 0.0, 0
    with torch.no_grad():
        for key in (k for k in factors if k.endswith("lora_A.weight")):
            layer = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            layer.weight += scale * factors[key.replace("lora_A", "lora_B")] @ factors[key]
        for example in further_records(run, COUNT_OF_TEST):
            ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
            logits = model(ids[None]).logits[0]
            total += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
            targets += int((labels[1:] != -100).sum())
    return total / targets


def test_a_run_is_measured_on_records_that_it_never_saw(tmp_path: Path, one_process: Processes) -> None:
    place = make_place(tmp_path)
    options = {"model": place.model, "data": place.data, "recipe": "demo", **SMALL}
    options |= {"max_steps": 3, "init_batches": 2, "batch_size": 4, "dtype": "bf16", "lr": 3e-2}
    options |= {"warmup_steps": 1, "dropout": 0, "val_every": 0}
    runner = Runner(tmp_path / "out", tuple(f"--{key}={value}" for key, value in options.items()))
    (done,) = one_process.run(command, runner.arguments(Run("LoRA", 1)))
    assert done["code"] == 0, done["stderr"]
    folder = runner.folder(Run("LoRA", 1))
    run = FinishedRun(folder)

    chosen = set(further_records(run, COUNT_OF_TEST).record_ids.tolist())
    micro_batches = [batch for step in (1, 2, 3) for batch in run.data.train.micro_batches(step)]
    seen = {record for batch in micro_batches for record in batch.record_ids}
    held_out = set(run.data.tokenised.validation.record_ids.tolist())
    assert (len(chosen), len(seen), len(held_out)) == (COUNT_OF_TEST, 12, SMALL["val_size"])
    assert not chosen & seen and not chosen & held_out
    with pytest.raises(UserError, match=r"records are neither trained on nor held out, and 5,000 are asked"):
        further_records(run, 5000)

    found = FurtherRecords(COUNT_OF_TEST).figures(folder)
    assert found == {FURTHER: pytest.approx(merged_loss(run), rel=1e-5), COUNT: COUNT_OF_TEST}
    kept = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**kept, "loss": 7.0}))
    assert FurtherRecords(COUNT_OF_TEST).figures(folder)[FURTHER] == 7.0, "measured a second time"
    assert FurtherRecords(COUNT_OF_TEST - 1).figures(folder)[FURTHER] != 7.0


def test_runs_of_a_seed_are_compared_on_the_same_records(tmp_path: Path) -> None:
    measured = Measured(6, 1, "one digest", 60, 0.5)
    others = (measured, replace(measured, loss=0.25), replace(measured, seed=2, digest="another"))
    for name, row in zip(("a", "b", "c"), others, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(json.dumps(asdict(row)))
    further = FurtherRecords(6)
    assert [further.figures(tmp_path / name)[FURTHER] for name in ("a", "b", "c")] == [0.5, 0.25, 0.5]
    (tmp_path / "b" / FILE).write_text(json.dumps(asdict(replace(measured, digest="another"))))
    with pytest.raises(RunError, match="on other records than another run of seed 1"):
        further.figures(tmp_path / "b")
    assert FurtherRecords(0).figures(tmp_path) == {}
