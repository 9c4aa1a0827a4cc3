"""Adapters of virtual tokens (prompt tuning, prefix tuning, P-tuning): loaded by PEFT, and scored as one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from eval.answering.answerer import Answerer
from eval.answering.batching import plan_batches
from eval.model.language_model import LanguageModel
from eval.protocols import ANSWER_PREFIX, PROTOCOLS
from flexlora_ds.peft_reading.attach import attach_adapter
from tests.helpers import eval_tiny

KINDS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    rows = torch.tensor([ids])
    found: Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_loaded_whole_and_scored_as_one_by_one(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = get_peft_model(eval_tiny.make_model(seed=4), KINDS[kind]).eval()
    trained.save_pretrained(tmp_path / "adapter")
    model = attach_adapter(eval_tiny.make_model(seed=4), str(tmp_path / "adapter")).eval()
    ids = [2, 5, 9, 4]
    assert torch.equal(logits_of(model, ids), logits_of(trained, ids))
    assert not torch.allclose(logits_of(model, ids)[-1], logits_of(eval_tiny.make_model(seed=4), ids)[-1])
    lm = LanguageModel(model, eval_tiny.make_tokenizer())
    task = eval_tiny.task_items(lm, "ARC-Easy", 12)
    answerer = Answerer(lm, PROTOCOLS["score"], {task.task: task})
    batches = plan_batches(task.task, task.items, answerer.cost, 8, 8)
    found = {p.index: p.prediction for batch in batches for p in answerer.answer(batch)}
    for item in task.items:
        prompt = lm.tokenizer(item.question.prompt)["input_ids"]

        def log_likelihood(answer: str, prompt: list[int] = prompt) -> float:
            said = lm.tokenizer(ANSWER_PREFIX + answer, add_special_tokens=False)["input_ids"]
            scores = logits_of(model, prompt + said)[-len(said) - 1 : -1].log_softmax(-1)
            return float(scores[range(len(said)), said].sum())

        assert found[item.question.index] == max(item.question.answers, key=log_likelihood)
