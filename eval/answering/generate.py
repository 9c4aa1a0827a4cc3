"""Greedy generation whose answers do not depend on the batch. Finished rows leave early; a draft saves steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.answering.shared_prefix import BatchOutput, SharedPrefix
from eval.model.language_model import LanguageModel


@dataclass
class Answer:
    """A generated answer: its tokens (without the end token) and their text.

    `margin` is the smallest gap between the two best logits; `drafted` counts tokens taken from the draft.
    `finite`: whether the logits were; where they were not, the answer ends.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    margin: float = float("inf")
    drafted: int = 0
    finite: bool = True


class Drafter:
    """Proposes how an answer starts, as long as the model accepts it often enough.

    The draft is computed together with the prompt. Only tokens that greedy decoding would have chosen are
    accepted: lossless speculative decoding (Leviathan et al. 2023) with a fixed text as the draft model.
    """

    _TRIAL = 32

    def __init__(self, draft: Sequence[int]) -> None:
        self._draft = tuple(draft)
        self._answers = self._accepted = 0

    @property
    def draft(self) -> tuple[int, ...]:
        """The proposed token ids; empty once too few answers have accepted one."""
        rejected = self._answers >= self._TRIAL and self._accepted < self._answers
        return () if rejected else self._draft

    def learn(self, answers: Sequence[Answer]) -> None:
        """Count the drafted tokens that were accepted."""
        self._answers += len(answers)
        self._accepted += sum(answer.drafted for answer in answers)


@torch.inference_mode()
def generate_greedy(
    lm: LanguageModel,
    prefix: SharedPrefix,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_answered: Callable[[str], bool],
    draft: Sequence[int] = (),
) -> list[Answer]:
    """Continue each prompt greedily until `is_answered(text)`, the end token, or `limits[i]` new tokens.

    Finished rows leave the batch. `draft` must be shorter than every limit and must not answer by itself.
    """
    output = prefix.forward([[*prompt, *draft] for prompt in prompts], keep=len(draft) + 1, use_cache=True)
    answers = [Answer() for _ in prompts]
    accepted = _accept_draft(output, answers, draft)
    rows = _Rows(output, accepted)
    tokens, gaps = _best(output.logits)
    step = [(tokens[row][count], gaps[row][count]) for row, count in enumerate(accepted)]
    alive = list(range(len(prompts)))
    while True:
        unfinished = [
            place
            for place, row in enumerate(alive)
            if _extend(lm, answers[row], *step[place], limits[row], is_answered)
        ]
        if not unfinished:
            return answers
        alive = [alive[place] for place in unfinished]
        tokens, gaps = _best(rows.advance(lm, unfinished, [answers[row].tokens[-1] for row in alive]))
        step = [(token[0], gap[0]) for token, gap in zip(tokens, gaps, strict=True)]


class _Rows:
    """The unfinished rows of a batch: their cache, its attention mask, the position of the next token."""

    def __init__(self, output: BatchOutput, accepted: Sequence[int]) -> None:
        drafted = output.logits.shape[1] - 1
        rejected = drafted - torch.tensor(accepted, device=output.mask.device)
        from_end = torch.arange(output.mask.shape[1], 0, -1, device=output.mask.device)
        # Rejected draft tokens stay in the cache, masked.
        self._mask = output.mask * (from_end > rejected[:, None])
        self._next = output.last - rejected[:, None] + 1
        self._cache = output.cache

    def advance(self, lm: LanguageModel, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Keep `rows` only and append one token to each; the next logits [rows, 1, vocabulary]."""
        if len(rows) < len(self._mask):
            chosen = torch.tensor(rows, device=self._mask.device)
            self._cache.batch_select_indices(chosen)
            self._mask, self._next = self._mask[chosen], self._next[chosen]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        logits, _ = lm.forward(ids, self._mask, self._next, cache=self._cache, use_cache=True)
        self._next = self._next + 1
        return logits


def _best(logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """For every row and column: the best token, and the gap between its logit and the second best.

    The gap is NaN where the best is not finite; one NaN among the logits is their best.
    """
    best = logits.topk(2)
    first, second = best.values.unbind(-1)
    gaps = torch.where(first.isfinite(), first - second, float("nan"))
    return best.indices[..., 0].tolist(), gaps.tolist()


def _accept_draft(output: BatchOutput, answers: Sequence[Answer], draft: Sequence[int]) -> list[int]:
    """Keep the drafted tokens that greedy decoding chooses too; their number, per row."""
    tokens, gaps = _best(output.logits)
    accepted = []
    for answer, chosen, row_gaps in zip(answers, tokens, gaps, strict=True):
        count = 0
        while count < len(draft) and chosen[count] == draft[count] and not math.isnan(row_gaps[count]):
            count += 1
        answer.tokens = list(draft[:count])
        answer.drafted = count
        answer.margin = min(row_gaps[:count], default=float("inf"))
        accepted.append(count)
    return accepted


def _extend(
    lm: LanguageModel, answer: Answer, token: int, gap: float, limit: int, is_answered: Callable[[str], bool]
) -> bool:
    """Add a token to an answer; whether it is unfinished."""
    if math.isnan(gap):
        answer.finite = False
        return False
    answer.margin = min(answer.margin, gap)
    ended = token in lm.stop_ids
    if not ended:
        answer.tokens.append(token)
    answer.text = lm.decode(answer.tokens)
    return not (ended or len(answer.tokens) >= limit or is_answered(answer.text))
