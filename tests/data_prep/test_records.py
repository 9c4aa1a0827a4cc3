"""Reading records: formats, chunk borders, and the first malformed record named."""

from __future__ import annotations

import gzip
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import data_prep.json_items as json_items
from data_prep.records import is_chat, iter_records, load_entries, load_records
from flexlora_ds.errors import UserError

GOOD = {"instruction": "Say ü\u200b", "input": "", "output": "the correct answer is true", "answer": "true"}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize("form", ["indented", "compact", "jsonl", "utf-8 jsonl", "bom"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packed: bool, chunk: int
) -> None:
    monkeypatch.setattr(json_items, "_CHUNK", chunk)
    rng = random.Random(5)
    wanted = [{**GOOD, "instruction": 'q "]}, [{\\ ü' + "x" * rng.randrange(40)} for _ in range(30)]
    text = {
        "indented": json.dumps(wanted, indent=4),
        "compact": json.dumps(wanted),
        "jsonl": lines(*wanted),
        "utf-8 jsonl": "\n".join(json.dumps(value, ensure_ascii=False) for value in wanted) + "\n\n",
        "bom": "\ufeff" + json.dumps(wanted, ensure_ascii=False),
    }[form]
    path = write(tmp_path / "data.any", gzip.compress(text.encode()) if packed else text)
    assert load_records(path) == wanted


def test_absent_input_and_answer_become_empty_and_other_keys_go(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"instruction": "i", "output": "o", "id": 3}))
    assert load_records(path) == [{"instruction": "i", "input": "", "output": "o", "answer": ""}]
    with pytest.raises(UserError, match=r"'answer' is missing \(.*a\.jsonl, record 1\)"):
        load_records(path, need_answer=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"input": "", "output": "o", "answer": "a"}, "'instruction' is missing"),
        ({**GOOD, "output": 5}, "'output' is int, not a string"),
        ({**GOOD, "output": " "}, "'output' is empty"),
        ({**GOOD, "instruction": "\ud800"}, "lone surrogate"),
        ("text", "a str where a record"),
        ({"messages": []}, "chat record"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_the_first_malformed_record_is_named(tmp_path: Path, bad: Any, message: str, array: bool) -> None:
    values = [GOOD, GOOD, bad, GOOD, "also bad"]
    path = write(tmp_path / "bad.json", json.dumps(values) if array else lines(*values))
    with pytest.raises(UserError, match=message) as error:
        load_records(path)
    assert f"({path}, record 3)" in str(error.value) and "\n" not in str(error.value)
    assert len(list(islice(iter_records(path), 2))) == 2  # those before it are read


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("[", 1),
        (json.dumps([GOOD, GOOD])[:-1], 3),
        (json.dumps([GOOD, GOOD])[:-20], 2),
        ("[" + json.dumps(GOOD) + " " + json.dumps(GOOD) + "]", 2),
        ("[" + json.dumps(GOOD) + ",]", 2),
        (json.dumps([GOOD]) + "x", 2),
        (lines(GOOD) + '{"instruction": \n' + lines(GOOD), 2),
        ("hello", 1),
        (gzip.compress(lines(*[GOOD] * 5).encode(), mtime=0)[:-9], 6),
        ("[" * 100_000, 1),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, text: str | bytes, number: int) -> None:
    path = write(tmp_path / "broken", text)
    with pytest.raises(UserError, match="not valid JSON") as error:
        load_records(path)
    place = str(error.value).partition("broken, record ")[2]
    assert int(place.split(")")[0]) == number


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_records(tmp_path / "none.json")
    with pytest.raises(UserError, match="not an ordinary file"):
        load_records(tmp_path)
    for text in ("", " \n", "[]"):
        with pytest.raises(UserError, match="holds no records"):
            load_records(write(tmp_path / "empty", text))


def chat(*roles: str, **more: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} says"} for role in roles], **more}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_one_function_reads_records_and_chats(tmp_path: Path, packed: bool, array: bool) -> None:
    chats = [
        chat("user", "assistant", answer="yes"),
        chat("system", "user", "assistant", "user", "assistant"),
    ]
    for values in ([GOOD, GOOD], chats):
        text = json.dumps(values) if array else lines(*values)
        path = write(tmp_path / "data.any", gzip.compress(text.encode()) if packed else text)
        assert load_entries(path) == [{"answer": "", **value} for value in values]
        assert is_chat(path) == (values is chats)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chat(), "'messages' is missing or empty"),
        (
            chat("user"),
            "not an assistant's answer: nothing to learn .*; end with an answer, or leave the record out",
        ),
        (chat("user", "assistant", "user"), "not an assistant's answer.*; leave that message out"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
            "the last answer is empty: nothing to learn .*; end with an answer, or leave the record out",
        ),
        (chat("tool", "assistant"), "unknown role 'tool'"),
        ({"messages": [{"role": "user"}]}, "record 2, message 1"),
        ({"messages": [{"role": "user", "content": 5}]}, "'content' is int"),
        (GOOD, "'messages' is missing"),
    ],
)
def test_a_malformed_chat_is_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "chat.jsonl", lines(chat("user", "assistant"), bad))
    with pytest.raises(UserError, match=message) as error:
        load_entries(path)
    assert "chat.jsonl, record 2" in str(error.value)


def test_a_chat_among_records_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", lines(GOOD, chat("user", "assistant")))
    with pytest.raises(UserError, match=r"mixed\.jsonl, record 2\); .*do not mix"):
        load_entries(path)


def test_evaluation_needs_a_chats_answer(tmp_path: Path) -> None:
    path = write(
        tmp_path / "chat.jsonl", lines(chat("user", "assistant", answer="yes"), chat("user", "assistant"))
    )
    with pytest.raises(UserError, match=r"'answer' is missing or empty \(.*record 2\)"):
        load_entries(path, need_answer=True)
