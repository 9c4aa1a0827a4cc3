"""Chats as a tokenizer's chat template writes them, and which parts of that text are answers.

What a chat is asked with is all that the template writes before the content of its answer: the generation prompt, and
what some templates put between it and an answer (an empty thinking block, the mark of a channel). Training, scoring and
generation all take the pieces of `chat_pieces`, so training reads exactly the ids that evaluation asks with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, cast

from data_prep.chat_template import ChatTemplate, require_asked
from data_prep.messages import ChatRecord, Message, is_answer
from data_prep.records import Entry, Record
from flexlora_ds.errors import UserError

_ONE_ANSWER_EACH = (
    "write a chat for each answer, with weight 0 on the answers before it, or use another template"
)


class Piece(NamedTuple):
    """A part of a rendered chat. `answer`: it is learnt, its end mark included, of which `mark` characters are.

    `silent`: it is out of the loss even where inputs are learnt too.
    """

    text: str
    answer: bool
    silent: bool = False
    mark: int = 0


class EncodedPiece(NamedTuple):
    """A piece as token ids."""

    ids: list[int]
    answer: bool
    silent: bool


@dataclass(frozen=True)
class EncodedQuestion:
    """A chat's last question as token ids, and each candidate answer as the template writes it, without end mark."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]


class _ChangedEarlierError(UserError):
    """A template writes an answer differently once more messages follow."""


def as_chat(entry: Entry) -> ChatRecord:
    """A record as a chat of one question and one answer, after what it says of earlier ones; a chat as it is."""
    if "messages" in entry:
        return cast(ChatRecord, entry)
    messages: list[Message] = []
    if "system" in entry:
        messages.append({"role": "system", "content": entry["system"]})
    for question, answer in entry.get("history", ()):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "weight": 0})
    question = "\n\n".join(filter(None, (entry["instruction"], entry["input"])))
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": entry["output"]})
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


def chat_pieces(template: ChatTemplate, messages: Sequence[Message]) -> list[Piece]:
    """The rendered chat up to the end of the last answer that is learnt: context and answers in turn.

    White space after an answer's end mark belongs to the next piece.

    Raises:
        UserError: the template refuses these messages, leaves out or changes what one says, writes a question behind
            its answer, or an answer differently once more follows: then its tokens cannot be identified.
    """
    last = max(index for index, turn in enumerate(messages) if is_answer(turn))
    messages = messages[: last + 1]
    whole = template.render(messages)
    pieces: list[Piece] = []
    done = 0
    for index, turn in enumerate(messages):
        if is_answer(turn):
            start, content_end, end = _place_of_answer(template, messages, index, whole)
            require_asked(whole[:start], messages[:index])
        elif turn.get("weight") == 0 and turn["content"].strip():
            start, content_end = _place_of(template, messages, index, whole)
            end = content_end
        else:
            continue
        pieces.append(Piece(whole[done:start], False))
        answer = is_answer(turn)
        pieces.append(Piece(whole[start:end], answer, silent=not answer, mark=end - content_end))
        done = end
    return pieces


def _place_of(template: ChatTemplate, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
    """Where the content of a message begins and ends in the rendered chat."""
    before = template.before_content(messages, index)
    content = messages[index]["content"]
    written = content if whole.startswith(content, len(before)) else content.strip()
    if whole.startswith(before) and whole.startswith(written, len(before)):
        return len(before), len(before) + len(written)
    # An answer may hold itself what the template would put before it, such as its thinking.
    prompt = template.generation_prompt(messages[:index])
    if whole.startswith(prompt) and whole.startswith(written, len(prompt)):
        return len(prompt), len(prompt) + len(written)
    raise UserError(
        f"the tokenizer's chat template writes other marks around message {index + 1} than around other words",
        mend="leave out of it what the template reads as a mark, or use another template",
    )


def _place_of_answer(
    template: ChatTemplate, messages: Sequence[Message], index: int, whole: str
) -> tuple[int, int, int]:
    """Where an answer begins, where its content ends, and where its end mark does; as when it is the last message."""
    alone = messages[: index + 1]
    until = whole if len(alone) == len(messages) else template.render(alone)
    start, content_end = _place_of(template, alone, index, until)
    end = max(content_end, len(until.rstrip()))
    if not whole.startswith(until[:end]) or template.always_opens:
        end = _end_of_turn(template, alone, until, content_end) or end
    if not whole.startswith(until[:end]):
        raise _ChangedEarlierError(
            "the tokenizer's chat template changes earlier text when more messages follow: "
            f"the tokens of message {index + 1} cannot be identified",
            mend=_ONE_ANSWER_EACH,
        )
    return _with_space(template, alone, start, whole), content_end, end


def _end_of_turn(
    template: ChatTemplate, messages: Sequence[Message], until: str, content_end: int
) -> int | None:
    """Where the end mark of the last answer ends in a chat as `until` has it; None where that cannot be told.

    After it a template may write what only a chat's end has: a generation prompt nobody asked for, an end token.
    """
    asked: Message = {"role": "user", "content": "?"}
    try:
        opening = template.before_content([asked], 0).removeprefix(template.bos)
        before = template.before_content([*messages, asked], len(messages))
    except UserError:
        return None
    before = before.removesuffix(opening).rstrip() if opening and before.endswith(opening) else ""
    return len(before) if len(before) >= content_end and until.startswith(before) else None


def _with_space(template: ChatTemplate, messages: Sequence[Message], start: int, whole: str) -> int:
    """`start` moved before the spaces there, unless they belong to the generation prompt.

    Most vocabularies hold a word together with the space before it; a prompt that ends in a space is another text.
    """
    before = whole[:start].rstrip(" ")
    if len(before) == start:
        return start
    prompt = template.generation_prompt(messages[:-1])
    return max(len(before), len(prompt) if whole[:start].startswith(prompt) else 0)


def prompt_note(template: ChatTemplate) -> str | None:
    """One line where a prompt is not the template's generation prompt: whoever asks the model elsewhere needs it."""
    asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        before = template.before_content(asked, 1)
        given = template.generation_prompt(asked[:1])
    except UserError:  # such chats may not occur, and are named where they do
        return None
    if before.startswith(given):
        between = before[len(given) :].strip(" ")
        said = f"the chat template writes {between!r} before an answer: it is part of the prompt"
        return said if between else None
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, given, strict=False))
    left_out = given[sum(1 for _ in alike) :]
    return f"the chat template does not write {left_out!r} before an answer: it is no part of the prompt"


