"""The prompts' shared prefix: its keys and values are computed once per task and copied into every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.answering.batching import left_pad
from eval.model.language_model import LanguageModel


class SharedPrefix:
    """The cached token ids that all rows of a batch start with; none where the model has no plain cache.

    The layout of a row is [prefix | padding | rest]: the padding is masked and takes no position.
    """

    def __init__(self, lm: LanguageModel, ids: Sequence[int]) -> None:
        self.lm = lm
        self.length = len(ids) if lm.own_loop else 0
        self._layers: list[tuple[Tensor, Tensor]] = []
        if self.length:
            self._layers = _keys_and_values(lm, ids)

    def forward(self, rows: Sequence[Sequence[int]], *, keep: int, use_cache: bool) -> BatchOutput:
        """Compute whole rows, prefix included; `keep` columns of logits at their ends."""
        if self.lm.unpadded_only and len(rows) > 1:
            return _stack([self.forward([row], keep=keep, use_cache=use_cache) for row in rows])
        ids, rest_mask = left_pad([row[self.length :] for row in rows], self.lm.pad_id, self.lm.device)
        positions = self.length + (rest_mask.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([rest_mask.new_ones(len(rows), self.length), rest_mask], dim=1)
        logits, cache = self.lm.forward(
            ids, mask, positions, cache=self._copies(len(rows), use_cache), use_cache=use_cache, keep=keep
        )
        return BatchOutput(logits, mask, positions[:, -1:], cache)

    def _copies(self, rows: int, use_cache: bool) -> Any:
        if not self._layers and not use_cache:
            return None
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.model.config)
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache


class BatchOutput:
    """A computed batch: `logits` [rows, keep, vocabulary]; `mask` [rows, columns of the cache]; `last` [rows, 1], each
    row's last position; `cache`, if it was asked for.
    """

    def __init__(self, logits: Tensor, mask: Tensor, last: Tensor, cache: Any) -> None:
        self.logits, self.mask, self.last, self.cache = logits, mask, last, cache


def _stack(outputs: Sequence[BatchOutput]) -> BatchOutput:
    """The logits of rows computed one by one; nothing continues them, so masks and caches are left out."""
    logits = torch.cat([output.logits for output in outputs])
    return BatchOutput(logits, outputs[0].mask[:0], outputs[0].last[:0], None)


def _keys_and_values(lm: LanguageModel, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    row = torch.tensor([list(ids)], device=lm.device)
    positions = torch.arange(len(ids), device=lm.device)[None]
    _, cache = lm.forward(row, torch.ones_like(row), positions, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]
