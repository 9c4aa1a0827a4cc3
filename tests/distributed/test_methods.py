"""Every method trains in the same loop: a resume is the uninterrupted run, and what is saved loads elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eval.__main__ import main as evaluate
from flexlora_ds.peft_reading.attach import attach_adapter
from launch.options.train_options import Method, TrainOptions
from tests.helpers import eval_tiny, training
from tests.helpers.model_logits import apart, logits
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import assert_same_run
from tests.helpers.training import Place, make_place
from tests.helpers.training_logits import IDS, TRAINING_LOGITS, with_logits

SAVED, STEPS = 5, 10
PEFT_FILES: dict[str, dict[str, Any]] = {
    "patterns": {
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {"q_proj": 6},
        "use_dora": True,
        "modules_to_save": ["lm_head"],
    },
    "miss": {"peft_type": "MISS", "r": 4},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 8},
    "vera": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"]},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "randlora": {"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj"]},
    "loha": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "down_proj"]},
}
"""For `method: peft`, by the name of the case."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("methods"))


def options_of(case: str, folder: Path) -> dict[str, Any]:
    """The options of a case: a method, or a file of `PEFT_FILES`."""
    if case not in PEFT_FILES:
        return {"method": case}
    file = folder / f"{case}.json"
    file.write_text(json.dumps(PEFT_FILES[case]))
    return {"method": "peft", "peft_config": file}


def run(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> Path:
    results = processes.run(with_logits, place.arguments(out, stage, **options))
    assert {result["code"] for result in results} == {0}, results[0]["stderr"]
    return out


def trained_model(place: Place, out: Path) -> Any:
    """What the run left, loaded by transformers and PEFT alone."""
    if (out / "model").exists():
        return AutoModelForCausalLM.from_pretrained(out / "model")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), out / "adapter")


def require_whole(
    case: str, processes: Processes, place: Place, folder: Path, stage: int, **options: Any
) -> None:
    """A run, its resume and what it saved."""
    asked = {
        "micro_batch_size": 2,
        "save_every": SAVED,
        "keep_checkpoints": 9,
        "max_steps": STEPS,
        "adjust_freeze": 2,
        **options_of(case, folder),
        **options,
    }
    last = asked["max_steps"]
    whole = run(processes, place, folder / "whole", stage, **asked)
    expected = load_file(whole / TRAINING_LOGITS)["logits"]
    base = AutoModelForCausalLM.from_pretrained(place.model)
    assert apart(logits(base, IDS), expected) > 1e-3, "it has learnt something"
    assert apart(logits(trained_model(place, whole), IDS), expected) <= 1e-5
    if (whole / "adapter").exists():
        evaluated = attach_adapter(base, str(whole / "adapter"))  # as an evaluation does
        assert apart(logits(evaluated, IDS), expected) <= 1e-5
    checkpoint = whole / "checkpoints" / f"step_{SAVED:08d}"
    rest = run(processes, place, folder / "rest", stage, **asked, resume=checkpoint)
    assert_same_run(rest, whole, last)


@pytest.mark.parametrize("case", ["dora", "pissa", "adalora", "full", "vera"])
def test_a_method_resumes_and_saves(case: str, place: Place, one_process: Processes, tmp_path: Path) -> None:
    require_whole(case, one_process, place, tmp_path, 0)


def test_equal_budgets_are_said_at_start_and_end(
    place: Place, one_process: Processes, tmp_path: Path
) -> None:
    asked = {"method": "adalora", "match_params": "lora:4", "rank": 8, "adjust_freeze": 2, "max_steps": 8}
    (result,) = one_process.run(training.command, place.arguments(tmp_path / "run", 0, **asked))
    assert result["code"] == 0, result["stderr"]
    line = re.search(
        r"rank (\d+) by match_params lora:4: ([\d,]+) trainable parameters, .* for ([\d,]+) \(",
        result["stderr"],
    )
    assert line is not None, result["stderr"]
    rank, expected, wanted = (int(number.replace(",", "")) for number in line.groups())
    model = AutoModelForCausalLM.from_pretrained(place.model)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    assert wanted == get_peft_model(model, config).get_nb_trainable_parameters()[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["match_params"] == {"asked": "lora:4", "parameters": wanted}
    # Expected of directions of mean size; which ones it kept shows in the end.
    assert summary["trainable_params"]["mean"] == pytest.approx(expected, rel=0.1)
    assert TrainOptions.from_yaml((tmp_path / "run" / "options.yaml").read_text()).rank == rank


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", sorted({*get_args(Method)} - {"peft"}))
def test_every_method_resumes_and_saves_at_every_stage(
    method: str, stage: int, place: Place, two_processes: Processes, tmp_path: Path
) -> None:
    if (method, stage) != ("lora_ga", 3):
        require_whole(method, two_processes, place, tmp_path, stage, max_steps=30, dropout=0.1)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("case", sorted(PEFT_FILES))
def test_any_adapter_of_peft_resumes_and_saves(
    case: str, stage: int, place: Place, two_processes: Processes, tmp_path: Path
) -> None:
    require_whole(case, two_processes, place, tmp_path, stage, max_steps=30)


@pytest.mark.full
@pytest.mark.parametrize("method", ["adalora", "pissa", "full"])
def test_a_resume_on_more_processes_goes_on_alike(
    method: str, place: Place, one_process: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    asked = {"method": method, "dropout": 0.0, "save_every": 7, "keep_checkpoints": 9, "micro_batch_size": 2}
    whole = run(one_process, place, tmp_path / "whole", 0, **asked)
    checkpoint = whole / "checkpoints" / "step_00000007"
    rest = run(two_processes, place, tmp_path / "rest", 3, **asked, resume=checkpoint)
    assert training.losses(rest) == pytest.approx(training.losses(whole), rel=1e-4)
    assert training.ranks(rest) == training.ranks(whole) if method == "adalora" else True


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "adalora", "dora", "pissa"])
def test_an_evaluation_takes_what_a_run_left(
    method: str, place: Place, one_process: Processes, tmp_path: Path
) -> None:
    """With the prompt that it was trained with, and the figure of the live model after its last step."""
    data = eval_tiny.write_data(tmp_path / "tests", 4)
    asked = {"method": method, "prompt": "llm_adapters", "lr": 0.03, "eval_every": 16, "eval_data": data}
    asked |= {"eval_items": 4, "eval_mode": "score"}
    out = run(one_process, place, tmp_path / "run", 0, **asked)
    trained = ["--model", str(out / "model")]
    if method != "full":
        trained = ["--model", str(place.model), "--adapter", str(out / "adapter")]
    words = ["--data", str(data), "--mode", "score", "--limit", "4", "--out", str(tmp_path / "eval")]
    assert evaluate([*trained, *words]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["settings"]["prompt"] == "llm_adapters"
    live = training.read_lines(out / "accuracy.jsonl")[-1]
    if method != "pissa":  # its adapter lacks the rounding of the base that it was trained on
        assert live["accuracy"] == {name: task["accuracy"] for name, task in results["tasks"].items()}
