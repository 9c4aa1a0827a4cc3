"""Token ids and positions, and the rows of the embeddings that they name.

A tokenizer may know more tokens than its model has rows, and a record may be longer than a learnt table of positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from flexlora_ds.errors import UserError

_POSITIONS = re.compile(r"(^|\.)(wpe|[^.]*position[^.]*)$")
"""The last part of such a table's name: `wpe`, `embed_positions`, `position_embeddings`."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """How many token ids and positions a model knows."""

    inputs: int
    """Rows of its embedding."""
    outputs: int
    """Logits of its head."""
    positions: int | None = None
    """Those of its learnt table; None where it computes them, for any length."""
    context: int | None = None
    """How many its configuration names (`max_position_embeddings`), computed or learnt."""

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        """That of a causal model, adapted or not; the weights may be on the meta device."""
        inputs = int(model.get_input_embeddings().weight.shape[0])
        head = model.get_output_embeddings()
        outputs = inputs if head is None else int(head.weight.shape[0])
        return cls(inputs, outputs, _learnt_positions(model), _context(model))

    def padding_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The tokenizer's padding id where the model has its row, else another id: padding is masked in any case."""
        choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        return next((int(token) for token in choices if token is not None and token < self.inputs), 0)

    def require(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], place: str) -> None:
        """See that the model has a row for each of a record's tokens.

        Raises:
            UserError: it has not; the message names the token and `place`, the record.
        """
        largest = max(tokens, default=0)
        if largest >= self.inputs:
            raise beyond(tokenizer, largest, f"embedding has {self.inputs:,} rows", place)


def _context(model: Any) -> int | None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if type(limit) is int and limit > 0 else None


def _learnt_positions(model: Any) -> int | None:
    """The positions of a model's learnt table, without rows that serve padding; None where there is none.

    Of a model that takes images too, the decoder of text is asked: a table of an image's patches is none of it.
    """
    text = model.config.get_text_config(decoder=True)
    limit = _context(model)
    decoder = model if text is model.config else model.get_decoder() or model
    if limit is not None:
        for name, module in decoder.named_modules():
            if (
                isinstance(module, nn.Embedding)
                and _POSITIONS.search(name)
                and module.num_embeddings >= limit
            ):
                padding = getattr(module, "padding_idx", None)
                return min(limit, module.num_embeddings - (0 if padding is None else padding + 1))
    return None


def beyond(tokenizer: PreTrainedTokenizerBase, token: int, limit: str, place: str) -> UserError:
    """What is said of a token that the model does not know."""
    text = tokenizer.convert_ids_to_tokens(int(token))
    return UserError(
        f"the tokenizer turns {text!r} into the id {token:,}, but the model's {limit}",
        place,
        "use the model's own tokenizer, or resize the model's embedding and save it",
    )
