"""Whether the model knows every token and every position of the data: found before its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexlora_ds.base_model.vocabulary import Vocabulary, beyond
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.counted import counted
from launch.data.examples import TokenisedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_known_tokens(
    data: TokenisedData, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, file: str
) -> None:
    """See that every token read has a row of the embedding and a position, and every token learnt a logit.

    Raises:
        UserError: one has not; the message names the token, or the number of tokens, and the first such record.
    """
    _require_positions(data, vocabulary.positions, file)
    for limit, learnt, words in (
        (vocabulary.inputs, False, f"embedding has {vocabulary.inputs:,} rows"),
        (vocabulary.outputs, True, f"head has {vocabulary.outputs:,} logits"),
    ):
        found = [part.first_beyond(limit, learnt=learnt) for part in (data.train, data.validation)]
        first = min((place for place in found if place is not None), default=None)
        if first is not None:
            record, token = first
            raise beyond(tokenizer, token, words, f"{file}, record {record + 1}")


def length_doubt(data: TokenisedData, vocabulary: Vocabulary, file: str) -> str | None:
    """A warning where records are longer than the model's context: their ends are at positions it has never seen."""
    context = vocabulary.context
    if context is None:
        return None
    parts = [part for part in (data.train, data.validation) if part.first_longer(context) is not None]
    if not parts:
        return None
    record, length = min(place for part in parts if (place := part.first_longer(context)) is not None)
    longer = counted(sum(part.count_longer(context) for part in parts), "record")
    return (
        f"{longer} longer than the model's context of {context:,} tokens, first {file}, record {record + 1}, of "
        f"{length:,}: positions that its weights do not know; cutoff_len {context} drops them"
    )


def _require_positions(data: TokenisedData, positions: int | None, file: str) -> None:
    """A record longer than a learnt table would end the run in a look-up behind the table's end."""
    if positions is None:
        return
    found = [part.first_longer(positions) for part in (data.train, data.validation)]
    first = min((place for place in found if place is not None), default=None)
    if first is not None:
        record, length = first
        raise UserError(
            f"{counted(length, 'token')} where the model has learnt {counted(positions, 'position')}",
            f"{file}, record {record + 1}",
            f"set cutoff_len to {positions} at most: longer records are dropped",
        )
