"""Asking a model a batch of questions by one protocol, within the memory there is."""

from __future__ import annotations

import gc

import torch

from eval.answering.batching import Batch
from eval.answering.generate import Drafter, generate_greedy
from eval.answering.library_generate import decode_until_decided, generate_with_library
from eval.answering.score import Scores, score_last_token, score_summed
from eval.answering.shared_prefix import Beginning
from eval.items import Item, TaskItems
from eval.model.language_model import LanguageModel, memory_is_short
from eval.parsing import read_answer
from eval.predictions import Prediction
from eval.protocols import ANSWER_LEAD, MAX_NEW_TOKENS, Protocol
from flexlora_ds.errors import RunError

_CPU_TOKENS = 512  # the activations of more leave the caches of a core, and rows of more lengths meet
_MOST_TOKENS = 65_536
_ALLOWANCE = 8  # generated tokens per row that a batch's cost allows for


class Asker:
    """Answers batches; keeps each task's computed beginning and what it learnt about memory and drafts."""

    def __init__(self, lm: LanguageModel, protocol: Protocol, tasks: dict[str, TaskItems]) -> None:
        self.lm = lm
        self.protocol = protocol
        self._tasks = tasks
        self._beginnings: dict[str, Beginning] = {}
        self._drafters: dict[str, Drafter] = {}
        self._most_tokens: int | None = None

    def fits(self, item: Item) -> bool:
        """Whether the prompt and the longest answer lie within the model's context."""
        room = self.lm.room(item.prompt)
        return room is None or room >= item.longest_candidate

    def cost(self, item: Item) -> int:
        """Tokens that an item occupies in a batch, for planning."""
        task = self._tasks[item.question.task]
        own = len(item.prompt) - (len(task.shared) if self.lm.own_loop else 0)
        if self.protocol.name == "score":
            return (
                own + item.longest_candidate
                if task.single_position
                else ((own + item.longest_candidate) * len(item.candidates))
            )
        if self.protocol.beams > 1 or not self.lm.own_loop:
            return (len(item.prompt) + MAX_NEW_TOKENS) * self.protocol.beams
        return own + len(task.lead) + _ALLOWANCE

    def default_tokens(self) -> int:
        """How many tokens a batch may hold: by the free memory of a GPU; on a CPU, as many as speed it up."""
        if self.lm.device.type != "cuda":
            return _CPU_TOKENS
        free, _ = torch.cuda.mem_get_info(self.lm.device)
        return max(1024, min(_MOST_TOKENS, int(free * 0.6) // self.lm.bytes_per_token))

    def ask(self, batch: Batch) -> list[Prediction]:
        """One prediction per item; in halves where memory runs out. RunError if one item is too much."""
        if self._most_tokens is None or batch.tokens <= self._most_tokens or len(batch.items) == 1:
            try:
                return self._ask_at_once(batch)
            except (RuntimeError, MemoryError) as error:
                if not memory_is_short(error):
                    raise
            if len(batch.items) == 1:
                raise RunError(
                    f"memory does not suffice for item {batch.items[0].question.index} of {batch.task} alone "
                    f"({batch.width} tokens); use a smaller --dtype or a larger device"
                )
            self._most_tokens = batch.tokens // 2
            _free_memory()
        first, second = batch.halves()
        return self.ask(first) + self.ask(second)

    def _ask_at_once(self, batch: Batch) -> list[Prediction]:
        if self.protocol.name == "score":
            return self._score(batch)
        if self.protocol.beams > 1 or not self.lm.own_loop:
            return self._generate_with_library(batch)
        return self._generate(batch)

    def _beginning(self, task: TaskItems) -> Beginning:
        if task.task not in self._beginnings:
            self._beginnings[task.task] = Beginning(self.lm, task.shared)
        return self._beginnings[task.task]

    def _generate(self, batch: Batch) -> list[Prediction]:
        task = self._tasks[batch.task]
        drafter = self._drafters.setdefault(task.task, Drafter(self._draft(task)))
        answers = generate_greedy(
            self.lm,
            self._beginning(task),
            [item.prompt for item in batch.items],
            [self._limit(item) for item in batch.items],
            task.decides,
            drafter.draft,
        )
        drafter.learn(answers)
        return [
            _generated(task, item, a.text, a.margin) for item, a in zip(batch.items, answers, strict=True)
        ]

    def _draft(self, task: TaskItems) -> tuple[int, ...]:
        draft = task.lead[: MAX_NEW_TOKENS - 1]
        shortest = min((len(candidate) for item in task.items for candidate in item.candidates), default=0)
        undecided = not task.decides(self.lm.decode(draft))
        return draft if undecided and len(draft) < shortest and not self.lm.stop_ids & set(draft) else ()

    def _limit(self, item: Item) -> int:
        room = self.lm.room(item.prompt)
        return MAX_NEW_TOKENS if room is None else min(MAX_NEW_TOKENS, room)

    def _generate_with_library(self, batch: Batch) -> list[Prediction]:
        """Items with less room than the others go apart: the library has one limit per batch."""
        task, beams = self._tasks[batch.task], self.protocol.beams
        predictions = []
        for limit in sorted({self._limit(item) for item in batch.items}):
            items = [item for item in batch.items if self._limit(item) == limit]
            prompts = [item.prompt for item in items]
            rows = generate_with_library(self.lm, prompts, beams=beams, max_new_tokens=limit)
            for item, row in zip(items, rows, strict=True):
                text = self.lm.decode(row) if beams > 1 else decode_until_decided(self.lm, row, task.decides)
                predictions.append(_generated(task, item, text, None))
        return predictions

    def _score(self, batch: Batch) -> list[Prediction]:
        task = self._tasks[batch.task]
        score = score_last_token if task.single_position else score_summed
        scores = score(self._beginning(task), batch.items)
        return [_scored(item, values) for item, values in zip(batch.items, scores, strict=True)]


def _generated(task: TaskItems, item: Item, text: str, margin: float | None) -> Prediction:
    question = item.question
    prediction = read_answer(task.pattern, text)
    return Prediction(
        question.task, question.index, question.prompt_hash, text, prediction, question.answer, margin=margin
    )


def _scored(item: Item, scores: Scores) -> Prediction:
    question = item.question
    best = question.answers[scores.best]
    return Prediction(
        question.task,
        question.index,
        question.prompt_hash,
        ANSWER_LEAD + best,
        best,
        question.answer,
        margin=scores.margin,
        per_token=question.answers[scores.best_per_token] if scores.per_token is not None else None,
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
