"""`init_adapter`: the command goes on from an adapter, alike at every stage, and a resumed run does not begin again."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora_ds.peft_format import max_relative_difference
from flexlora_ds.peft_reading.plain import read_peft_adapter
from tests.helpers import trainer_worker as worker
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place, make_place

STILL = {"adjust_size": 0, "max_steps": 1, "lr": 1e-30, "dropout": 0.0}
"""What training leaves of such a run is what it began with."""
SHORT = {"max_steps": 9, "adjust_freeze": 3}
"""One change, after step 5."""


@dataclass(frozen=True)
class Trained:
    """A base, an adapter of mixed ranks for it by PEFT, and the model into which PEFT merged the two."""

    place: Place
    adapter: Path
    merged: Path

    def arguments(self, out: Path, stage: int = 2, **options: Any) -> list[str]:
        return self.place.arguments(out, stage, **{"init_adapter": self.adapter, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("init_adapter")
    found = Trained(make_place(root / "place"), root / "adapter", root / "merged")
    base = str(found.place.model)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=5,
            lora_alpha=7,
            rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 9},
            alpha_pattern={"v_proj": 3},
            use_rslora=True,
            init_lora_weights=False,
            target_modules=["q_proj", "v_proj", "down_proj"],
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.mul_(0.3)
        model.save_pretrained(found.adapter)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(found.adapter))
        again.merge_and_unload().save_pretrained(found.merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(found.merged)
    return found


def run(processes: Processes, arguments: list[str], code: int = 0) -> str:
    results = processes.run(training.command, arguments)
    assert {result["code"] for result in results} == {code}, results[0]["stderr"]
    return str(results[0]["stdout"] + results[0]["stderr"])


def test_the_first_loss_is_that_of_the_model_that_peft_merged(
    trained: Trained, one_process: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    """And the losses through rank changes are the same at other stages and numbers of processes."""
    said = run(one_process, trained.arguments(tmp_path / "alone", 0, **SHORT, dropout=0.0, init="gradient"))
    assert "6 matrices of rank 2 to 9; it lacks 4 matrices, which begin anew" in said
    assert "no effect: init (init_adapter)" in said
    run(two_processes, trained.arguments(tmp_path / "sharded", 3, **SHORT, dropout=0.0))
    merged = trained.place.arguments(tmp_path / "merged", 0, **STILL, model=trained.merged)
    run(one_process, merged)
    (expected,) = training.losses(tmp_path / "merged")
    updates = [m.delta().abs().max() for m in read_peft_adapter(trained.adapter).matrices.values()]
    assert max(updates) > 0.02, "the adapter matters"
    alone = training.losses(tmp_path / "alone")
    assert alone[0] == pytest.approx(expected, rel=1e-5)
    assert training.losses(tmp_path / "sharded") == pytest.approx(alone, rel=1e-4)
    assert training.ranks(tmp_path / "sharded") == training.ranks(tmp_path / "alone")
    total = sum(m.rank for m in read_peft_adapter(trained.adapter).matrices.values()) + 4 * 4
    assert {sum(ranks.values()) for ranks in training.ranks(tmp_path / "alone")} == {total}


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(3, "fp32"), (2, "bf16"), *(pytest.param(s, "bf16", marks=pytest.mark.full) for s in (0, 1, 3))],
)
def test_what_went_in_comes_out(
    trained: Trained, two_processes: Processes, tmp_path: Path, stage: int, dtype: str
) -> None:
    """The fp32 masters hold it unrounded, also where the model computes in bf16."""
    targets = "q_proj,v_proj,down_proj"
    arguments = trained.arguments(tmp_path / "out", stage, **STILL, dtype=dtype, target_modules=targets)
    run(two_processes, arguments)
    there, here = read_peft_adapter(trained.adapter), read_peft_adapter(tmp_path / "out" / "adapter")
    assert max_relative_difference(there, here) < 1e-6
    assert {n: m.rank for n, m in there.matrices.items()} == {n: m.rank for n, m in here.matrices.items()}


def test_a_resumed_run_is_the_uninterrupted_one(
    trained: Trained, two_processes: Processes, tmp_path: Path
) -> None:
    """Its adapter must be the same by content, wherever it lies."""
    options = {**SHORT, "save_every": 4, "keep_checkpoints": 9}
    run(two_processes, trained.arguments(tmp_path / "whole", 3, **options))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004"
    moved = tmp_path / "moved"
    shutil.copytree(trained.adapter, moved)
    resumed = {**options, "init_adapter": moved, "resume": checkpoint}
    said = run(two_processes, trained.arguments(tmp_path / "rest", 3, **resumed))
    assert "goes on from" not in said
    assert training.losses(tmp_path / "rest")[-5:] == training.losses(tmp_path / "whole")[-5:]
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    refused = run(two_processes, trained.arguments(tmp_path / "other", 3, **resumed), code=1)
    assert "the checkpoint is of another run: init_adapter is" in refused
    none = {**resumed, "init_adapter": ""}
    refused = run(two_processes, trained.arguments(tmp_path / "none", 3, **none), code=1)
    assert "init_adapter is" in refused and "none (its files differ)" in refused


@pytest.mark.full
@pytest.mark.parametrize("stage", [worker.TORCH, 2, 3])
def test_transformers_trainer_goes_on_alike(
    trained: Trained, two_processes: Processes, tmp_path: Path, stage: int | str
) -> None:
    """With a model that `start_from_adapter` prepared, and the default `init`."""
    options = {**SHORT, "dropout": 0.0, "lr_schedule": "constant", "warmup_steps": 0}
    run(two_processes, trained.arguments(tmp_path / "launch", 2, **options))
    case = {
        "arguments": trained.place.arguments(tmp_path / "unused", 0, **options),
        "out": str(tmp_path / "trainer"),
        "stage": stage,
        "trainer": "Trainer",
        "init_adapter": str(trained.adapter),
    }
    found = two_processes.run(worker.train, case)[0]
    assert found["losses"] == pytest.approx(training.losses(tmp_path / "launch"), rel=1e-5)
    assert found["ranks"] == training.ranks(tmp_path / "launch") and found["ranks"]


def test_a_budget_cuts_it_and_another_base_is_doubted(
    trained: Trained, one_process: Processes, tmp_path: Path
) -> None:
    shutil.copytree(trained.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "somebody/model"}))
    options = {**STILL, "init_adapter": tmp_path / "adapter", "init_rank_budget": 12}
    arguments = trained.arguments(tmp_path / "out", 2, **options, target_modules="q_proj,v_proj,down_proj")
    said = run(one_process, arguments)
    assert "kept 12 of 28 directions" in said
    assert sum(m.rank for m in read_peft_adapter(tmp_path / "out" / "adapter").matrices.values()) == 12
    assert "warning: init_adapter was trained on somebody/model, and the base is" in said


def test_what_cannot_go_on_is_refused_in_one_line(
    trained: Trained, one_process: Processes, tmp_path: Path
) -> None:
    """Before a weight is loaded; a dry run says the same, and the ranks."""
    out = tmp_path / "out"
    for options, line in (
        (
            {"method": "lora"},
            "method lora goes on from no adapter (--init_adapter on the command line); set method flexlora",
        ),
        ({"init_adapter": "", "init_rank_budget": 9}, "init_rank_budget belongs to init_adapter"),
        (
            {"init_rank_budget": 5},
            "a budget of 5 directions is below rank 1 in every matrix, which is 6; give at least 6",
        ),
        ({"match_params": "lora:4"}, "the ranks are those of init_adapter (--match_params"),
        ({"target_modules": "q_proj"}, "which is not among the layers to be adapted here"),
        ({"model": trained.merged}, "whose weights are not those of"),
        ({"init_adapter": tmp_path}, "no adapter_config.json in"),
    ):
        for dry_run in (False, True):
            said = run(one_process, trained.arguments(out, dry_run=dry_run, **options), code=2)
            assert line in said and "Traceback" not in said
    assert "10 layers, rank 2 to 9: " in run(one_process, trained.arguments(out, dry_run=True))
