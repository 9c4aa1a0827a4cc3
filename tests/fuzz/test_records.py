"""Files, records, chats and templates that nobody wrote: one line, or all that they say."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat import as_chat, chat_pieces, encode_questions
from data_prep.chat_template import ChatTemplate
from data_prep.messages import ChatRecord, Message, is_answer
from data_prep.prompt import evaluation_prompt
from data_prep.records import Entry, is_chat, load_entries
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import IGNORED
from tests.helpers import chat_templates
from tests.helpers.chat_templates import make_tokenizer
from tests.helpers.fuzzing import answered, inputs
from tests.helpers.strange import VALUES

TEMPLATES = sorted(
    text for name, text in vars(chat_templates).items() if name.isupper() and isinstance(text, str)
)
TOKENIZERS = {template: make_tokenizer(template) for template in TEMPLATES}
DAY = "2025-03-09"

SAID = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "yes",
        " yes ",
        "user",
        "<think>\nwell\n</think>\n\nyes",
        "</think>",
        "<|im_end|>",
        "{{ x }}",
        "a\nb",
    ]
)
ROLES = st.sampled_from(["system", "user", "assistant"])
OTHERS = ["label", "weight", "train", "images", "tools", "chosen", "id"]
KEYS = st.sampled_from(["instruction", "input", "output", "answer", "system", "history", *OTHERS])
RECORDS = st.fixed_dictionaries({"instruction": SAID, "output": SAID | VALUES}) | st.just({})
TURN = st.fixed_dictionaries(
    {"role": ROLES | VALUES, "content": SAID | VALUES},
    optional={"weight": st.sampled_from([0, 1, 0.5, True]), "train": st.booleans() | VALUES, "name": VALUES},
)
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=4) | VALUES},
    optional={"system": SAID | VALUES, "label": VALUES, "answer": SAID},
)
ANY_RECORD = CHATS | st.tuples(RECORDS, st.dictionaries(KEYS, VALUES | SAID, max_size=3)).map(
    lambda both: both[0] | both[1]
)
FINE: list[list[dict[str, Any]]] = [
    [{"instruction": "é q", "input": "i", "output": "o", "answer": "o"}] * 3,
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ü"}]}] * 2,
]


def texts_of(entry: Entry) -> list[str]:
    return [turn["content"] for turn in as_chat(entry)["messages"]]


def strings_in(value: Any) -> list[str]:
    """Every text that a record of the file has where records have texts; a blank one may be left out."""
    turns = value.get("messages") or value.get("conversations") or []
    said = [value.get(key) for key in ("instruction", "input", "output", "system")]
    said += [turn.get("content", turn.get("value")) for turn in turns]
    said += [text for pair in value.get("history") or () for text in pair or ()]
    return [text for text in said if isinstance(text, str) and text.strip()]


def read(path: Path) -> list[Entry]:
    """What the readers return; empty where they refuse the file in one line."""
    found: list[Entry] = []
    answered(lambda: is_chat(path))
    answered(lambda: found.extend(load_entries(path)))
    return found


@inputs(few=100, many=4_000)
@given(st.lists(ANY_RECORD, min_size=1, max_size=3), st.booleans())
def test_records_of_any_form(tmp_path: Path, values: list[Any], array: bool) -> None:
    path = tmp_path / "data"
    path.write_text(json.dumps(values) if array else "".join(json.dumps(value) + "\n" for value in values))
    entries = read(path)
    for entry, value in zip(entries, values, strict=bool(entries)):
        told = "\n".join(texts_of(entry))
        assert all(text in told for text in strings_in(value))
        if "instruction" in entry:
            prompt = evaluation_prompt(entry, "alpaca") + entry["output"]
            assert all(text in prompt for text in strings_in(value))


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 400), st.integers(0, 5), st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"\\u"])
    ),
    max_size=3,
)


@inputs(few=150, many=6_000)
@given(st.sampled_from(FINE), CHANGES, st.booleans(), st.booleans(), st.booleans())
def test_damaged_files(
    tmp_path: Path, values: list[Any], changes: Any, array: bool, packed: bool, late: bool
) -> None:
    text = json.dumps(values, ensure_ascii=False) if array else "\n".join(map(json.dumps, values))
    data = gzip.compress(text.encode()) if packed and late else text.encode()
    for at, count, bytes_ in changes:
        data = data[:at] + bytes_ + data[at + count :]
    path = tmp_path / "data"
    path.write_bytes(gzip.compress(data) if packed and not late else data)
    entries = read(path)
    if entries and not (packed and late):
        plain = data.decode("utf-8-sig").strip()  # of any white space, where JSON itself knows four kinds
        lines = [line for line in io.StringIO(plain, newline=None) if line.strip()]
        whole = json.loads(plain) if plain.startswith("[") else list(map(json.loads, lines))
        for entry, value in zip(entries, whole, strict=True):
            assert all(text in "\n".join(texts_of(entry)) for text in strings_in(value))


MESSAGES = st.lists(st.tuples(ROLES, SAID, st.booleans()), min_size=1, max_size=5)


def as_messages(turns: Sequence[tuple[str, str, bool]]) -> list[Message]:
    """Messages that end with an answer which is learnt."""
    messages: list[Message] = []
    for role, content, silent in turns:
        message: Message = {"role": role, "content": content}
        messages.append({**message, "weight": 0} if silent else message)
    return [*messages, {"role": "assistant", "content": "the answer"}]


@inputs(few=200, many=4_000)
@given(st.sampled_from(TEMPLATES), MESSAGES, st.booleans())
def test_chats_through_every_template(template: str, turns: Any, inputs_too: bool) -> None:
    messages = as_messages(turns)
    tokenizer = TOKENIZERS[template]
    source = ChatTemplate(tokenizer, DAY)
    found: list[Any] = []
    answered(lambda: found.append(chat_pieces(source, messages)))
    if not found:
        return
    (pieces,) = found
    text = "".join(piece.text for piece in pieces)
    assert source.render(messages).startswith(text)
    assert all(turn["content"].strip() in text for turn in messages)
    answers = [turn["content"].strip() for turn in messages if is_answer(turn)]
    learnt = [piece.text[: len(piece.text) - piece.mark].strip() for piece in pieces if piece.answer]
    assert learnt == answers
    chat: ChatRecord = {"messages": messages, "answer": ""}
    (question,) = encode_questions(source, [chat], [["the answer"]], str)
    examples, _ = tokenise([chat], tokenizer, Encoding("chat", 9_999, inputs_too, day=DAY))
    ids, labels = examples[0].input_ids, examples[0].labels
    asked = [*question.prompt, *question.candidates[0]]
    assert ids[: len(asked)] == asked
    assert all(label != IGNORED for label in labels[len(question.prompt) :])


SNIPPETS = st.sampled_from(
    [
        "{{",
        "}}",
        "{%",
        "%}",
        "{% endif %}",
        "{{ m }}",
        "{{ messages }}",
        "| length",
        "m['content']",
        "''",
        "1 / 0",
        "{{ raise_exception('no\nerror: x') }}",
        "{% break %}",
        "{{ strftime_now }}",
        "{% generation %}",
        "\ud800",
    ]
)


@inputs(few=100, many=3_000)
@given(
    st.sampled_from(TEMPLATES),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 9), SNIPPETS), max_size=3),
)
def test_templates_that_nobody_wrote(template: str, changes: Any) -> None:
    for at, count, snippet in changes:
        template = template[:at] + snippet + template[at + count :]
    tokenizer = TOKENIZERS[TEMPLATES[0]]
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    messages: list[Message] = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
    try:
        found: list[Any] = []
        answered(lambda: found.append(chat_pieces(ChatTemplate(tokenizer, DAY), messages)))
        if found:
            *_, last = found[0]
            assert last.answer and last.text.lstrip().startswith("a1")
            assert any("q1" in piece.text for piece in found[0][:-1])
    finally:
        tokenizer.chat_template = before
