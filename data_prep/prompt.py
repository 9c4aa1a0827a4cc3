"""The instruction prompts as strings and as token ids, shared by training and evaluation.

`llm_adapters` reproduces the strings of LLM-Adapters' finetune.py and commonsense_evaluate.py byte for byte:
there, training and evaluation differ in the white space of the first line and between the sections.
`alpaca` is the clean form: the training prompt *is* the evaluation prompt.
"""

from __future__ import annotations

from typing import Any

from data_prep.records import Record
from flexlora_ds.errors import UserError

TEXT_PROMPTS = ("alpaca", "llm_adapters")
"""The styles that are strings around a record."""

CHAT = "chat"
"""The style that is the tokenizer's own chat template (`data_prep.chat`); files of chats have no other."""

PROMPTS = (*TEXT_PROMPTS, CHAT)

_PLAIN = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INDENT = " " * 16  # LLM-Adapters indents every line of the prompt but the first: an indented f-string


def _check_style(style: str) -> None:
    if style not in TEXT_PROMPTS:
        raise UserError(f"unknown prompt style {style!r}", mend=f"use one of {', '.join(TEXT_PROMPTS)}")


def _alpaca(record: Record) -> str:
    before = "".join(
        f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n"
        for question, answer in record.get("history", ())
    )
    told = f"{record['system']}\n\n" if "system" in record else ""
    if record["input"]:
        return (
            f"{told}{_WITH_INPUT}\n\n{before}### Instruction:\n{record['instruction']}\n\n"
            f"### Input:\n{record['input']}\n\n### Response:\n"
        )
    return f"{told}{_PLAIN}\n\n{before}### Instruction:\n{record['instruction']}\n\n### Response:\n"


def _llm_adapters(record: Record, first_line: str, blank_line: str) -> str:
    for key in ("system", "history"):
        if key in record:
            raise UserError(f"the prompt llm_adapters has no place for {key!r}", mend="use alpaca or chat")
    sections = [("Instruction", record["instruction"])]
    if record["input"]:
        sections.append(("Input", record["input"]))
    body = "".join(f"{_INDENT}### {name}:\n{_INDENT}{text}\n{blank_line}\n" for name, text in sections)
    return f"{first_line}\n\n{body}{_INDENT}### Response:\n{_INDENT}"


def training_text(record: Record, style: str) -> tuple[str, str]:
    """The prompt and the answer of a training example; their concatenation is the published training string.

    Raises UserError for an unknown style, or one that has no place for all that the record says.
    """
    _check_style(style)
    if style == "alpaca":
        return _alpaca(record), record["output"]
    first_line = _WITH_INPUT + " " if record["input"] else _PLAIN + "  "
    return _llm_adapters(record, first_line, blank_line=_INDENT), record["output"]


def evaluation_prompt(record: Record, style: str) -> str:
    """The string that is given to the model to continue.

    Raises UserError as `training_text`.
    """
    _check_style(style)
    if style == "alpaca":
        return _alpaca(record)
    first_line = _WITH_INPUT if record["input"] else _PLAIN + " "
    return _llm_adapters(record, first_line, blank_line="")


def encode_prompts(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """The token ids of texts that more tokens follow: with the BOS that the tokenizer adds, without the EOS.

    Some tokenizers end every text with their end token; a model must not read it before the answer. Training and
    evaluation both call this, so an adapter is asked with the ids that it was trained on.
    """
    rows = tokenizer(prompts, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in rows]


def encode_answers(tokenizer: Any, answers: list[str]) -> list[list[int]]:
    """The token ids of texts that follow a prompt: without any token that the tokenizer adds."""
    encoded = tokenizer(answers, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
