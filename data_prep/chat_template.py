"""A tokenizer's chat template: what it writes of a chat, on which day, and where in that text each message is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any

from data_prep.messages import Message
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import one_line

_NO_TEMPLATE = "use an instruct model's tokenizer, or records of instruction and output"
_MARK = "FLXMARK{}X"
"""Stands for a message's content where the question is what a template writes around it."""

_CLOCK = "strftime_now"
"""The function of transformers by which a template asks for today's date."""
_DIRECTIVE = re.compile("%[-_0^#]?[a-zA-Z]")
_TEXT, _PARTS = "text", "parts"


class ChatTemplate:
    """The chat template of one tokenizer. `day`: the date that it is given, where it asks for one."""

    def __init__(self, tokenizer: Any, day: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._source = _given_day(_source_of(tokenizer), day)
        self._forms: dict[tuple[str, ...], str] = {}
        self.bos = str(tokenizer.bos_token or "")

    @cached_property
    def always_opens(self) -> bool:
        """Whether the template writes the same with and without a generation prompt at the end."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        try:
            return self.generation_prompt(asked) == self.render(asked)
        except UserError:  # such chats may not occur, and are named where they do
            return False

    def render(self, messages: Sequence[Message]) -> str:
        """What the template writes of these messages, each of them checked to be in it.

        A template that takes content as a list of parts gets it so.

        Raises:
            UserError: it refuses them, or leaves out what a message says.
        """
        text = self._render(messages, self._form_of(messages))
        _require_contents(text, messages)
        return text

    def before_content(self, messages: Sequence[Message], index: int) -> str:
        """What is written before the content of message `index`; what it says itself does not matter.

        Raises:
            UserError: the template refuses it, or does not write that message.
        """
        mark = _MARK.format(index)
        marked: list[Message] = list(messages)
        marked[index] = {"role": messages[index]["role"], "content": mark}
        text = self._render(marked, self._form_of(messages))
        before, found, _ = text.partition(mark)
        if not found:
            raise _lost(index, messages[index]["role"])
        return before

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """What the template writes for a model to continue; empty where there is no message before."""
        form = self._form_of(messages) if messages else _TEXT
        return self._render(messages, form, opens_answer=True) if messages else ""

    def _form_of(self, messages: Sequence[Message]) -> str:
        """Whether the template takes content as text or as parts: the first of them of which no message is lost."""
        roles = tuple(turn["role"] for turn in messages)
        if roles not in self._forms:
            self._forms[roles] = self._find_form(roles)
        return self._forms[roles]

    def _find_form(self, roles: Sequence[str]) -> str:
        marks = [_MARK.format(index) for index in range(len(roles))]
        messages: list[Message] = [
            {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)
        ]
        faults = []
        for form in (_TEXT, _PARTS):
            try:
                text = self._render(messages, form)
            except UserError as error:
                faults.append(error)
                continue
            lost = next((index for index, mark in enumerate(marks) if mark not in text), None)
            if lost is None:
                return form
            faults.append(_lost(lost, roles[lost]))
        raise faults[0]

    def _render(self, messages: Sequence[Message], form: str, *, opens_answer: bool = False) -> str:
        said = [{"role": turn["role"], "content": _as(form, turn["content"])} for turn in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=opens_answer, chat_template=self._source
            )
        # Templates are programs of the model's author: they refuse what they do not take in many ways.
        except Exception as error:
            reason = one_line(str(error), 160)
            fault = f"the tokenizer's chat template refuses it: {reason}"
            raise UserError(fault, mend=_remedy_for(messages, reason)) from None
        return str(text)


def asks_for_day(tokenizer: Any) -> bool:
    """Whether what the tokenizer's chat template writes depends on the date. UserError where it has none."""
    return _CLOCK in _source_of(tokenizer)


def today() -> str:
    """The date of this machine, as `ChatTemplate` takes it: YYYY-MM-DD."""
    return date.today().isoformat()


def as_day(said: object) -> str | None:
    """A date that was written down, as YYYY-MM-DD; None where it is none."""
    try:
        return date.fromisoformat(said).isoformat() if isinstance(said, str) else None
    except ValueError:
        return None


def _source_of(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        name = str(getattr(tokenizer, "name_or_path", "") or "the model's tokenizer")
        raise UserError("the tokenizer has no chat template, which chats need", name, _NO_TEMPLATE) from None


def _given_day(source: str, day: str | None) -> str:
    """The template with a clock of its own that stands at `day`.

    transformers passes only plain data to a template, so the function is a macro of the template itself: the format
    with every directive replaced that the template holds. Jinja takes away the line feed after it (`trim_blocks`).
    """
    if _CLOCK not in source:
        return source
    moment = date.fromisoformat(day or today())
    replaced = "".join(
        f".replace({json.dumps(directive)}, {json.dumps(moment.strftime(directive))})"
        for directive in sorted(set(_DIRECTIVE.findall(source)))
    )
    # A doubled percent sign is none of a directive.
    written = f'{{% set said = format.replace("%%", "\0"){replaced} %}}'
    unknown = (
        '{% if "%" in said %}{{ raise_exception("it makes the format of a date: " + format) }}{% endif %}'
    )
    ended = '{{ said.replace("\0", "%") }}'
    return f"{{% macro {_CLOCK}(format) %}}{written}{unknown}{ended}{{% endmacro %}}\n{source}"


def _as(form: str, content: str) -> Any:
    return content if form == _TEXT else [{"type": "text", "text": content}]


def require_asked(text: str, messages: Sequence[Message]) -> None:
    """See that what precedes an answer holds all messages before it.

    Raises:
        UserError: the template writes one of them behind the answer.
    """
    missing = _first_missing(text, messages)
    if missing is not None:
        raise UserError(
            f"the tokenizer's chat template writes message {missing + 1} ({messages[missing]['role']}) "
            "behind an answer to it",
            mend="use another template",
        )


def _require_contents(text: str, messages: Sequence[Message]) -> None:
    missing = _first_missing(text, messages)
    if missing is not None:
        raise UserError(
            f"the tokenizer's chat template changes what message {missing + 1} ({messages[missing]['role']}) says",
            mend="leave out of it what the template removes or rewrites, or use another template",
        )


def _first_missing(text: str, messages: Sequence[Message]) -> int | None:
    """The first message that is not in the text, white space at its ends aside, in its order.

    The system's may be anywhere.
    """
    at = 0
    for index, turn in enumerate(messages):
        content = turn["content"].strip()
        found = text.find(content, 0 if turn["role"] == "system" else at)
        if found < 0:
            return index
        at = at if turn["role"] == "system" else found + len(content)
    return None


def _lost(index: int, role: str) -> UserError:
    fault = f"the tokenizer's chat template leaves out what message {index + 1} ({role}) says"
    if role == "system":
        return UserError(fault, mend="put it into the first message of the user, or use another template")
    return UserError(fault, mend="use another template")


def _remedy_for(messages: Sequence[Message], reason: str) -> str:
    roles = [turn["role"] for turn in messages]
    if "system" in roles and "system" in reason.lower():
        return "put the system's words into the first message of the user, or use another template"
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] == ["assistant"]:
        return "begin the chat with a message of the user, or use another template"
    if any(one == other for one, other in pairwise(spoken)):
        return "let user and assistant take turns, or use another template"
    return "use another template"
