"""Templates of the models that are about: what is asked, what is learnt, and what is lost is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from data_prep.chat import Piece, chat_pieces, encode_questions, prompt_note
from data_prep.chat_template import ChatTemplate, asks_for_day
from data_prep.messages import ChatRecord, Message
from flexlora_ds.errors import UserError
from launch.data.encoding import Encoding, tokenise
from launch.data.examples import IGNORED
from tests.helpers.chat_templates import (
    BARE,
    CHANNELS,
    CHATML,
    DATED,
    DEFAULT_SYSTEM,
    DROPPING,
    ESCAPING,
    GEMMA,
    INST,
    PARTS,
    REASONING,
    THINKING,
    TRIMMING,
    make_tokenizer,
)

DAY = "2025-03-09"


def say(*turns: tuple[str, str], **weights: int) -> list[Message]:
    """Messages of (role, content); `m2=0` gives the second one no weight."""
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    for name, weight in weights.items():
        messages[int(name[1:]) - 1]["weight"] = weight
    return messages


ONE = say(("user", "is ice cold?"), ("assistant", "yes"))
TOLD = say(("system", "be brief"), *[("user", "is ice cold?"), ("assistant", "yes")])
TWO = say(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
LATER = say(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), m2=0)
IM = "<|im_start|>"
END = "<|im_end|>"


def pieces_of(template: str, messages: Sequence[Message], **special: str) -> list[Piece]:
    return chat_pieces(ChatTemplate(make_tokenizer(template, **special), DAY), messages)


def texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        (CHATML, ONE, [f"{IM}user\nis ice cold?{END}\n{IM}assistant\n", f"yes{END}"]),
        (
            DEFAULT_SYSTEM,
            ONE,
            [
                f"{IM}system\nYou are a helper.{END}\n{IM}user\nis ice cold?{END}\n{IM}assistant\n",
                f"yes{END}",
            ],
        ),
        (
            DATED,
            TOLD,
            [
                f"<s>{IM}system\n\nToday Date: 09 Mar 2025\n\nbe brief{END}"
                f"{IM}user\n\nis ice cold?{END}{IM}assistant\n\n",
                f"yes{END}",
            ],
        ),
        (
            THINKING,
            ONE,
            [f"{IM}user\nis ice cold?{END}\n{IM}assistant\n<think>\n\n</think>\n\n", f"yes{END}"],
        ),
        (
            CHANNELS,
            ONE,
            [
                "<|start|>user<|message|>is ice cold?<|end|><|start|>assistant<|channel|>final<|message|>",
                "yes<|return|>",
            ],
        ),
        (
            GEMMA,
            ONE,
            ["<s><start_of_turn>user\nis ice cold?<end_of_turn>\n<start_of_turn>model\n", "yes<end_of_turn>"],
        ),
        (INST, TOLD, ["<s>[INST] be brief\n\nis ice cold? [/INST]", " yes</s>"]),
        (REASONING, ONE, ["<s><|User|>is ice cold?<|Assistant|>", "yes</s>"]),
        (
            PARTS,
            TOLD,
            [f"{IM}system\nbe brief{END}\n{IM}user\nis ice cold?{END}\n{IM}assistant\n", f"yes{END}"],
        ),
        (BARE, ONE, ["user: is ice cold?\nassistant: ", "yes"]),
        # Of two answers: where a template writes the first one always alike, both are learnt.
        (
            INST,
            TWO,
            ["<s>[INST] q1 [/INST]", " a1</s>", "[INST] q2 [/INST]", " a2</s>"],
        ),
        # A first answer of weight 0 need not be asked for as it stands: it is context.
        (
            THINKING,
            LATER,
            [
                f"{IM}user\nq1{END}\n{IM}assistant\n",
                "a1",
                f"{END}\n{IM}user\nq2{END}\n{IM}assistant\n<think>\n\n</think>\n\n",
                f"a2{END}",
            ],
        ),
        # An answer may bring its own thinking.
        (
            THINKING,
            say(("user", "q"), ("assistant", "<think>\nwell\n</think>\n\nyes")),
            [f"{IM}user\nq{END}\n{IM}assistant\n", f"<think>\nwell\n</think>\n\nyes{END}"],
        ),
        (CHATML, say(("assistant", "hello")), [f"{IM}assistant\n", f"hello{END}"]),
    ],
)
def test_the_prompt_ends_where_the_answer_begins(
    template: str, messages: list[Message], wanted: list[str]
) -> None:
    pieces = pieces_of(template, messages)
    assert texts(pieces) == wanted
    assert "".join(wanted) == ChatTemplate(make_tokenizer(template), DAY).render(messages).rstrip()


CHOICES = ["the correct answer is true", "the correct answer is false"]


@pytest.mark.parametrize(
    "template",
    [CHATML, DEFAULT_SYSTEM, DATED, THINKING, CHANNELS, GEMMA, INST, REASONING, PARTS, BARE, TRIMMING],
)
@pytest.mark.parametrize("eos", ["</s>", END])
def test_scoring_reads_the_very_tokens_that_training_learns(template: str, eos: str) -> None:
    tokenizer = make_tokenizer(template, eos_token=eos)
    asked = {"messages": say(("user", "q? "), ("assistant", "-")), "answer": "x"}
    (question,) = encode_questions(ChatTemplate(tokenizer, DAY), [asked], [CHOICES], str)  # type: ignore[list-item]
    for choice, candidate in zip(CHOICES, question.candidates, strict=True):
        chat: ChatRecord = {"messages": say(("user", "q? "), ("assistant", choice)), "answer": "x"}
        examples, _ = tokenise([chat], tokenizer, Encoding("chat", 999, False, day=DAY))
        ids, labels = examples[0].input_ids, examples[0].labels
        first = next(place for place, label in enumerate(labels) if label != IGNORED)
        assert tuple(ids[:first]) == question.prompt
        assert tuple(ids[first:][: len(candidate)]) == candidate
        assert tokenizer.decode(candidate).strip() == choice


@pytest.mark.parametrize(
    ("template", "messages", "fault", "remedy"),
    [
        (DROPPING, TOLD, r"leaves out what message 1 \(system\)", "into the first message of the user"),
        (GEMMA, TOLD, "refuses it: System role not supported", "into the first message of the user"),
        (
            GEMMA,
            say(("assistant", "hi"), ("user", "q"), ("assistant", "a")),
            "must alternate",
            "begin the chat",
        ),
        (GEMMA, say(("user", "a"), ("user", "b"), ("assistant", "c")), "must alternate", "take turns"),
        (
            ESCAPING,
            say(("user", "is 1 < 2?"), ("assistant", "a")),
            r"changes what message 1 \(user\)",
            "leave out",
        ),
        (
            ESCAPING,
            say(("user", "q"), ("assistant", "1 < 2")),
            r"changes what message 2 \(assistant\)",
            "leave out",
        ),
        (
            REASONING,
            say(("user", "q"), ("assistant", "<think>no</think>a"), ("user", "r"), ("assistant", "b"), m2=0),
            r"changes what message 2 \(assistant\)",
            "leave out",
        ),
        (THINKING, TWO, "tokens of message 2 cannot be identified", "weight 0 on the answers before"),
        (CHANNELS, TWO, "tokens of message 2 cannot be identified", "weight 0 on the answers before"),
        ("{{ messages[0]['content'] }}", ONE, r"leaves out what message 2 \(assistant\)", "another template"),
        (
            "{% for m in messages %}{% if loop.index0 % 2 %}{{ m['content'] }}{% endif %}{% endfor %}{{ messages }}",
            ONE,
            r"writes message 1 \(user\) behind an answer",
            "another template",
        ),
        ("{{ 1 / 0 }}", ONE, "refuses it: division by zero", "another template"),
        ("{% for m in messages %}{{ m.no.such }}{% endfor %}", ONE, "refuses it", "another template"),
    ],
)
def test_what_is_lost_or_changed_is_named(
    template: str, messages: list[Message], fault: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=fault) as error:
        pieces_of(template, messages)
    assert remedy in error.value.mend and "\n" not in str(error.value)


def test_the_last_answer_is_asked_for_where_earlier_ones_cannot_be_learnt() -> None:
    tokenizer = make_tokenizer(THINKING)
    chat: ChatRecord = {"messages": TWO, "answer": "x"}
    (question,) = encode_questions(ChatTemplate(tokenizer), [chat], [["a2", "b2"]], str)
    wanted = "".join(texts(pieces_of(THINKING, LATER))[:-1])
    assert tokenizer.decode(question.prompt) == wanted


def learnt_text(messages: list[Message], *, inputs: bool, template: str = CHATML) -> str:
    """What is in the loss, with `_` for each run of tokens that is not."""
    tokenizer = make_tokenizer(template, eos_token=END)
    chat: ChatRecord = {"messages": messages, "answer": ""}
    examples, _ = tokenise([chat], tokenizer, Encoding("chat", 999, train_on_inputs=inputs))
    runs: list[Any] = []
    for token, label in zip(examples[0].input_ids, examples[0].labels, strict=True):
        if label == IGNORED:
            runs += [] if runs[-1:] == ["_"] else ["_"]
        else:
            runs.append(token)
    return "".join(run if run == "_" else tokenizer.decode([run]) for run in runs)


ALWAYS_OPENING = TRIMMING.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
ENDING = CHATML.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        # LLaMA 3 as it came out: a generation prompt after every chat, asked for or not.
        (ALWAYS_OPENING, [f"a1{END}", f"a2{END}"]),
        # Phi-3: an end token after the last message only.
        (ENDING, [f"a1{END}", f"a2{END}\n</s>"]),
    ],
    ids=["always opening", "ending"],
)
def test_what_only_a_chats_end_has_is_no_part_of_the_answers_before_it(
    template: str, learnt: list[str]
) -> None:
    pieces = pieces_of(template, TWO)
    assert [piece.text for piece in pieces if piece.answer] == learnt
    assert texts(pieces_of(template, TWO[:2]))[-1] == learnt[-1].replace("a2", "a1")


def test_a_message_of_weight_0_is_never_learnt() -> None:
    assert learnt_text(TWO, inputs=False) == f"_a1{END}_a2{END}"
    assert learnt_text(LATER, inputs=False) == f"_a2{END}"
    wanted = f"{IM}user\nq1{END}\n{IM}assistant\n_{END}\n{IM}user\nq2{END}\n{IM}assistant\na2{END}"
    assert learnt_text(LATER, inputs=True) == wanted
    question = say(("user", "q1"), ("assistant", "a1"), m1=0)
    assert learnt_text(question, inputs=True) == f"{IM}user\n_{END}\n{IM}assistant\na1{END}"
    # What follows the last answer that is learnt is not read at all.
    first = say(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), m4=0)
    assert learnt_text(first, inputs=False) == f"_a1{END}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, None),
        (INST, None),
        (THINKING, r"writes '<think>\n\n</think>\n\n' before an answer: it is part"),
        (CHANNELS, "writes '<|channel|>final<|message|>' before an answer: it is part"),
        (REASONING, r"does not write '<think>\n' before an answer: it is no part"),
    ],
)
def test_a_prompt_that_is_not_the_generation_prompt_is_said(template: str, said: str | None) -> None:
    found = prompt_note(ChatTemplate(make_tokenizer(template)))
    assert found is None if said is None else found is not None and said in found


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %-d. %B %y", "100%%d on %j"])
def test_a_template_is_given_one_date(form: str) -> None:
    from datetime import date

    template = f"\n{{% set now = strftime_now({form!r}) %}}  {{{{ now }}}}|" + CHATML
    tokenizer = make_tokenizer(template)
    text = ChatTemplate(tokenizer, DAY).render(ONE)
    today = tokenizer.apply_chat_template(ONE, tokenize=False)
    assert text == today.replace(date.today().strftime(form), date.fromisoformat(DAY).strftime(form))
    assert asks_for_day(tokenizer) and not asks_for_day(make_tokenizer(CHATML))


def test_a_format_made_of_pieces_is_refused() -> None:
    template = "{{ strftime_now('%' + 'd') }}" + CHATML
    with pytest.raises(UserError, match="refuses it: it makes the format of a date: %d"):
        ChatTemplate(make_tokenizer(template), DAY).render(ONE)
