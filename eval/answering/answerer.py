"""Answering batches of questions by one protocol, within the available memory."""

from __future__ import annotations

import gc
import math

import torch

from eval.answering.batching import Batch
from eval.answering.generate import Drafter, generate_greedy
from eval.answering.library_generate import decode_until_answered, generate_with_library
from eval.answering.score import Scores, score_last_token, score_summed
from eval.answering.shared_prefix import SharedPrefix
from eval.items import Item, TaskItems
from eval.model.language_model import LanguageModel
from eval.parsing import read_answer
from eval.predictions import Prediction
from eval.protocols import ANSWER_PREFIX, MAX_NEW_TOKENS, Protocol
from flexlora_ds.devices import is_out_of_memory
from flexlora_ds.errors import RunError

_CPU_TOKENS = 512  # larger batches overflow a core's caches and need more padding
_MOST_TOKENS = 65_536
_ALLOWANCE = 8  # generated tokens per row that a batch's cost includes


class Answerer:
    """Answers batches; keeps each task's cached prefix, the memory limit found so far, and how drafts fared."""

    def __init__(self, lm: LanguageModel, protocol: Protocol, tasks: dict[str, TaskItems]) -> None:
        self.lm = lm
        self.protocol = protocol
        self._tasks = tasks
        self._prefixes: dict[str, SharedPrefix] = {}
        self._drafters: dict[str, Drafter] = {}
        self._most_tokens: int | None = None

    def fits(self, item: Item) -> bool:
        """Whether the prompt and the longest answer fit the model's context."""
        free = self.lm.free_positions(item.prompt)
        return free is None or free >= item.longest_candidate

    def cost(self, item: Item) -> int:
        """Tokens that an item occupies in a batch, for planning."""
        task = self._tasks[item.question.task]
        own = len(item.prompt) - (len(task.shared_prefix) if self.lm.own_loop else 0)
        if self.protocol.name == "score":
            return (
                own + item.longest_candidate
                if task.single_position
                else ((own + item.longest_candidate) * len(item.candidates))
            )
        if self.protocol.beams > 1 or not self.lm.own_loop:
            return (len(item.prompt) + MAX_NEW_TOKENS) * self.protocol.beams
        return own + len(task.answer_prefix) + _ALLOWANCE

    def default_tokens(self) -> int:
        """How many tokens a batch may hold: by the free memory on a GPU; on a CPU, as many as make it faster."""
        if self.lm.device.type != "cuda":
            return _CPU_TOKENS
        free, _ = torch.cuda.mem_get_info(self.lm.device)
        return max(1024, min(_MOST_TOKENS, int(free * 0.6) // self.lm.bytes_per_token))

    def answer(self, batch: Batch) -> list[Prediction]:
        """One prediction per item; where memory runs out, the batch is halved. RunError if one item does not fit."""
        if self._most_tokens is None or batch.tokens <= self._most_tokens or len(batch.items) == 1:
            try:
                return self._answer_at_once(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(batch.items) == 1:
                raise RunError(
                    f"not enough memory for item {batch.items[0].question.index} of {batch.task} alone",
                    f"{batch.width} tokens",
                    "use a smaller --dtype or a larger device",
                )
            self._most_tokens = batch.tokens // 2
            _free_memory()
        first, second = batch.halves()
        return self.answer(first) + self.answer(second)

    def _answer_at_once(self, batch: Batch) -> list[Prediction]:
        if self.protocol.name == "score":
            return self._score(batch)
        if self.protocol.beams > 1 or not self.lm.own_loop:
            return self._generate_with_library(batch)
        return self._generate(batch)

    def _prefix(self, task: TaskItems) -> SharedPrefix:
        if task.task not in self._prefixes:
            self._prefixes[task.task] = SharedPrefix(self.lm, task.shared_prefix)
        return self._prefixes[task.task]

    def _generate(self, batch: Batch) -> list[Prediction]:
        task = self._tasks[batch.task]
        drafter = self._drafters.setdefault(task.task, Drafter(self._draft(task)))
        answers = generate_greedy(
            self.lm,
            self._prefix(task),
            [item.prompt for item in batch.items],
            [self._limit(item) for item in batch.items],
            task.is_answered,
            drafter.draft,
        )
        drafter.learn(answers)
        for item, answer in zip(batch.items, answers, strict=True):
            _require_finite(answer.finite, item)
        return [
            _generated(task, item, a.text, a.margin) for item, a in zip(batch.items, answers, strict=True)
        ]

    def _draft(self, task: TaskItems) -> tuple[int, ...]:
        draft = task.answer_prefix[: MAX_NEW_TOKENS - 1]
        shortest = min((len(candidate) for item in task.items for candidate in item.candidates), default=0)
        unanswered = not task.is_answered(self.lm.decode(draft))
        return draft if unanswered and len(draft) < shortest and not self.lm.stop_ids & set(draft) else ()

    def _limit(self, item: Item) -> int:
        free = self.lm.free_positions(item.prompt)
        return MAX_NEW_TOKENS if free is None else min(MAX_NEW_TOKENS, free)

    def _generate_with_library(self, batch: Batch) -> list[Prediction]:
        """Items of different token limits are generated separately: `generate` has one limit per batch."""
        task, beams = self._tasks[batch.task], self.protocol.beams
        predictions = []
        for limit in sorted({self._limit(item) for item in batch.items}):
            items = [item for item in batch.items if self._limit(item) == limit]
            prompts = [item.prompt for item in items]
            rows = generate_with_library(self.lm, prompts, beams=beams, max_new_tokens=limit)
            for item, row in zip(items, rows, strict=True):
                _require_finite(row is not None, item)
                assert row is not None
                text = (
                    self.lm.decode(row)
                    if beams > 1
                    else decode_until_answered(self.lm, row, task.is_answered)
                )
                predictions.append(_generated(task, item, text, None))
        return predictions

    def _score(self, batch: Batch) -> list[Prediction]:
        task = self._tasks[batch.task]
        score = score_last_token if task.single_position else score_summed
        scores = score(self._prefix(task), batch.items)
        for item, values in zip(batch.items, scores, strict=True):
            _require_finite(all(map(math.isfinite, values.total)), item)
        return [_scored(item, values) for item, values in zip(batch.items, scores, strict=True)]


def _require_finite(finite: bool, item: Item) -> None:
    """Raise RunError for an item whose logits are not finite: whatever is read off them means nothing."""
    if not finite:
        raise RunError(
            "the model's numbers are not finite",
            f"{item.question.task}, item {item.question.index}",
            "its training diverged, the files are damaged, or --dtype is too narrow for it",
        )


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
        ANSWER_PREFIX + best,
        best,
        question.answer,
        margin=scores.margin,
        per_token=question.answers[scores.best_per_token] if scores.per_token is not None else None,
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
