"""Records -> token ids, and which of them are learnt: one small encoder per prompt style."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from data_prep.chat import as_chat, encode_chats
from data_prep.chat_template import ChatTemplate
from data_prep.prompt import CHAT, encode_answers, encode_prompts, evaluation_prompt, training_text
from data_prep.records import Entry, Record
from flexlora_ds.errors import UserError
from launch.data.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_prep.messages import ChatRecord


VERSION = 2
"""Rises whenever the same records get other tokens, or others of them are learnt."""

_CHUNK = 4096  # records per call of the tokenizer: bounds the memory held as Python lists
_CHUNK_CHARACTERS = 4 << 20  # and what the tokenizer itself holds, some 160 bytes for each

Encoded: TypeAlias = "tuple[list[int], list[bool], list[bool]]"
"""The token ids of one record, the end token included; which of them are answers; which are never learnt."""


@dataclass(frozen=True)
class Encoding:
    """How records become examples; the name of the data file is for messages.

    `day`: the date that a chat template is given, where it asks for one.
    """

    prompt: str
    cutoff_len: int
    train_on_inputs: bool
    place: str = "data"
    day: str | None = None


def tokenise(
    entries: Sequence[Entry],
    tokenizer: PreTrainedTokenizerBase,
    how: Encoding,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Examples, tuple[int, ...]]:
    """Return the examples and the ids of the records whose tokens, the end token included, exceed `cutoff_len`.

    `alpaca`: ids of the evaluation prompt (as the tokenizer gives them to the evaluation, BOS included) + ids
    of the answer + EOS, so that training and evaluation agree by construction. `llm_adapters`: the published
    training string tokenised as a whole + EOS; the loss starts after as many tokens as the string without its
    answer has (LLM-Adapters' finetune.py, `generate_and_tokenize_prompt`), whether or not these tokens are
    the same. `chat`: the tokenizer's chat template; every answer with its end mark is learnt. A message of weight 0
    is never learnt.

    `progress` hears how many records are done. Raises UserError where there is no record, or where the tokenizer has
    no end token; UserError where it has no chat template that takes the chats.
    """
    if not entries:
        raise UserError("no records to train on", "data", "give a file with at least one record")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", "model", "set its eos_token")
    dropped: list[int] = []

    def kept() -> Iterator[tuple[int, Any, Any]]:
        for record_id, (ids, answers, silent) in enumerate(_encoded(entries, tokenizer, how, progress)):
            if len(ids) > how.cutoff_len:
                dropped.append(record_id)
                continue
            learnt = np.logical_not(silent) if how.train_on_inputs else np.asarray(answers, np.bool_)
            yield record_id, np.asarray(ids, np.int32), learnt

    examples = Examples.pack(kept())
    return examples, tuple(dropped)


@contextmanager
def all_cores() -> Iterator[None]:
    """Let a fast tokenizer use all cores meanwhile; afterwards as before, for processes may fork later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _encoded(
    entries: Sequence[Entry],
    tokenizer: PreTrainedTokenizerBase,
    how: Encoding,
    progress: Callable[[int], None],
) -> Iterator[Encoded]:
    as_chats = how.prompt == CHAT or "messages" in entries[0]
    template = ChatTemplate(tokenizer, how.day) if as_chats else None
    for first, chunk in _chunks(entries):
        place = partial(_place, how.place, first)
        if template is not None:
            yield from _encode_chats(chunk, template, place)
        else:
            encode = _encode_whole if how.prompt == "llm_adapters" else _encode_by_parts
            yield from encode(cast("Sequence[Record]", chunk), tokenizer, how.prompt, place)
        progress(first + len(chunk))


def _chunks(entries: Sequence[Entry]) -> Iterator[tuple[int, Sequence[Entry]]]:
    """The records in pieces that the tokenizer takes at once, each with the index of its first."""
    first = characters = 0
    for index, entry in enumerate(entries):
        length = _length(entry)
        if index > first and (index == first + _CHUNK or characters + length > _CHUNK_CHARACTERS):
            yield first, entries[first:index]
            first, characters = index, 0
        characters += length
    yield first, entries[first:]


def _length(entry: Entry) -> int:
    """Characters, about: what a record says."""
    if "messages" in entry:
        return sum(len(turn["content"]) for turn in cast("ChatRecord", entry)["messages"])
    history = sum(len(text) for pair in entry.get("history", ()) for text in pair)
    texts = (entry["instruction"], entry["input"], entry["output"], entry.get("system", ""))
    return history + sum(map(len, texts))


def _place(file: str, first: int, index: int) -> str:
    return f"{file}, record {first + index + 1}"


def _encode_by_parts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, style: str, place: Callable[[int], str]
) -> list[Encoded]:
    parts = _training_texts(records, style, place)
    prompts = encode_prompts(tokenizer, [evaluation_prompt(record, style) for record in records])
    answers = encode_answers(tokenizer, [answer for _, answer in parts])
    eos = tokenizer.eos_token_id
    return [
        _answered([*prompt, *answer, eos], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _encode_whole(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, style: str, place: Callable[[int], str]
) -> list[Encoded]:
    parts = _training_texts(records, style, place)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in parts])
    wholes = encode_prompts(tokenizer, [prompt + answer for prompt, answer in parts])
    eos = tokenizer.eos_token_id
    # The end token is always a target, also where the prompt alone has more tokens than the prompt with its answer.
    return [
        _answered([*whole, eos], min(len(prompt), len(whole)))
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def _training_texts(
    records: Sequence[Record], style: str, place: Callable[[int], str]
) -> list[tuple[str, str]]:
    texts = []
    for index, record in enumerate(records):
        try:
            texts.append(training_text(record, style))
        except UserError as error:
            raise error.at(place(index)) from None
    return texts


def _encode_chats(
    entries: Sequence[Entry], template: ChatTemplate, place: Callable[[int], str]
) -> list[Encoded]:
    eos = template.tokenizer.eos_token_id
    encoded = []
    for pieces in encode_chats(template, [as_chat(entry) for entry in entries], place):
        ids = [token for piece in pieces for token in piece.ids]
        answers = [piece.answer for piece in pieces for _ in piece.ids]
        silent = [piece.silent for piece in pieces for _ in piece.ids]
        if ids[-1] != eos:  # a template whose answers have another end mark, or none
            ids, answers, silent = [*ids, eos], [*answers, True], [*silent, False]
        encoded.append((ids, answers, silent))
    return encoded


def _answered(ids: list[int], given: int) -> Encoded:
    return ids, [False] * given + [True] * (len(ids) - given), [False] * len(ids)
