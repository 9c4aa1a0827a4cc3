"""Every architecture of the zoo answers in batches as it does one by one, without any of our shortcuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.answering.score import score_summed
from eval.answering.shared_prefix import SharedPrefix
from eval.model.language_model import LanguageModel
from eval.predictions import Prediction
from eval.protocols import PROTOCOLS
from flexlora_ds.errors import UserError
from tests.helpers import eval_tiny
from tests.helpers.zoo import ZOO, make_model

TASK, ITEMS = "ARC-Easy", 6


def answers(lm: LanguageModel, items: Any, mode: str) -> list[Prediction]:
    answerer = Answerer(lm, PROTOCOLS[mode], {items.task: items})
    width = max(answerer.cost(item) for item in items.items)
    return answerer.answer(Batch(items.task, items.items, width))


@torch.no_grad()
def log_likelihood(model: Any, prompt: tuple[int, ...], candidate: tuple[int, ...]) -> float:
    """Of a candidate after a prompt, computed alone."""
    logits = model(input_ids=torch.tensor([prompt + candidate])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(candidate))


@pytest.mark.parametrize("kind", ZOO)
def test_batches_answer_as_one_by_one(kind: str) -> None:
    """Rows of other lengths, a shared prefix, a drafted start, a narrowed last layer."""
    lm = LanguageModel(make_model(kind), eval_tiny.make_tokenizer())
    items = eval_tiny.task_items(lm, TASK, ITEMS)
    expected = eval_tiny.one_by_one(lm, [item.question for item in items.items])
    found = answers(lm, items, "generate")
    assert [p.prediction for p in found] == [prediction for _, prediction in expected]
    assert all(text.startswith(p.output.strip()) for p, (text, _) in zip(found, expected, strict=True))
    scores = score_summed(SharedPrefix(lm, items.shared_prefix), items.items)
    for item, score in zip(items.items, scores, strict=True):
        alone = [log_likelihood(lm.model, item.prompt, candidate) for candidate in item.candidates]
        assert score.total == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granite", "phi3"])
def test_the_last_layer_is_narrowed_where_it_can_be(kind: str) -> None:
    lm = LanguageModel(make_model(kind), eval_tiny.make_tokenizer())
    assert lm._last_layer is not None and len(lm._last_layer.modules) >= 2


def test_a_token_without_a_row_is_named_with_its_record() -> None:
    """Before anything is asked; an added padding token is replaced by one that the model has."""
    from eval.items import require_known_tokens

    tokenizer = eval_tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    lm = LanguageModel(make_model("llama", vocab_size=419), tokenizer)
    assert tokenizer.pad_token_id == 419 and lm.pad_id == 1
    items = eval_tiny.task_items(lm, TASK, ITEMS)
    require_known_tokens([items], tokenizer, lm.vocabulary)
    tokenizer.add_tokens(["answer2"])
    items = eval_tiny.task_items(lm, TASK, ITEMS)
    with pytest.raises(
        UserError, match=r"'answer2' into the id 420, but .* 419 rows \(ARC-Easy/test.json, record 1\)"
    ):
        require_known_tokens([items], tokenizer, lm.vocabulary)
