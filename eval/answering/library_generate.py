"""Generation by transformers' own `generate`: beam search, and models with caches of other kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eval.answering.batching import left_pad
from eval.model.language_model import LanguageModel


@torch.inference_mode()
def generate_with_library(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], *, beams: int, max_new_tokens: int
) -> list[list[int] | None]:
    """The generated tokens, without prompts and end tokens; the model's own sampling settings are ignored.

    None for a prompt whose logits were not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids, mask = left_pad(prompts, lm.pad_id, lm.device)
    config = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(lm.stop_ids) or None,
        pad_token_id=lm.pad_id,
        use_cache=True,
    )
    watch = _FiniteWatch(len(prompts))
    rows = lm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([watch]),
    )[:, ids.shape[1] :]
    found = zip(rows.tolist(), watch.finite(), strict=True)
    return [_until_stop(row, lm.stop_ids) if finite else None for row, finite in found]


class _FiniteWatch:
    """Looks at each step's scores on their way, and changes none."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Tokens that are ruled out have a score of minus infinity; the best one tells of NaN, too.
        found = scores.amax(-1).isfinite().view(self._prompts, -1).all(-1)
        self._finite = found if self._finite is None else self._finite & found
        return scores

    def finite(self) -> list[bool]:
        """Whether all scores of each prompt were, so far."""
        return [True] * self._prompts if self._finite is None else self._finite.tolist()


def decode_until_answered(
    lm: LanguageModel, tokens: Sequence[int], is_answered: Callable[[str], bool]
) -> str:
    """The text up to the first token that completes an answer, or of all tokens: where `generate_greedy` ends."""
    for count in range(1, len(tokens)):
        text = lm.decode(tokens[:count])
        if is_answered(text):
            return text
    return lm.decode(tokens)


def _until_stop(row: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The tokens before the end token: after it comes padding, which may be the id of a real word."""
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
