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
from data_prep.prompt import CHAT, encode_answers, encode_prompts, evaluation_prompt, training_text
from data_prep.records import Entry, Record
from flexlora_ds.errors import UserError
from launch.data.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CHUNK = 4096  # records per call of the tokenizer: bounds the memory held as Python lists

Encoded: TypeAlias = "tuple[list[int], list[bool]]"
"""The token ids of one record, the end token included, and which of them are answers."""


@dataclass(frozen=True)
class Encoding:
    """How records become examples; the name of the data file is for messages."""

    prompt: str
    cutoff_len: int
    train_on_inputs: bool
    place: str = "data"


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
    the same. `chat`: the tokenizer's chat template; every answer with its end mark is learnt.

    `progress` hears how many records are done. Raises UserError where there is no record, or where the tokenizer has
    no end token; UserError where it has no chat template that takes the chats.
    """
    if not entries:
        raise UserError("no records to train on", "data", "give a file with at least one record")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", "model", "set its eos_token")
    dropped: list[int] = []

    def kept() -> Iterator[tuple[int, Any, Any]]:
        for record_id, (ids, answers) in enumerate(_encoded(entries, tokenizer, how, progress)):
            if len(ids) > how.cutoff_len:
                dropped.append(record_id)
                continue
            learnt = np.ones(len(ids), np.bool_) if how.train_on_inputs else np.asarray(answers, np.bool_)
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
    for first in range(0, len(entries), _CHUNK):
        chunk = entries[first : first + _CHUNK]
        if how.prompt == CHAT or "messages" in chunk[0]:
            yield from _encode_chats(chunk, tokenizer, partial(_place, how.place, first))
        else:
            encode = _encode_whole if how.prompt == "llm_adapters" else _encode_by_parts
            yield from encode(cast("Sequence[Record]", chunk), tokenizer, how.prompt)
        progress(first + len(chunk))


def _place(file: str, first: int, index: int) -> str:
    return f"{file}, record {first + index + 1}"


def _encode_by_parts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, style: str
) -> list[Encoded]:
    prompts = encode_prompts(tokenizer, [evaluation_prompt(record, style) for record in records])
    answers = encode_answers(tokenizer, [training_text(record, style)[1] for record in records])
    eos = tokenizer.eos_token_id
    return [
        _answered([*prompt, *answer, eos], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _encode_whole(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, style: str) -> list[Encoded]:
    parts = [training_text(record, style) for record in records]
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in parts])
    wholes = encode_prompts(tokenizer, [prompt + answer for prompt, answer in parts])
    eos = tokenizer.eos_token_id
    # The end token is always a target, also where the prompt alone has more tokens than the prompt with its answer.
    return [
        _answered([*whole, eos], min(len(prompt), len(whole)))
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def _encode_chats(
    entries: Sequence[Entry], tokenizer: PreTrainedTokenizerBase, place: Callable[[int], str]
) -> list[Encoded]:
    eos = tokenizer.eos_token_id
    encoded = []
    for pieces in encode_chats(tokenizer, [as_chat(entry) for entry in entries], place):
        ids = [token for piece in pieces for token in piece.ids]
        answers = [piece.answer for piece in pieces for _ in piece.ids]
        if ids[-1] != eos:  # a template whose answers have another end mark, or none
            ids, answers = [*ids, eos], [*answers, True]
        encoded.append((ids, answers))
    return encoded


def _answered(ids: list[int], given: int) -> Encoded:
    return ids, [False] * given + [True] * (len(ids) - given)
