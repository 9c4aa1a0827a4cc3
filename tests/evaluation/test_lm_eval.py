"""The task files for lm-evaluation-harness give the accuracy of our `score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.prompt import evaluation_prompt
from data_prep.tasks import TASKS
from eval.__main__ import main
from eval.protocols import ANSWER_PREFIX
from flexlora_ds.export import main as export_main
from tests.helpers import eval_tiny

FOLDER = Path(__file__).parents[2] / "eval" / "lm_eval_tasks"


def lm_eval_name(task: str) -> str:
    return "flexlora_" + task.lower().replace("-", "_")


def test_there_is_a_file_for_every_task_and_a_group_of_all() -> None:
    for task in TASKS:
        content = yaml.safe_load((FOLDER / f"{task}.yaml").read_text())
        assert content["task"] == lm_eval_name(task)
        assert content["dataset_kwargs"]["data_files"]["test"] == f"data/{task}/test.json"
    group = yaml.safe_load((FOLDER / "flexlora_commonsense.yaml").read_text())
    assert group["task"] == [lm_eval_name(task) for task in TASKS]


def test_templates_render_our_prompt_and_answers() -> None:
    jinja2 = pytest.importorskip("jinja2")
    import ast
    import random

    shared = yaml.safe_load((FOLDER / "_commonsense.yaml").read_text())
    for task in TASKS:
        record = eval_tiny.make_record(task, random.Random(1))
        answers = TASKS[task].answers(record)

        def render(key: str, record: object = record) -> str:
            return str(jinja2.Template(shared[key], keep_trailing_newline=True).render(record))

        assert render("doc_to_text") == evaluation_prompt(record, "alpaca")
        assert ast.literal_eval(render("doc_to_choice")) == [ANSWER_PREFIX + answer for answer in answers]
        assert int(render("doc_to_target")) == answers.index(record["answer"])
        assert shared["target_delimiter"] == ""


@pytest.fixture(scope="module")
def harness() -> Any:
    """lm-evaluation-harness, told of our task files: the accuracy of a task for a model on the disk."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is optional")
    models, tasks = pytest.importorskip("lm_eval.models.huggingface"), pytest.importorskip("lm_eval.tasks")

    def accuracy(task: str, **model: str) -> float:
        found = lm_eval.simple_evaluate(
            model=models.HFLM(**model, device="cpu", dtype="float32", batch_size=4),
            tasks=[lm_eval_name(task)],
            task_manager=tasks.TaskManager(include_path=str(FOLDER), include_defaults=False),
            bootstrap_iters=0,
        )
        return float(found["results"][lm_eval_name(task)]["acc,none"])

    return accuracy


@pytest.mark.parametrize("task", ["ARC-Easy", "boolq"])
def test_lm_eval_gives_the_accuracy_of_score(
    harness: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = eval_tiny.make_model(seed=4), eval_tiny.make_tokenizer(pad_token="</s>")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    eval_tiny.write_data(tmp_path / "data", 40, (task,))
    monkeypatch.chdir(tmp_path)
    ours = _score(task, "--model", "model")
    assert harness(task, pretrained="model") == pytest.approx(ours)
    assert 0 < ours < 1


@pytest.mark.full
def test_lm_eval_gives_the_same_for_every_export(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of mixed ranks as it is, at one rank, and merged: three doors to one model."""
    eval_tiny.save_base_and_adapter(tmp_path / "model", tmp_path / "adapter", rank_pattern={"v_proj": 5})
    eval_tiny.write_data(tmp_path / "data", 60, ("ARC-Easy",))
    monkeypatch.chdir(tmp_path)
    export = ["--run", "adapter", "--base", "model", "--out"]
    assert export_main([*export, "uniform", "--to", "peft-uniform"]) == 0
    assert export_main([*export, "merged", "--to", "merged"]) == 0
    expected = _score("ARC-Easy", "--model", "model", "--adapter", "adapter")
    assert expected != _score("ARC-Easy", "--model", "model"), "the adapter counts"
    for adapter in ("adapter", "uniform"):
        assert harness("ARC-Easy", pretrained="model", peft=adapter) == pytest.approx(expected)
    assert harness("ARC-Easy", pretrained="merged") == pytest.approx(expected)


def _score(task: str, *model: str) -> float:
    """Of `python -m eval` in this folder."""
    out = Path("-".join(["out", *(word.lstrip("-") for word in model)]))
    assert main([*model, "--mode", "score", "--dtype", "fp32", "--tasks", task, "--out", str(out)]) == 0
    return float(json.loads((out / "results.json").read_text())["tasks"][task]["accuracy"])
