"""Keys that change what a record means: honoured, or refused by name; others are said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.chat import as_chat
from data_prep.prompt import evaluation_prompt, training_text
from data_prep.records import load_entries
from flexlora_ds.errors import UserError

PLAIN = {"instruction": "q", "output": "a"}
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(folder: Path, *values: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [*turns] or ASKED, **more}


def turn(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **more}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (chat(label=False), "'label' is false"),
        (chat(label=0), "'label' is false"),
        (chat(kto_tag=False), "'kto_tag' is false"),
        ({**PLAIN, "label": False}, "'label' is false"),
        ({**PLAIN, "rejected_response": "b"}, "'rejected_response'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'chosen'"),
        (chat(images=["x.png"]), "'images'"),
        ({**PLAIN, "image": "x.png"}, "'image'"),
        (chat(tools=[{"name": "f"}]), "'tools'"),
        (chat(ASKED[0], turn(tool_calls=[{"id": 1}])), "'tool_calls'.*message 2"),
        (chat(ASKED[0], turn(function_call={"name": "f"})), "'function_call'.*message 2"),
        (chat(ASKED[0], turn(reasoning_content="well")), "'reasoning_content'.*message 2"),
        (chat(ASKED[0], turn(weight=0.5)), "'weight' is 0.5, not 0 or 1.*message 2"),
        (chat(ASKED[0], turn(weight=float("nan"))), "'weight' is nan"),
        (chat(ASKED[0], turn(train="false")), "'train' is 'false', not true or false"),
        (chat(ASKED[0], turn(weight=1, train=False)), "'weight' and 'train' contradict"),
        (chat(ASKED[0], turn(train=False)), "no answer has a weight"),
        (chat({**ASKED[0], "train": True}, ASKED[1]), "the user's words are to be learnt"),
        (chat(weight=0.3), "'weight' is 0.3"),
        ({**PLAIN, "weight": 0}, "nothing of it is in the loss"),
        (chat(history=[["q", "a"]]), "'history' stands beside"),
        (chat({"role": "system", "content": "s"}, *ASKED, system="t"), "'system' stands beside"),
        ({**PLAIN, "messages": ASKED}, "'messages' stands beside 'instruction'"),
        ({**PLAIN, "history": [["q"]]}, "'history' holds something else"),
        ({**PLAIN, "history": "q"}, "'history' is str"),
        ({**PLAIN, "system": ["s"]}, "'system' is list"),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
            "'image_url'.*message 1",
        ),
        ({"prompt": "q", "completion": "a"}, "rename 'prompt' to 'instruction' and 'completion' to 'output'"),
        ({"question": "q", "answer": "a"}, "rename 'question' to 'instruction' and 'answer' to 'output'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "unknown role 'function_call'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_key_and_record(
    tmp_path: Path, value: dict[str, Any], fault: str
) -> None:
    first = chat() if "messages" in value or "conversations" in value else PLAIN
    if "instruction" in value:
        first = PLAIN
    with pytest.raises(UserError, match=fault) as error:
        load_entries(write(tmp_path, first, value))
    assert "data.jsonl, record 2" in str(error.value) and "\n" not in str(error.value)


def test_weights_and_their_other_names_are_read(tmp_path: Path) -> None:
    for key, given in (("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)):
        turns = [ASKED[0], turn(**{key: given}), ASKED[0], turn(weight=1, train=True)]
        (entry,) = load_entries(write(tmp_path, chat(*turns, label=True, weight=1, tools=[], images=None)))
        assert entry == {
            "messages": [ASKED[0], {**ASKED[1], "weight": 0}, ASKED[0], ASKED[1]],
            "answer": "",
        }


def test_parts_of_text_are_joined_and_sharegpt_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "q1 "}, {"text": "q2"}]
    (entry,) = load_entries(write(tmp_path, chat({"role": "user", "content": parts}, ASKED[1], system="s")))
    assert entry["messages"][1]["content"] == "q1 q2"  # type: ignore[typeddict-item]
    assert entry["messages"][0] == {"role": "system", "content": "s"}  # type: ignore[typeddict-item]
    shared = {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
    }
    assert load_entries(write(tmp_path, shared)) == [
        {"messages": [{"role": "system", "content": "s"}, *ASKED], "answer": ""}
    ]


def test_system_and_history_of_a_record_are_context(tmp_path: Path) -> None:
    (entry,) = load_entries(write(tmp_path, {**PLAIN, "system": "be nice", "history": [["q1", "a1"]]}))
    assert as_chat(entry)["messages"] == [
        {"role": "system", "content": "be nice"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "weight": 0},
        *ASKED,
    ]
    prompt, answer = training_text(entry, "alpaca")  # type: ignore[arg-type]
    assert prompt == evaluation_prompt(entry, "alpaca") and answer == "a"  # type: ignore[arg-type]
    assert prompt.startswith("be nice\n\nBelow is an instruction that describes a task. ")
    assert prompt.endswith(
        "\n\n### Instruction:\nq1\n\n### Response:\na1\n\n### Instruction:\nq\n\n### Response:\n"
    )
    with pytest.raises(UserError, match="llm_adapters has no place for 'system'; use alpaca or chat"):
        training_text(entry, "llm_adapters")  # type: ignore[arg-type]


def test_other_keys_are_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    named = {**ASKED[0], "name": "Ann"}
    load_entries(write(tmp_path, chat(), chat(id=1), chat(named, ASKED[1], id=2)), note=said.append)
    assert said == [f"keys of {tmp_path}/data.jsonl that are not read: id (record 2), name (record 3)"]
    load_entries(write(tmp_path, {**PLAIN, "input": "", "answer": "x"}), note=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"tools": "[]", "functions": "{}", "images": [None], "image": float("nan"), "tool_calls": "null"},
        {"system": float("nan"), "history": [["", ""]]},
        {"messages": [], "conversations": None},
    ],
)
def test_keys_that_say_nothing_are_as_absent(tmp_path: Path, more: dict[str, Any]) -> None:
    (entry,) = load_entries(write(tmp_path, {**PLAIN, **more}))
    assert entry == {**PLAIN, "input": "", "answer": ""}
    if "messages" not in more:
        assert load_entries(write(tmp_path, chat(**more))) == [{"messages": ASKED, "answer": ""}]


def test_notes_on_how_a_record_was_made_are_no_keys_of_its_meaning(tmp_path: Path) -> None:
    said: list[str] = []
    more = {"reasoning": "off", "thinking": True, "loss": 1.23, "label": 0}
    (entry,) = load_entries(write(tmp_path, {**PLAIN, **more}), note=said.append)
    assert entry["output"] == "a"  # type: ignore[typeddict-item]
    assert said[0].endswith("label (record 1), loss (record 1), reasoning (record 1), thinking (record 1)")
    turns = [{**ASKED[0], "label": 0}, ASKED[1]]  # a class of the question
    assert load_entries(write(tmp_path, chat(*turns))) == [{"messages": ASKED, "answer": ""}]


def test_messages_are_found_under_the_key_that_holds_them(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for more in (
        {"messages": None},
        {"messages": []},
        {"instruction": None, "output": None},
        {"instruction": "q"},  # beside an answer under another name, as Magpie writes it
    ):
        value = {**more, "conversations": shared}
        assert load_entries(write(tmp_path, value)) == [{"messages": ASKED, "answer": ""}]


def test_a_system_key_may_repeat_or_fill_the_system_message(tmp_path: Path) -> None:
    told = {"role": "system", "content": "s"}
    for content in ("s", " s ", ""):
        (entry,) = load_entries(write(tmp_path, chat({**told, "content": content}, *ASKED, system="s")))
        assert [turn["content"].strip() for turn in entry["messages"]] == ["s", "q", "a"]  # type: ignore[typeddict-item]


def test_evaluation_learns_nothing_and_takes_a_label_of_false(tmp_path: Path) -> None:
    path = write(tmp_path, {**PLAIN, "answer": "false", "label": False, "weight": 0})
    assert load_entries(path, need_answer=True)[0]["answer"] == "false"
    with pytest.raises(UserError, match="'label' is false"):
        load_entries(path)
