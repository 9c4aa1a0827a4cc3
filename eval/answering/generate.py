"""Greedy generation whose answers do not depend on the batch; rows leave early, a draft saves steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.answering.shared_prefix import Beginning, Opened
from eval.model.language_model import LanguageModel


@dataclass
class Answer:
    """A generated answer: its tokens (end token left out) and their text.

    `margin` is the smallest gap between the two best logits; `drafted` counts tokens taken from the draft.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    margin: float = float("inf")
    drafted: int = 0


class Drafter:
    """Proposes how an answer starts, as long as the model agrees often enough.

    The draft is computed together with the prompt, and only what greedy decoding would have chosen anyway is
    kept: lossless speculative decoding (Leviathan et al. 2023) with a fixed text as the draft model.
    """

    _TRIAL = 32

    def __init__(self, draft: Sequence[int]) -> None:
        self._draft = tuple(draft)
        self._answers = self._accepted = 0

    @property
    def draft(self) -> tuple[int, ...]:
        """The proposed token ids; empty once they have proved useless."""
        useless = self._answers >= self._TRIAL and self._accepted < self._answers
        return () if useless else self._draft

    def learn(self, answers: Sequence[Answer]) -> None:
        """Count the drafted tokens that were accepted."""
        self._answers += len(answers)
        self._accepted += sum(answer.drafted for answer in answers)


@torch.inference_mode()
def generate_greedy(
    lm: LanguageModel,
    beginning: Beginning,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    decided: Callable[[str], bool],
    draft: Sequence[int] = (),
) -> list[Answer]:
    """Continue each prompt greedily until `decided(text)`, the end token, or `limits[i]` new tokens.

    Rows that are done leave the batch. `draft` must be shorter than every limit and not be decided itself.
    """
    opened = beginning.open([[*prompt, *draft] for prompt in prompts], keep=len(draft) + 1, use_cache=True)
    answers = [Answer() for _ in prompts]
    accepted = _accept_draft(opened, answers, draft)
    rows = _Rows(opened, accepted)
    tokens, gaps = _best(opened.logits)
    step = [(tokens[row][count], gaps[row][count]) for row, count in enumerate(accepted)]
    alive = list(range(len(prompts)))
    while True:
        going = [
            place
            for place, row in enumerate(alive)
            if _extend(lm, answers[row], *step[place], limits[row], decided)
        ]
        if not going:
            return answers
        alive = [alive[place] for place in going]
        tokens, gaps = _best(rows.advance(lm, going, [answers[row].tokens[-1] for row in alive]))
        step = [(token[0], gap[0]) for token, gap in zip(tokens, gaps, strict=True)]


class _Rows:
    """The open rows of a batch: their cache, which of its places count, the position of the next token."""

    def __init__(self, opened: Opened, accepted: Sequence[int]) -> None:
        drafted = opened.logits.shape[1] - 1
        rejected = drafted - torch.tensor(accepted, device=opened.mask.device)
        from_end = torch.arange(opened.mask.shape[1], 0, -1, device=opened.mask.device)
        self._mask = opened.mask * (
            from_end > rejected[:, None]
        )  # rejected draft tokens stay in the cache, unseen
        self._next = opened.last - rejected[:, None] + 1
        self._cache = opened.cache

    def advance(self, lm: LanguageModel, going: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Drop all rows but `going`, append one token to each; the next logits [rows, 1, vocabulary]."""
        if len(going) < len(self._mask):
            chosen = torch.tensor(going, device=self._mask.device)
            self._cache.batch_select_indices(chosen)
            self._mask, self._next = self._mask[chosen], self._next[chosen]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(going), 1)], dim=1)
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        logits, _ = lm.forward(ids, self._mask, self._next, cache=self._cache, use_cache=True)
        self._next = self._next + 1
        return logits


def _best(logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Of every row and column: the best token and its lead over the second."""
    best = logits.topk(2)
    return best.indices[..., 0].tolist(), (best.values[..., 0] - best.values[..., 1]).tolist()


def _accept_draft(opened: Opened, answers: Sequence[Answer], draft: Sequence[int]) -> list[int]:
    """Keep of each row the drafted tokens that greedy decoding chooses too; how many that is, per row."""
    tokens, gaps = _best(opened.logits)
    accepted = []
    for answer, chosen, lead in zip(answers, tokens, gaps, strict=True):
        count = 0
        while count < len(draft) and chosen[count] == draft[count]:
            count += 1
        answer.tokens = list(draft[:count])
        answer.drafted = count
        answer.margin = min(lead[:count], default=float("inf"))
        accepted.append(count)
    return accepted


def _extend(
    lm: LanguageModel, answer: Answer, token: int, gap: float, limit: int, decided: Callable[[str], bool]
) -> bool:
    """Add a token to an answer; whether it goes on."""
    answer.margin = min(answer.margin, gap)
    ended = token in lm.stop_ids
    if not ended:
        answer.tokens.append(token)
    answer.text = lm.decode(answer.tokens)
    return not (ended or len(answer.tokens) >= limit or decided(answer.text))
