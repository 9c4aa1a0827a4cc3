"""Chats as a tokenizer's chat template writes them, and which parts of that text are answers.

A chat is rendered once per answer, up to where the answer begins and to where it ends, and tokenised piece by piece:
so training reads exactly the ids that evaluation asks with, followed by those of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from data_prep.records import ChatRecord, Entry, Message, Record
from flexlora_ds.errors import UserError

_NO_TEMPLATE = "use an instruct model's tokenizer, or records of instruction and output"


class Piece(NamedTuple):
    """A part of a rendered chat; `answer`: it is an answer of the assistant, its end mark included."""

    text: str
    answer: bool


class EncodedPiece(NamedTuple):
    """A piece as token ids."""

    ids: list[int]
    answer: bool


def as_chat(entry: Entry) -> ChatRecord:
    """A record as a chat of one question and one answer; a chat as it is."""
    if "messages" in entry:
        return cast(ChatRecord, entry)
    question = "\n\n".join(filter(None, (entry["instruction"], entry["input"])))
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": entry["output"]},
    ]
    return {"messages": messages, "answer": entry["answer"]}


def as_record(entry: Entry) -> Record:
    """A chat's last question and its answer as a record; a record as it is."""
    if "messages" not in entry:
        return entry
    *before, last = cast(ChatRecord, entry)["messages"]
    asked = [turn["content"] for turn in before if turn["role"] == "user"]
    return {
        "instruction": asked[-1] if asked else "",
        "input": "",
        "output": last["content"],
        "answer": entry["answer"],
    }


def chat_pieces(tokenizer: Any, messages: Sequence[Message]) -> list[Piece]:
    """The rendered chat up to the end of the last answer: context and answers in turn.

    White space after an answer's end mark belongs to the next piece. Raises UserError where the tokenizer
    has no chat template, where the template refuses these messages, or where it writes what came before an answer
    differently once the answer is there: then the answer's tokens cannot be identified.
    """
    pieces: list[Piece] = []
    done = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        given = _render(tokenizer, messages[:index], opens_answer=True)
        whole = _render(tokenizer, messages[: index + 1], opens_answer=False)
        if not (given.startswith(done) and whole.startswith(given)):
            raise UserError(
                "the tokenizer's chat template changes earlier text when an answer follows: "
                f"the tokens of message {index + 1} cannot be identified",
                mend="split the chat into chats of one answer, or use another template",
            )
        answer = whole[len(given) :].rstrip()
        pieces += [Piece(given[len(done) :], False), Piece(answer, True)]
        done = given + answer
    return pieces


def encode_chats(
    tokenizer: Any, chats: Sequence[ChatRecord], place: Callable[[int], str]
) -> list[list[EncodedPiece]]:
    """The token ids of each chat, piece by piece; the pieces but the last are what evaluation asks with.

    Raises UserError as `chat_pieces`; `place(i)` names chat i in it.
    """
    require_template(tokenizer)
    rendered: list[list[Piece]] = []
    for index, chat in enumerate(chats):
        try:
            rendered.append(chat_pieces(tokenizer, chat["messages"]))
        except UserError as error:
            raise error.at(place(index)) from None
    texts = [piece.text for pieces in rendered for piece in pieces]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    rows = iter(encoded["input_ids"])
    return [[EncodedPiece(next(rows), piece.answer) for piece in pieces] for pieces in rendered]


def chat_prompts(
    tokenizer: Any, chats: Sequence[ChatRecord], place: Callable[[int], str]
) -> list[tuple[int, ...]]:
    """The token ids that each chat is asked with: all before its last answer. Raises UserError as `encode_chats`."""
    encoded = encode_chats(tokenizer, chats, place)
    return [tuple(token for piece in pieces[:-1] for token in piece.ids) for pieces in encoded]


def require_template(tokenizer: Any) -> None:
    """Raise UserError where the tokenizer has no chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        name = str(getattr(tokenizer, "name_or_path", "") or "the model's tokenizer")
        raise UserError("the tokenizer has no chat template, which chats need", name, _NO_TEMPLATE) from None


def _render(tokenizer: Any, messages: Sequence[Message], *, opens_answer: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opens_answer
        )
    # Templates are programs of the model's author: they refuse what they do not take in many ways.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tokenizer's chat template refuses it: {reason}") from None
    return str(text)
