"""Chats: their messages, checked; faults named by the place given and the message's number."""

from __future__ import annotations

from typing import Any, TypedDict

from data_prep.record_keys import (
    is_given,
    is_learnt,
    refuse_bad_answer,
    refuse_changed_meaning,
    require_learnt,
)
from flexlora_ds.errors import UserError

_CHAT_FORM = 'a chat record is {"messages": [{"role": ..., "content": ...}, ...]}'
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class _Weight(TypedDict, total=False):
    weight: int


class Message(_Weight):
    """One turn of a chat; `role` is system, user or assistant. `weight` is 0 where it is out of the loss, or absent."""

    role: str
    content: str


class ChatRecord(TypedDict):
    """One chat example. The assistant's turns are what is learnt; the last turn is one of them.

    `answer` is what evaluation compares with; it may be empty in training data.
    """

    messages: list[Message]
    answer: str


def is_answer(turn: Message) -> bool:
    """Whether a message is learnt: the assistant's, and not out of the loss."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def to_chat(value: Any, place: str, need_answer: bool = False) -> ChatRecord:
    """Check one parsed chat object: `messages`, or ShareGPT's `conversations` of `from` and `value`.

    Raises:
        UserError: an unknown role, a content that is no text, a last turn that is not the assistant's, nothing to
            learn, or a key that changes what the chat means; it names `place` and the message.
    """
    key = chat_key(value) or "messages"
    turns = value.get(key) if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{key!r} is missing or empty", place, _CHAT_FORM)
    refuse_changed_meaning(value, place)
    if not need_answer:  # evaluation learns nothing
        refuse_bad_answer(value, place)
        require_learnt(value, place)
    if is_given(value.get("history")):
        raise UserError("'history' stands beside the messages", place, "put it among them")
    messages = [_to_message(turn, f"{place}, message {number}") for number, turn in enumerate(turns, 1)]
    if is_given(value.get("system")):
        _put_first(messages, text_field(value, "system", place), place)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        empty = messages[-1]["role"] == "assistant"
        what = "the last answer is empty" if empty else "the last message is not an assistant's answer"
        others = any(message["role"] == "assistant" for message in messages[:-1])
        mend = (
            "leave that message out"
            if others and not empty
            else "end with an answer, or leave the record out"
        )
        raise UserError(f"{what}: nothing to learn", place, mend)
    if not any(map(is_answer, messages)):
        raise UserError("no answer has a weight: nothing to learn", place, "leave the record out")
    answer = optional_text(value, "answer", place)
    if need_answer and not answer.strip():
        raise UserError("'answer' is missing or empty", place, "evaluation compares with it")
    return {"messages": messages, "answer": answer}


def _put_first(messages: list[Message], system: str, place: str) -> None:
    """Put a chat's `system` before its messages, unless its system message says the same."""
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif not messages[0]["content"].strip():
        messages[0] = {**messages[0], "content": system}
    elif messages[0]["content"].strip() != system.strip():
        raise UserError("'system' stands beside a system message", place, "leave one out")


def _to_message(turn: Any, place: str) -> Message:
    sharegpt = isinstance(turn, dict) and "from" in turn and "role" not in turn
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
        raise UserError(f"a message needs {role_key!r} and {content_key!r}", place)
    refuse_changed_meaning(turn, place, of_message=True)
    refuse_bad_answer(turn, place)
    role = text_field(turn, role_key, place)
    role = _SHAREGPT_ROLES.get(role, role) if sharegpt else role
    if role not in _ROLES:
        raise UserError(f"unknown role {role!r}", place, "use system, user or assistant")
    message: Message = {"role": role, "content": _content(turn, content_key, place)}
    if not is_learnt(turn, place):
        message["weight"] = 0
    elif role != "assistant" and any(turn.get(key) for key in ("weight", "train", "loss")):
        raise UserError(
            f"the {role}'s words are to be learnt", place, "only the assistant's are; leave it out"
        )
    return message


def _content(turn: dict[str, Any], key: str, place: str) -> str:
    """The text of a message; parts of text are joined."""
    parts = turn[key]
    if not isinstance(parts, list):
        return text_field(turn, key, place)
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or "text" not in part:
            raise UserError(
                f"a part of {key!r} is {kind!r}", place, "only text is read; leave such records out"
            )
        texts.append(text_field(part, "text", place))
    return "".join(texts)


def text_field(value: dict[str, Any], key: str, place: str) -> str:
    """A value that must be text. Raises UserError where it is something else, or holds a lone surrogate."""
    text = value[key]
    if not isinstance(text, str):
        raise UserError(f"{key!r} is {type(text).__name__}, not a string", place)
    return require_text(text, key, place)


def optional_text(value: dict[str, Any], key: str, place: str) -> str:
    """As `text_field`; empty where the key is absent or null."""
    return text_field(value, key, place) if value.get(key) is not None else ""


def require_text(text: str, key: str, place: str = "") -> str:
    """The text. Raises UserError where it holds a lone surrogate."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key!r} holds a lone surrogate, which is no text", place) from None
    return text


def chat_key(value: Any) -> str | None:
    """The key under which a chat record has its messages; None where it has none, or null there."""
    if not isinstance(value, dict):
        return None
    there = [key for key in ("messages", "conversations") if value.get(key) is not None]
    return next((key for key in there if value[key]), there[0] if there else None)
