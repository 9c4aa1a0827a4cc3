"""Batched generation gives what transformers gives one item at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from eval.answering.answerer import Answerer
from eval.answering.batching import order_batches, plan_batches
from eval.answering.generate import Drafter, generate_greedy
from eval.answering.shared_prefix import SharedPrefix
from eval.items import TaskItems
from eval.model.language_model import LanguageModel
from eval.predictions import Prediction
from eval.protocols import PROTOCOLS
from tests.helpers import eval_tiny

TASKS_SEEN = ("ARC-Easy", "boolq", "winogrande")
GAP = 1e-4  # below this lead, rounding may turn a choice


@pytest.fixture(scope="module")
def taught() -> LanguageModel:
    tokenizer, model = eval_tiny.make_tokenizer(), eval_tiny.make_model()
    eval_tiny.teach(model, tokenizer, [q for t in TASKS_SEEN for q in eval_tiny.make_questions(t, 12)])
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="module")
def untaught() -> LanguageModel:
    return LanguageModel(eval_tiny.make_model(seed=4), eval_tiny.make_tokenizer())


def ask_all(
    lm: LanguageModel, tasks: list[TaskItems], mode: str, budget: int, rows: int | None
) -> list[Prediction]:
    answerer = Answerer(lm, PROTOCOLS[mode], {task.task: task for task in tasks})
    batches = order_batches(
        b for t in tasks for b in plan_batches(t.task, t.items, answerer.cost, budget, rows)
    )
    found = {(p.task, p.index): p for batch in batches for p in answerer.answer(batch)}
    return [found[task.task, item.question.index] for task in tasks for item in task.items]


def assert_same(predictions: list[Prediction], reference: list[tuple[str, str | None]]) -> None:
    for ours, (text, answer) in zip(predictions, reference, strict=True):
        if ours.margin is not None and ours.margin < GAP:
            continue
        assert ours.prediction == answer, (ours, text)
        assert text.startswith(ours.output.strip()), (ours, text)


@pytest.mark.parametrize("who", ["taught", "untaught"])
@pytest.mark.parametrize(("budget", "rows"), [(1, 1), (10_000, 3), (10_000, None), (300, 8)])
@pytest.mark.complaint("DoRA 14", "DoRA 9")
def test_every_batch_size_equals_one_by_one(
    who: str, budget: int, rows: int | None, request: pytest.FixtureRequest
) -> None:
    lm: LanguageModel = request.getfixturevalue(who)
    tasks = [eval_tiny.task_items(lm, task, 12) for task in TASKS_SEEN]
    assert len({len(item.prompt) for item in tasks[0].items}) > 4  # lengths differ: padding matters
    predictions = ask_all(lm, tasks, "generate", budget, rows)
    reference = eval_tiny.one_by_one(lm, [item.question for task in tasks for item in task.items])
    assert_same(predictions, reference)
    answered = [answer for _, answer in reference if answer is not None]
    assert len(set(answered)) > 2 if who == "taught" else len({text for text, _ in reference}) > 20


def test_wrong_padding_would_be_seen(taught: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: without masks the same batches give other answers."""
    task = eval_tiny.task_items(taught, "ARC-Easy", 12)
    right = ask_all(taught, [task], "generate", 10_000, None)
    forward = taught.forward
    monkeypatch.setattr(
        taught,
        "forward",
        lambda ids, mask, *rest, **named: forward(ids, torch.ones_like(mask), *rest, **named),
    )
    wrong = ask_all(taught, [task], "generate", 10_000, None)
    assert [p.output for p in wrong] != [p.output for p in right]


@pytest.mark.parametrize("pad", [{}, {"pad_token": "a"}, {"pad_token": "</s>"}])
def test_the_padding_token_does_not_matter(taught: LanguageModel, pad: dict[str, Any]) -> None:
    """None at all, a real word (which occurs in prompts and answers), the end token."""
    lm = LanguageModel(taught.model, eval_tiny.make_tokenizer(**pad))
    assert (lm.tokenizer.pad_token_id is None) == (not pad)
    task = eval_tiny.task_items(lm, "ARC-Easy", 12)
    for mode in ("generate", "score"):
        ours = ask_all(lm, [task], mode, 10_000, None)
        assert [p.output for p in ours] == [p.output for p in ask_all(taught, [task], mode, 1, 1)]


@pytest.mark.parametrize("draft", ["", "the correct answer is answer", "the correct", "wrong from the start"])
def test_a_draft_changes_nothing(taught: LanguageModel, draft: str) -> None:
    task = eval_tiny.task_items(taught, "ARC-Easy", 12)
    tokens = taught.tokenizer(draft, add_special_tokens=False)["input_ids"]

    def generate(draft_ids: list[int]) -> Any:
        return generate_greedy(
            taught,
            SharedPrefix(taught, task.shared_prefix),
            [item.prompt for item in task.items],
            [32] * len(task.items),
            task.is_answered,
            draft_ids,
        )

    plain, drafted = generate([]), generate(tokens)
    assert [a.tokens for a in drafted] == [a.tokens for a in plain]
    accepted = [a.drafted for a in drafted]
    if draft == "the correct answer is answer":
        assert len(tokens) in accepted and min(accepted) < len(tokens)  # taken whole, and rejected on the way
    if draft == "wrong from the start":
        assert max(accepted) < len(tokens)


