"""Every architecture of the zoo, trained padded, packed and at ZeRO-3 on two processes, with rank changes; exported,
and read again by PEFT and by the evaluation. One kind per mechanism; `full` takes all eighteen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.model.language_model import LanguageModel
from eval.model.loading import load
from eval.options import Options
from eval.protocols import PROTOCOLS
from flexlora_ds.export import export_merged, export_uniform, read_peft_adapter
from tests.helpers import eval_tiny, training
from tests.helpers.processes import Processes
from tests.helpers.training import Place
from tests.helpers.training_logits import IDS, TRAINING_LOGITS, with_logits
from tests.helpers.zoo import ZOO, write_model

MECHANISMS = {"llama", "qwen3", "gemma2", "phi", "mixtral", "granite", "gpt_neox", "falcon", "opt", "gpt2"}
KINDS = [pytest.param(kind, marks=() if kind in MECHANISMS else pytest.mark.full) for kind in ZOO]
UNPACKED = {"falcon"}
"""Takes no boundaries."""
OPTIONS: dict[str, Any] = {
    "target_modules": "all-linear",
    "max_steps": 6,
    "adjust_start": 1,
    "adjust_freeze": 1,
    "adjust_interval": 2,
    "val_size": 4,
    "dropout": 0.1,
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("zoo"))


def train(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> Path:
    for found in processes.run(with_logits, place.arguments(out, stage, **{**OPTIONS, **options})):
        assert found["code"] == 0, found["stderr"]
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_trains_alike_and_is_read_again(
    kind: str, one_process: Processes, two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", kind)
    padded = train(one_process, place, tmp_path / "padded", 0, model=base, padding_free=False)
    parted = train(two_processes, place, tmp_path / "parted", 3, model=base, padding_free=False)
    runs = [padded, parted]
    if kind not in UNPACKED:
        runs.append(train(one_process, place, tmp_path / "packed", 2, model=base, padding_free=True))
    for run in runs:
        assert training.losses(run) == pytest.approx(training.losses(padded), rel=1e-5), run.name
        assert training.ranks(run) == training.ranks(padded), run.name
        assert len(set(training.ranks(run)[-1].values())) > 1
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
        assert apart(logits(by_peft), load_file(run / TRAINING_LOGITS)["logits"]) < 1e-5, run.name
    assert apart(logits(AutoModelForCausalLM.from_pretrained(base)), logits(by_peft)) > 0.01
    check_reading(base, parted, logits(by_peft), tmp_path)


def check_reading(base: Path, run: Path, expected: Tensor, scratch: Path) -> None:
    """Exports and evaluations of a run's adapter give what PEFT gives with it."""
    adapter = read_peft_adapter(run / "adapter")
    export_merged(adapter, scratch / "merged")
    assert apart(logits(AutoModelForCausalLM.from_pretrained(scratch / "merged")), expected) < 1e-5
    export_uniform(adapter, scratch / "uniform")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert apart(logits(PeftModel.from_pretrained(plain, scratch / "uniform")), expected) < 1e-5
    for merge in (False, True):
        options = Options(str(base), str(run / "adapter"), dtype="fp32", merge=merge)
        evaluated = load(options, torch.device("cpu"))
        assert apart(logits(evaluated.model), expected) < 1e-5
    assert_answers_one_by_one(evaluated)


def assert_answers_one_by_one(lm: LanguageModel) -> None:
    items = eval_tiny.task_items(lm, "ARC-Easy", 3)
    answerer = Answerer(lm, PROTOCOLS["generate"], {items.task: items})
    found = answerer.answer(Batch(items.task, items.items, max(map(answerer.cost, items.items))))
    expected = eval_tiny.one_by_one(lm, [item.question for item in items.items])
    assert [p.prediction for p in found] == [prediction for _, prediction in expected]
    assert all(text.startswith(p.output.strip()) for p, (text, _) in zip(found, expected, strict=True))


def test_packing_that_mixes_examples_ends_the_run_before_its_first_step(
    one_process: Processes, two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "opt")
    asked = {**OPTIONS, "model": base, "padding_free": True, "attention": "eager"}
    for processes, stage in ((one_process, 2), (two_processes, 3)):
        out = tmp_path / f"stage_{stage}"
        results = processes.run("tests.helpers.training:command", place.arguments(out, stage, **asked))
        assert [found["code"] for found in results] == [2] * processes.world_size
        said = results[0]["stderr"].strip().splitlines()
        assert said[-1].startswith(
            "error: the model does not keep packed examples apart under attention eager"
        )
        assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [{"method": "lora"}, {"method": "lora_ga"}, {"init": "gradient"}, {"gradient_checkpointing": True}],
    ids=["lora", "lora_ga", "gradient", "recomputed"],
)
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "phi"])
def test_other_ways_to_train_are_alike_at_every_stage(
    kind: str,
    changes: dict[str, Any],
    one_process: Processes,
    two_processes: Processes,
    place: Place,
    tmp_path: Path,
) -> None:
    base = write_model(tmp_path / "base", kind)
    asked = {"model": base, "dropout": 0.0, **changes}
    whole = train(one_process, place, tmp_path / "whole", 0, **asked)
    # LoRA-GA: not at ZeRO-3, and rounding may turn the sign of a singular vector.
    last, near = (2, 1e-2) if changes.get("method") == "lora_ga" else (3, 1e-5)
    parted = train(two_processes, place, tmp_path / "parted", last, **asked)
    assert training.losses(parted)[0] == pytest.approx(training.losses(whole)[0], rel=1e-5)
    assert training.losses(parted) == pytest.approx(training.losses(whole), rel=near)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), parted / "adapter")
    assert apart(logits(by_peft), load_file(parted / TRAINING_LOGITS)["logits"]) < 1e-5
