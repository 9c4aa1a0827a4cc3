"""Whether the model knows every token of the data: found before its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexlora_ds.base_model.vocabulary import Vocabulary, beyond
from launch.data.examples import TokenisedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_known_tokens(
    data: TokenisedData, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, file: str
) -> None:
    """See that every token read has a row of the embedding, and every token learnt a logit.

    Raises:
        UserError: one has not; the message names the token and the first record that holds it.
    """
    for limit, learnt, words in (
        (vocabulary.inputs, False, f"embedding has {vocabulary.inputs:,} rows"),
        (vocabulary.outputs, True, f"head has {vocabulary.outputs:,} logits"),
    ):
        found = [part.first_beyond(limit, learnt=learnt) for part in (data.train, data.validation)]
        first = min((place for place in found if place is not None), default=None)
        if first is not None:
            record, token = first
            raise beyond(tokenizer, token, words, f"{file}, record {record + 1}")