def test_a_useless_draft_is_given_up(untaught: LanguageModel) -> None:
    task = eval_tiny.task_items(untaught, "ARC-Easy", 40)
    drafter = Drafter(task.answer_prefix)
    assert drafter.draft
    answers = generate_greedy(
        untaught, SharedPrefix(untaught, ()), [i.prompt for i in task.items], [2] * 40, lambda _: False
    )
    drafter.learn(answers)
    assert not drafter.draft


def test_the_end_token_and_the_limit_end_an_answer(taught: LanguageModel) -> None:
    task = eval_tiny.task_items(taught, "ARC-Easy", 12)
    prompts = [item.prompt for item in task.items]
    whole = generate_greedy(taught, SharedPrefix(taught, ()), prompts, [32] * 12, lambda _: False)
    assert any(len(answer.tokens) < 32 for answer in whole)
    assert all(1 not in answer.tokens for answer in whole)
    limits = [1 + row % 5 for row in range(12)]
    short = generate_greedy(taught, SharedPrefix(taught, ()), prompts, limits, lambda _: False)
    assert [a.tokens for a in short] == [a.tokens[:n] for a, n in zip(whole, limits, strict=True)]


def test_a_model_with_another_kind_of_cache() -> None:
    """A sliding window drops keys: such models go through the library, with the same answers."""
    lm = LanguageModel(eval_tiny.make_model("mistral", seed=4), eval_tiny.make_tokenizer())
    assert not lm.own_loop
    task = eval_tiny.task_items(lm, "ARC-Easy", 6)
    reference = eval_tiny.one_by_one(lm, [item.question for item in task.items])
    for rows in (1, None):
        ours = ask_all(lm, [task], "generate", 10_000, rows)
        for prediction, (text, answer) in zip(ours, reference, strict=True):
            assert prediction.prediction == answer
            assert text.startswith(prediction.output.strip())


def test_adapters_with_virtual_tokens_are_never_padded() -> None:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    lm = LanguageModel(get_peft_model(eval_tiny.make_model(seed=4), config), eval_tiny.make_tokenizer())
    assert lm.unpadded_only and not lm.own_loop
    task = eval_tiny.task_items(lm, "ARC-Easy", 6)
    rows = [item.prompt for item in task.items]
    together = SharedPrefix(lm, task.shared_prefix).forward(rows, keep=1, use_cache=False).logits[:, 0]
    for logits, prompt in zip(together, rows, strict=True):
        alone = lm.model(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt))).logits[
            0, -1
        ]
        assert torch.allclose(logits, alone, atol=1e-4)
    ours = ask_all(lm, [task], "generate", 1, 1)
    reference = eval_tiny.one_by_one(lm, [item.question for item in task.items])
    assert [p.prediction for p in ours] == [answer for _, answer in reference]


def test_beam_search_in_batches_equals_one_by_one(taught: LanguageModel) -> None:
    tasks = [eval_tiny.task_items(taught, task, 6) for task in TASKS_SEEN]
    batched = ask_all(taught, tasks, "generate-beam4", 100_000, None)
    single = ask_all(taught, tasks, "generate-beam4", 1, 1)
    assert [p.output for p in batched] == [p.output for p in single]
    greedy = ask_all(taught, tasks, "generate", 1, 1)
    assert [p.output for p in single] != [p.output for p in greedy]


def test_memory_running_out_halves_the_batch(taught: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = eval_tiny.task_items(taught, "ARC-Easy", 12)
    expected = ask_all(taught, [task], "generate", 10_000, None)
    sizes: list[int] = []
    forward = taught.forward

    def short_of_memory(ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *rest, **named)

    monkeypatch.setattr(taught, "forward", short_of_memory)
    answerer = Answerer(taught, PROTOCOLS["generate"], {task.task: task})
    (batch,) = plan_batches(task.task, task.items, answerer.cost, 100_000)
    found = sorted(answerer.answer(batch), key=lambda p: p.index)
    assert [p.output for p in found] == [p.output for p in expected]
    assert {12, 6, 3} <= set(sizes)
    sizes.clear()
    answerer.answer(batch)
    assert max(sizes) <= 6  # what did not fit once is not tried again


def test_an_adapter_is_part_of_the_model(taught: LanguageModel) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lm = LanguageModel(get_peft_model(copy.deepcopy(taught.model), config), taught.tokenizer)
    assert lm.own_loop
    task = eval_tiny.task_items(lm, "ARC-Easy", 12)
    ours = ask_all(lm, [task], "generate", 10_000, None)
    assert_same(ours, eval_tiny.one_by_one(lm, [item.question for item in task.items]))
    assert [p.output for p in ours] != [p.output for p in ask_all(taught, [task], "generate", 10_000, None)]
