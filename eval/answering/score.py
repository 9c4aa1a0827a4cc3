"""Scoring an item's own answers by their log-likelihood after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eval.answering.shared_prefix import SharedPrefix
from eval.items import Item


@dataclass(frozen=True)
class Scores:
    """`total[i]`: log-likelihood of the i-th candidate, up to a term that all candidates of the item share.
    `per_token[i]`: the same divided by its number of tokens; None where all have the same number."""

    total: tuple[float, ...]
    per_token: tuple[float, ...] | None = None

    @property
    def best(self) -> int:
        """The candidate of highest log-likelihood (the first one on ties)."""
        return self.total.index(max(self.total))

    @property
    def best_per_token(self) -> int:
        """The candidate of highest log-likelihood per token."""
        values = self.per_token or self.total
        return values.index(max(values))

    @property
    def margin(self) -> float:
        """The log-likelihood of the best candidate minus that of the second."""
        first, second = sorted(self.total, reverse=True)[:2]
        return first - second


@torch.inference_mode()
def score_last_token(prefix: SharedPrefix, items: Sequence[Item]) -> list[Scores]:
    """For candidates that differ in their last token only: one row per item, one column of logits."""
    output = prefix.forward(
        [item.prompt + item.candidates[0][:-1] for item in items], keep=1, use_cache=False
    )
    log_likelihoods = output.logits[:, -1].log_softmax(-1)
    scores = []
    for row, item in zip(log_likelihoods, items, strict=True):
        last = torch.tensor([candidate[-1] for candidate in item.candidates], device=row.device)
        scores.append(Scores(tuple(row[last].tolist())))
    return scores


@torch.inference_mode()
def score_summed(prefix: SharedPrefix, items: Sequence[Item]) -> list[Scores]:
    """The sum over each candidate's tokens, one row per candidate, all in one padded pass."""
    candidates = [candidate for item in items for candidate in item.candidates]
    rows = [item.prompt + candidate for item in items for candidate in item.candidates]
    longest = max(map(len, candidates))
    output = prefix.forward(rows, keep=longest + 1, use_cache=False)
    log_likelihoods = output.logits[:, :-1].log_softmax(-1)  # column j predicts the j-th of `longest` tokens
    targets = torch.tensor(
        [[0] * (longest - len(row)) + list(row) for row in candidates], device=log_likelihoods.device
    )
    counts = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in candidates], device=targets.device
    )
    sums = (log_likelihoods.gather(-1, targets[..., None])[..., 0] * counts).sum(1).tolist()
    scores, start = [], 0
    for item in items:
        total = tuple(sums[start : start + len(item.candidates)])
        per_token = tuple(value / len(row) for value, row in zip(total, item.candidates, strict=True))
        scores.append(Scores(total, per_token))
        start += len(item.candidates)
    return scores
