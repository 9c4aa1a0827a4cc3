"""The items of a task: prompts and candidate answers as text and as token ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_prep.chat import as_chat, as_record, encode_questions
from data_prep.chat_template import ChatTemplate
from data_prep.messages import ChatRecord
from data_prep.prompt import CHAT, encode_answers, encode_prompts, evaluation_prompt
from data_prep.records import Entry, load_entries
from data_prep.tasks import TASKS
from eval.parsing import read_answer
from eval.protocols import ANSWER_PREFIX
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.errors import UserError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One test record, before any model is known. `index` counts the records of its file from 0.

    A `chat` is asked through the tokenizer's chat template, without its last answer; `prompt` is then its JSON.
    """

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    answer: str
    chat: ChatRecord | None = field(default=None, compare=False)

    @cached_property
    def prompt_hash(self) -> str:
        """The first 16 hex digits of the prompt's SHA-256; it identifies an item in a prompt style."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Item:
    """A question as the model reads it; `candidates`: token ids of 'the correct answer is <answer>'."""

    question: Question
    prompt: Tokens
    candidates: tuple[Tokens, ...]

    @property
    def longest_candidate(self) -> int:
        """Tokens that must fit after the prompt."""
        return max(map(len, self.candidates))


@dataclass(frozen=True)
class TaskItems:
    """A task's items and what they have in common.

    `shared_prefix`: the token ids that every prompt starts with (computed once per task). `answer_prefix`: the token
    ids that every candidate starts with. `single_position`: an item's candidates differ in their last token only.
    """

    task: str
    pattern: re.Pattern[str]
    items: tuple[Item, ...]
    shared_prefix: Tokens
    answer_prefix: Tokens
    single_position: bool

    def is_answered(self, text: str) -> bool:
        """Whether a generated text contains an answer."""
        return read_answer(self.pattern, text) is not None

    @property
    def chance(self) -> float:
        """The accuracy expected of a uniform guess among each item's own answers."""
        return sum(1 / len(item.candidates) for item in self.items) / len(self.items)


def common_prefix(rows: Sequence[Sequence[int]]) -> Tokens:
    """The longest common prefix of all rows."""
    columns = zip(*rows, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def load_questions(
    data: Path,
    task: str,
    style: str,
    limit: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[Question]:
    """The first `limit` records of `<data>/<task>/test.json`; `note` as of `load_entries`.

    Raises:
        UserError: names file and malformed record.
    """
    path = data / task / "test.json"
    entries = load_entries(path, need_answer=True, note=note)[:limit]
    return [
        _question(task, index, entry, style, f"{path}, record {index + 1}")
        for index, entry in enumerate(entries)
    ]


def _question(task: str, index: int, entry: Entry, style: str, place: str) -> Question:
    record = as_record(entry)
    try:
        answers = tuple(TASKS[task].answers(record))
    except UserError as error:
        raise error.at(place) from None
    if len(answers) < 2 or record["answer"] not in answers:
        raise UserError(
            f"the answer {record['answer']!r} is not one of the instruction's choices {list(answers)}",
            place,
            "correct the record, or rebuild the file with python -m data_prep",
        )
    chat = as_chat(entry) if style == CHAT or "messages" in entry else None
    try:
        prompt = json.dumps(chat["messages"][:-1]) if chat else evaluation_prompt(record, style)
    except UserError as error:
        raise error.at(place) from None
    return Question(task, index, prompt, answers, record["answer"], chat)


def tokenise(task: str, questions: Sequence[Question], tokenizer: Any, day: str | None = None) -> TaskItems:
    """Token ids as in training: prompts with the tokenizer's own BOS, no EOS; candidates with neither.

    Candidates of chats are what the chat template writes for them. `day`: the date that it is given.

    Raises:
        UserError: the template does not take a chat, or the tokenizer leaves nothing of a question or an answer; it
            names task and record.
    """
    if any(question.chat for question in questions):
        items = _chat_items(task, questions, ChatTemplate(tokenizer, day))
    else:
        items = _text_items(questions, tokenizer)
    _require_some(task, items)
    prompts = [item.prompt for item in items]
    longest_shareable = min(map(len, prompts)) - 1  # at least one token of each prompt must be computed
    return TaskItems(
        task=task,
        pattern=re.compile(TASKS[task].pattern),
        items=items,
        shared_prefix=common_prefix(prompts)[:longest_shareable],
        answer_prefix=common_prefix([candidate for item in items for candidate in item.candidates]),
        single_position=all(_differ_in_last_token(item.candidates) for item in items),
    )


def _chat_items(task: str, questions: Sequence[Question], template: ChatTemplate) -> tuple[Item, ...]:
    chats = [question.chat for question in questions if question.chat is not None]
    candidates = [[ANSWER_PREFIX + answer for answer in question.answers] for question in questions]
    encoded = encode_questions(template, chats, candidates, lambda i: f"{task}/test.json, record {i + 1}")
    return tuple(
        Item(question, asked.prompt, asked.candidates)
        for question, asked in zip(questions, encoded, strict=True)
    )


def _text_items(questions: Sequence[Question], tokenizer: Any) -> tuple[Item, ...]:
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    texts = sorted({answer for question in questions for answer in question.answers})
    encoded = encode_answers(tokenizer, [ANSWER_PREFIX + text for text in texts])
    ids: dict[str, Tokens] = {text: tuple(row) for text, row in zip(texts, encoded, strict=True)}
    return tuple(
        Item(question, tuple(prompt), tuple(ids[answer] for answer in question.answers))
        for question, prompt in zip(questions, prompts, strict=True)
    )


def _require_some(task: str, items: Sequence[Item]) -> None:
    for item in items:
        texts = zip(("question", *item.question.answers), (item.prompt, *item.candidates), strict=True)
        nothing = next((text for text, tokens in texts if not tokens), None)
        if nothing is not None:
            raise UserError(
                f"the tokenizer makes no token of {nothing!r}",
                f"{task}/test.json, record {item.question.index + 1}",
                "give a model with its own tokenizer",
            )


def _differ_in_last_token(candidates: tuple[Tokens, ...]) -> bool:
    return len({row[:-1] for row in candidates}) == 1 and len({row[-1] for row in candidates}) == len(
        candidates
    )


def require_known_tokens(tasks: Iterable[TaskItems], tokenizer: Any, vocabulary: Vocabulary) -> None:
    """See that the model has a row of its embedding for every token of prompts and candidates.

    Raises:
        UserError: it has not; the message names the token and the record.
    """
    for task in tasks:
        for item in task.items:
            place = f"{task.task}/test.json, record {item.question.index + 1}"
            for tokens in (item.prompt, *item.candidates):
                vocabulary.require(tokenizer, tokens, place)
