"""The evaluation's benchmark on a tiny model: it runs, counts all items, and sees a prediction that differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.eval_contenders import Key
from benchmarks.eval_speed import GAP, Answers, agreement, differences, main
from eval.predictions import Prediction
from tests.helpers import eval_tiny


def prediction(index: int, answer: str | None, margin: float) -> tuple[Key, Prediction]:
    return ("boolq", index), Prediction("boolq", index, "", "", answer, "true", margin=margin)


def test_a_difference_is_seen_and_a_near_tie_allowed() -> None:
    generate = dict(
        prediction(index, answer, margin)
        for index, (answer, margin) in enumerate(
            [("true", 1.0), ("true", 1.0), ("true", GAP / 2), (None, 1.0)]
        )
    )
    loop: dict[Key, str | None] = {
        ("boolq", 0): "true",
        ("boolq", 1): "false",
        ("boolq", 2): None,
        ("boolq", 3): None,
    }
    found = differences(Answers(greedy=loop, generate=generate))
    assert [(d["index"], d["allowed"]) for d in found] == [(1, False), (2, True)]
    assert agreement(loop, generate) == {"same": 1, "answered": 3, "asked": 4}  # silence is no agreement


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = eval_tiny.make_tokenizer(), eval_tiny.make_model(seed=4)
    questions = [q for task in ("boolq", "winogrande") for q in eval_tiny.make_questions(task, 4)]
    eval_tiny.teach(model, tokenizer, questions, steps=5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    eval_tiny.write_data(tmp_path / "data", 3, ("boolq", "winogrande"))
    options = ["--model", f"{tmp_path}/model", "--data", f"{tmp_path}/data", "--json", f"{tmp_path}/out.json"]
    options += ["--reference_items", "2", "--endless_items", "1", "--greedy_items", "6"]
    monkeypatch.setattr(sys, "argv", ["eval_speed", *options])
    assert main() == 0
    summary = json.loads((tmp_path / "out.json").read_text())
    items = {name: m["items"] for name, m in summary["contenders"].items()}
    assert items == {
        "reference": 2,
        "reference, no end token": 1,
        "greedy, batch 1": 6,
        "generate": 6,
        "score": 6,
        "forward": 6,
    }
    assert summary["generate_against_greedy"]["asked"] == 6
    assert summary["agreement_with_reference"]["generate"]["asked"] == 2
    assert summary["score_of_forward_rate"] > 0