def encode_chats(
    template: ChatTemplate, chats: Sequence[ChatRecord], place: Callable[[int], str]
) -> list[list[EncodedPiece]]:
    """The token ids of each chat, piece by piece.

    Raises:
        UserError: as `chat_pieces`; `place(i)` names chat i in it.
    """
    rendered: list[list[Piece]] = []
    for index, chat in enumerate(chats):
        try:
            rendered.append(chat_pieces(template, chat["messages"]))
        except UserError as error:
            raise error.at(place(index)) from None
    ids = _encoded(template.tokenizer, [piece.text for pieces in rendered for piece in pieces])
    return [
        [EncodedPiece(ids[piece.text], piece.answer, piece.silent) for piece in pieces] for pieces in rendered
    ]


def encode_questions(
    template: ChatTemplate,
    chats: Sequence[ChatRecord],
    candidates: Sequence[Sequence[str]],
    place: Callable[[int], str],
) -> list[EncodedQuestion]:
    """What each chat is asked with, all before the content of its last answer, and its candidate answers.

    Args:
        candidates: for each chat, the answers to choose from; each is rendered as the assistant's turn.

    Raises:
        UserError: as `chat_pieces`; or nothing comes before an answer, or what comes depends on the answer.
    """
    asked: list[tuple[list[str], list[str]]] = []
    for index, (chat, answers) in enumerate(zip(chats, candidates, strict=True)):
        try:
            asked.append(_asked(template, chat["messages"], answers))
        except UserError as error:
            raise error.at(place(index)) from None
    ids = _encoded(template.tokenizer, [text for prompt, answers in asked for text in (*prompt, *answers)])
    return [
        EncodedQuestion(
            tuple(token for text in prompt for token in ids[text]),
            tuple(tuple(ids[text]) for text in answers),
        )
        for prompt, answers in asked
    ]


def _asked(
    template: ChatTemplate, messages: Sequence[Message], answers: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The texts of a prompt, piece by piece, and of each candidate answer."""
    prompts, candidates = [], []
    for answer in answers:
        *before, last = _pieces_to_ask(template, messages, answer)
        prompts.append([piece.text for piece in before])
        candidates.append(last.text[: len(last.text) - last.mark])
    if any(prompt != prompts[0] for prompt in prompts):
        raise UserError(
            "the tokenizer's chat template writes different text before different answers",
            mend="use another template",
        )
    if not any(prompts[0]):
        raise UserError("nothing is asked: the chat begins with its answer", mend="put a question before it")
    return prompts[0], candidates


def _pieces_to_ask(template: ChatTemplate, messages: Sequence[Message], answer: str) -> list[Piece]:
    """As in training, where that can be trained on; else with the last answer as the only one."""
    *before, _ = messages
    last: Message = {"role": "assistant", "content": answer}
    try:
        return chat_pieces(template, [*before, last])
    except _ChangedEarlierError:
        context: list[Message] = [
            {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before
        ]
        return chat_pieces(template, [*context, last])


def _encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """The token ids of each text, without any token that the tokenizer adds."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    rows = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return dict(zip(unique, rows["input_ids"], strict=True))
