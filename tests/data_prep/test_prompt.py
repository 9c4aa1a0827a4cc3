"""The prompt strings against literal transcriptions of LLM-Adapters' own (white space and all)."""

from __future__ import annotations

import pytest

from data_prep.prompt import TEXT_PROMPTS, evaluation_prompt, training_text
from data_prep.records import Record
from flexlora_ds.errors import UserError

S = " " * 16
PLAIN: Record = {
    "instruction": "Is ice cold?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
WITH_INPUT: Record = {**PLAIN, "instruction": "Add.", "input": "2 + 3", "output": "5", "answer": "5"}


def test_training_string_of_llm_adapters() -> None:
    assert "".join(training_text(PLAIN, "llm_adapters")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}Is ice cold?\n\nAnswer format: true/false\n"
        f"{S}\n"
        f"{S}### Response:\n"
        f"{S}the correct answer is true"
    )


def test_training_string_of_llm_adapters_with_input() -> None:
    assert "".join(training_text(WITH_INPUT, "llm_adapters")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}Add.\n"
        f"{S}\n"
        f"{S}### Input:\n"
        f"{S}2 + 3\n"
        f"{S}\n"
        f"{S}### Response:\n"
        f"{S}5"
    )


def test_evaluation_string_of_llm_adapters() -> None:
    assert evaluation_prompt(PLAIN, "llm_adapters") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request. \n"
        "\n"
        f"{S}### Instruction:\n"
        f"{S}Is ice cold?\n\nAnswer format: true/false\n"
        "\n"
        f"{S}### Response:\n"
        f"{S}"
    )


def test_evaluation_string_of_llm_adapters_with_input() -> None:
    assert evaluation_prompt(WITH_INPUT, "llm_adapters") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        f"{S}### Instruction:\n{S}Add.\n\n{S}### Input:\n{S}2 + 3\n\n{S}### Response:\n{S}"
    )


def test_alpaca_strings() -> None:
    assert evaluation_prompt(PLAIN, "alpaca") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nIs ice cold?\n\nAnswer format: true/false\n\n### Response:\n"
    )
    assert evaluation_prompt(WITH_INPUT, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 + 3\n\n### Response:\n"
    )


@pytest.mark.parametrize("record", [PLAIN, WITH_INPUT])
def test_alpaca_is_the_same_in_training_and_evaluation(record: Record) -> None:
    assert training_text(record, "alpaca") == (evaluation_prompt(record, "alpaca"), record["output"])


@pytest.mark.parametrize("record", [PLAIN, WITH_INPUT])
@pytest.mark.parametrize("style", TEXT_PROMPTS)
def test_the_answer_is_the_output_untouched(record: Record, style: str) -> None:
    padded: Record = {**record, "output": "  two  spaces \n"}
    assert training_text(padded, style)[1] == "  two  spaces \n"


def test_unknown_style_is_named() -> None:
    with pytest.raises(UserError, match=r"llama_adapters.*llm_adapters"):
        evaluation_prompt(PLAIN, "llama_adapters")
