"""The GPU benchmark's evaluation section on a CPU: every figure is there, and means what its name says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.evaluation import NEW_TOKENS, model_of, questions_of, run, script_of, tokenizer_of
from benchmarks.gpu.section import Conditions, Report
from eval.answering.generate import generate_greedy
from eval.answering.shared_prefix import SharedPrefix
from eval.items import tokenise

TINY = Conditions("tiny", 60.0, tiny=True)


def test_all_figures_are_reported(tmp_path: Path) -> None:
    run(TINY, Report("eval", tmp_path / "figures"))
    rows = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert not [row for row in rows if row.get("absent")]
    assert len([row for row in rows if row["unit"] == "items/s"]) == 5
    assert len([row for row in rows if row["unit"] == "h"]) == 5
    assert {row["aim"] for row in rows if row["unit"] == "x"} == {">= 25", ">= 15", ""}
    assert all(row["value"] > 0 for row in rows)


def test_questions_are_as_long_as_real_ones_and_a_script_is_the_answer() -> None:
    questions = questions_of(3)
    lm = model_of(TINY, tokenizer_of(questions))
    task = tokenise("piqa", questions["piqa"], lm.tokenizer)
    assert all(60 < len(item.prompt) < 130 for item in task.items)
    lm.script = script_of(task, 512, lm.device)
    prompts = [item.prompt for item in task.items]
    prefix = SharedPrefix(lm, task.shared_prefix)
    for draft in ((), task.answer_prefix):
        answers = generate_greedy(lm, prefix, prompts, [32] * 3, lambda _: False, draft)
        assert [tuple(a.tokens) for a in answers] == [task.items[0].candidates[0]] * 3
        assert [a.drafted for a in answers] == [len(draft)] * 3
    assert len(task.items[0].candidates[0]) + 1 == NEW_TOKENS
