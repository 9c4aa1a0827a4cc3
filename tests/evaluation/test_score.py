"""Scores against the sum of log-probabilities computed one candidate at a time, without padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.answering.score import Scores, score_last_token, score_summed
from eval.answering.shared_prefix import SharedPrefix
from eval.items import Item, TaskItems, common_prefix, load_questions, tokenise
from eval.model.language_model import LanguageModel
from eval.protocols import PROTOCOLS
from flexlora_ds.errors import UserError
from tests.helpers import eval_tiny


@torch.no_grad()
def brute_force(lm: LanguageModel, item: Item) -> list[float]:
    """Log-likelihood of each whole candidate."""
    totals = []
    for candidate in item.candidates:
        logits = lm.model(input_ids=torch.tensor([item.prompt + candidate])).logits[0].double()
        rows = logits.log_softmax(-1)[len(item.prompt) - 1 : -1]
        totals.append(float(rows.gather(1, torch.tensor(candidate)[:, None]).sum()))
    return totals


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(eval_tiny.make_model(seed=2), eval_tiny.make_tokenizer())


@pytest.fixture(scope="module")
def whole_words() -> LanguageModel:
    """A tokenizer whose candidates differ in more than their last token."""
    return LanguageModel(eval_tiny.make_model(seed=2), eval_tiny.make_tokenizer(split_digits=False))


def worst_error(scores: list[Scores], lm: LanguageModel, items: tuple[Item, ...]) -> float:
    """Of the differences between candidates: what all candidates share cancels."""
    worst = 0.0
    for ours, item in zip(scores, items, strict=True):
        exact = brute_force(lm, item)
        worst = max(
            worst,
            *(abs((a - ours.total[0]) - (b - exact[0])) for a, b in zip(ours.total, exact, strict=True)),
        )
    return worst


def test_one_column_of_logits_orders_the_candidates(lm: LanguageModel) -> None:
    task = eval_tiny.task_items(lm, "ARC-Easy", 16)
    assert task.single_position
    assert {len(item.candidates) for item in task.items} == {3, 4, 5}
    scores = score_last_token(SharedPrefix(lm, task.shared_prefix), task.items)
    assert worst_error(scores, lm, task.items) < 1e-3
    assert [len(s.total) for s in scores] == [len(item.candidates) for item in task.items]


@pytest.mark.parametrize("task_name", ["ARC-Easy", "boolq"])
def test_summed_log_likelihoods(lm: LanguageModel, task_name: str) -> None:
    """Candidates of several lengths, 3-choice beside 5-choice items, one padded pass."""
    questions = eval_tiny.make_questions(task_name, 10)
    task = tokenise(task_name, questions, lm.tokenizer)
    longer = tuple(
        Item(item.question, item.prompt, tuple(c + c[-1:] * (i % 3) for i, c in enumerate(item.candidates)))
        for item in task.items
    )
    scores = score_summed(SharedPrefix(lm, task.shared_prefix), longer)
    for ours, item in zip(scores, longer, strict=True):
        exact = brute_force(lm, item)
        assert ours.total == pytest.approx(exact, abs=1e-3)
        lengths = [len(c) for c in item.candidates]
        assert ours.per_token == pytest.approx([a / n for a, n in zip(exact, lengths, strict=True)], abs=1e-3)
        assert ours.best == exact.index(max(exact))


def test_a_tokenizer_without_the_shortcut_takes_the_sum(lm: LanguageModel) -> None:
    task = eval_tiny.task_items(lm, "ARC-Easy", 8)
    items = tuple(
        Item(i.question, i.prompt, tuple(c if n else c + c[-1:] for n, c in enumerate(i.candidates)))
        for i in task.items
    )
    uneven = TaskItems(
        task.task, task.pattern, items, task.shared_prefix, task.answer_prefix, single_position=False
    )
    answerer = Answerer(lm, PROTOCOLS["score"], {task.task: uneven})
    predictions = answerer.answer(Batch(task.task, items, max(map(answerer.cost, items))))
    for prediction, item in zip(predictions, items, strict=True):
        exact = brute_force(lm, item)
        assert prediction.prediction == item.question.answers[exact.index(max(exact))]
        assert prediction.per_token in item.question.answers


def test_shortcut_is_recognised_per_tokenizer(lm: LanguageModel, whole_words: LanguageModel) -> None:
    for model in (lm, whole_words):
        for name in ("ARC-Easy", "boolq", "hellaswag"):
            task = eval_tiny.task_items(model, name, 4)
            differ_in_last = all(len({c[:-1] for c in item.candidates}) == 1 for item in task.items)
            assert task.single_position == differ_in_last
            answerer = Answerer(model, PROTOCOLS["score"], {name: task})
            for item, p in zip(task.items, answerer.answer(Batch(name, task.items, 1)), strict=True):
                exact = brute_force(model, item)
                assert p.prediction == item.question.answers[exact.index(max(exact))]


def test_common_prefix() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2)
    assert common_prefix([(1,), (2,)]) == ()
    assert common_prefix([]) == ()


def test_every_prompt_keeps_a_token_of_its_own(lm: LanguageModel) -> None:
    question = eval_tiny.make_questions("boolq", 1)
    task = tokenise("boolq", question * 2, lm.tokenizer)  # equal prompts share everything
    assert len(task.shared_prefix) == len(task.items[0].prompt) - 1


@pytest.mark.parametrize(
    ("lost", "named"), [(r"[\s\S]", "question"), (r"^ ?the correct answer is [\s\S]*$", "true")]
)
def test_a_tokenizer_that_leaves_nothing_of_a_text_is_named(lost: str, named: str) -> None:
    """As a GGUF file's does that has no pieces for single bytes."""
    core = Tokenizer(models.WordPiece({"zzz": 0}, unk_token="zzz"))
    core.normalizer = normalizers.Replace(Regex(lost), "")
    question = replace(eval_tiny.make_questions("boolq", 1)[0], index=4)
    with pytest.raises(UserError, match=rf"no token of '{named}' \(boolq/test.json, record 5\)"):
        tokenise("boolq", [question], PreTrainedTokenizerFast(tokenizer_object=core))


def test_a_record_without_its_answer_among_the_choices_is_named(tmp_path: Path) -> None:
    data = eval_tiny.write_data(tmp_path / "data", 3, ("boolq",))
    path = data / "boolq" / "test.json"
    path.write_text(path.read_text().replace('"answer": "true"', '"answer": "maybe"', 1))
    with pytest.raises(ValueError, match=r"'maybe' is not one of .*boolq/test.json, record [123]"):
        load_questions(data, "boolq", "alpaca")
