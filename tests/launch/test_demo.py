"""The demo compares like with like, and prints what it showed; its steps run here on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tasks import TASKS
from eval.__main__ import main as evaluate
from eval.compare.__main__ import main as compare
from flexlora_ds.errors import UserError
from launch.demo.__main__ import commands, remove_earlier
from launch.demo.evaluations import AFTER, AFTER_GENERATE, BEFORE, conclusion, print_conclusion
from tests.helpers import eval_tiny

MAINS = {"eval": evaluate, "eval.compare": compare}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the demo's folder holds before its evaluations: base, data, adapter."""
    from peft import LoraConfig, get_peft_model

    out = tmp_path / "demo"
    tokenizer, model = eval_tiny.make_tokenizer(), eval_tiny.make_model(seed=4)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(out / "adapter")
    eval_tiny.write_data(out / "data", 3)
    return out


def test_the_evaluations_are_compared_by_one_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [command for _, command in commands(run) if command[1] in MAINS]
    assert len(steps) == 4
    for _, module, *arguments in steps:
        assert MAINS[module](arguments) == 0
    results = {
        name: json.loads((run / name / "results.json").read_text())
        for name in (BEFORE, AFTER, AFTER_GENERATE)
    }
    assert [found["mode"] for found in results.values()] == ["score", "score", "generate"]
    assert [found["adapter"] is None for found in results.values()] == [True, False, False]
    capsys.readouterr()
    print((run / "comparison.md").read_text())
    print_conclusion(run)
    last_screen = capsys.readouterr().out
    assert "not comparable" not in last_screen and "− before" in last_screen
    assert last_screen.count("Shown: ") == 1
    for found in results.values():
        assert f"{100 * found['average']:.1f} %" in last_screen
    assert f"{3 * len(TASKS)} test questions" in last_screen


def test_the_conclusion_is_one_sentence_and_claims_no_more_than_there_is() -> None:
    def results(average: float) -> dict[str, Any]:
        return {"average": average, "chance": 0.4, "tasks": {"boolq": {"total": 1200}}}

    text = conclusion(results(0.41), results(0.9), results(0.88))
    assert text.startswith(
        "Shown: training raised the accuracy on 1,200 test questions from 41.0 % to 90.0 %"
    )
    assert text.count(". ") == 0 and text.endswith("88.0 % (generate).")
    assert "did not raise" in conclusion(results(0.41), results(0.41), results(0.3))


def test_only_a_demos_own_folder_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "thesis.tex"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match="something else than a demo"):
        remove_earlier(mine.parent)
    (tmp_path / "demo" / AFTER_GENERATE).mkdir(parents=True)
    remove_earlier(tmp_path / "demo")
    assert mine.exists() and not (tmp_path / "demo").exists()
