"""Generation by transformers' own `generate`: beam search, and models with caches of other kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eval.answering.batching import left_pad
from eval.model.language_model import LanguageModel


@torch.inference_mode()
def generate_with_library(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], *, beams: int, max_new_tokens: int
) -> list[list[int]]:
    """The generated tokens, without prompts and end tokens; the model's own sampling settings are ignored."""
    from transformers import GenerationConfig

    ids, mask = left_pad(prompts, lm.pad_id, lm.device)
    config = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(lm.stop_ids) or None,
        pad_token_id=lm.pad_id,
        use_cache=True,
    )
    rows = lm.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    return [_until_stop(row, lm.stop_ids) for row in rows.tolist()]


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
