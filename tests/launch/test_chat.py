"""Chats through the tokenizer's template: what is asked, what is learnt, what cannot be distinguished."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.chat import as_chat, as_record, chat_pieces, encode_questions
from data_prep.chat_template import ChatTemplate
from data_prep.messages import ChatRecord
from data_prep.records import Entry, Record
from flexlora_ds.errors import UserError
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import IGNORED, Example
from tests.helpers.chat_templates import BARE, CHATML, MOVING, STRICT, TRIMMING, make_tokenizer

CHAT: ChatRecord = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "is the sun fire? "},
        {"role": "assistant", "content": "true"},
        {"role": "user", "content": "and the moon?\n\nAnswer format: true/false"},
        {"role": "assistant", "content": "the correct answer is false"},
    ],
    "answer": "false",
}
RECORD: Record = {
    "instruction": "is it?",
    "input": "rain",
    "output": "the correct answer is true",
    "answer": "true",
}
ENDS = {CHATML: "<|im_end|>", TRIMMING: "<|im_end|>", BARE: ""}


def example_of(entry: Entry, tokenizer: Any, prompt: str = "chat", **changes: Any) -> Example:
    examples, dropped = tokenise(
        [entry], tokenizer, Encoding(prompt, 999, **{"train_on_inputs": False, **changes})
    )
    assert not dropped
    return examples[0]


def learnt(example: Example, tokenizer: Any) -> list[str]:
    """The runs of tokens in the loss, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, TRIMMING, BARE])
@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_the_answers_and_their_ends_are_learnt_and_nothing_else(template: str, eos: str) -> None:
    tokenizer = make_tokenizer(template, eos_token=eos)
    example = example_of(CHAT, tokenizer)
    end = ENDS[template]
    closing = eos if end != eos else ""  # generation must know where to stop
    assert learnt(example, tokenizer) == [f"true{end}", f"the correct answer is false{end}{closing}"]
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole.rstrip() + closing


@pytest.mark.parametrize("template", [CHATML, TRIMMING, BARE])
def test_evaluation_asks_with_the_ids_that_training_reads(template: str) -> None:
    tokenizer = make_tokenizer(template)
    answer = CHAT["messages"][-1]["content"]
    (asked_with,) = encode_questions(ChatTemplate(tokenizer), [CHAT], [[answer]], str)
    prompt, (candidate,) = asked_with.prompt, asked_with.candidates
    ids = example_of(CHAT, tokenizer).input_ids
    assert ids[: len(prompt) + len(candidate)] == [*prompt, *candidate]
    asked = tokenizer.apply_chat_template(CHAT["messages"][:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == asked
    assert ids.count(tokenizer.bos_token_id) == int(template == TRIMMING)


def test_inputs_are_learnt_too_where_that_is_asked() -> None:
    example = example_of(CHAT, make_tokenizer(), train_on_inputs=True)
    assert example.labels == example.input_ids


def test_a_record_is_a_chat_of_one_question() -> None:
    tokenizer = make_tokenizer()
    chat = as_chat(RECORD)
    assert [turn["content"] for turn in chat["messages"]] == ["is it?\n\nrain", "the correct answer is true"]
    assert example_of(RECORD, tokenizer) == example_of(chat, tokenizer)
    assert as_record(chat) == {**RECORD, "instruction": "is it?\n\nrain", "input": ""}
    assert as_chat(CHAT) is CHAT and as_record(RECORD) is RECORD
    assert as_record(CHAT)["instruction"] == CHAT["messages"][3]["content"]


def test_chats_have_no_other_prompt() -> None:
    tokenizer = make_tokenizer()
    assert example_of(CHAT, tokenizer, "alpaca") == example_of(CHAT, tokenizer, "chat")


def test_a_chat_over_the_cutoff_is_dropped() -> None:
    short: ChatRecord = {"messages": CHAT["messages"][1:3], "answer": ""}
    examples, dropped = tokenise([CHAT, short], make_tokenizer(), Encoding("chat", 30, train_on_inputs=False))
    assert dropped == (0,) and examples.record_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (STRICT, r"refuses it: System role not supported \(chats\.jsonl, record 2\)"),
        (
            MOVING,
            r"leaves out what message 1 \(system\) says .*chats\.jsonl, record 2\); put it into the first",
        ),
    ],
)
def test_what_a_template_cannot_do_is_the_users_error(template: str | None, message: str) -> None:
    fine: ChatRecord = {"messages": CHAT["messages"][1:3], "answer": ""}
    with pytest.raises(UserError, match=message) as error:
        tokenise([fine, CHAT], make_tokenizer(template), Encoding("chat", 999, False, place="chats.jsonl"))
    assert "\n" not in str(error.value)


def test_pieces_join_to_what_the_template_writes() -> None:
    tokenizer = make_tokenizer()
    pieces = chat_pieces(ChatTemplate(tokenizer), CHAT["messages"])
    assert "".join(piece.text for piece in pieces) + "\n" == tokenizer.apply_chat_template(
        CHAT["messages"], tokenize=False
    )
    assert [piece.answer for piece in pieces] == [False, True, False, True]
