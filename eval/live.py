"""The commonsense tests on a model in hand, while it is trained: the door through which `launch` uses the evaluation.

The figure is that of `python -m eval` for the adapter saved at that step, with the same items, prompt and protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eval.answering.answerer import Answerer as Answerer
from eval.answering.batching import Batch, order_batches, plan_batches
from eval.items import require_known_tokens
from eval.model.language_model import LanguageModel
from eval.model.loading import resolve_attention
from eval.test_sets import load_all_questions, protocol_for, tokenise_all
from flexlora_ds.base_model.attention_support import supported_attention
from flexlora_ds.base_model.vocabulary import Vocabulary


class LiveTest:
    """Some items of each task, read and tokenised once; asked of the same model again and again.

    Args:
        data: the folder of the tests, `<data>/<task>/test.json`.
        limit: items of each task, from the first.
        style: the prompt of the training; `day`: the date that its chat template is given.
        mode: the protocol, `score` or `generate`.
        places: what the options for `data` and `tasks` are called.

    Raises:
        UserError: a task has no file, a malformed record, or a token that the model does not know.
    """

    def __init__(
        self,
        data: Path,
        tasks: Sequence[str],
        *,
        limit: int,
        style: str,
        day: str | None,
        mode: str,
        tokenizer: Any,
        vocabulary: Vocabulary,
        places: tuple[str, str],
    ) -> None:
        questions = load_all_questions(data, tasks, limit, style, lambda line: None, places)
        self.protocol, _ = protocol_for(mode, questions, style)
        self.tasks = tokenise_all(questions, tokenizer, day)
        require_known_tokens(self.tasks.values(), tokenizer, vocabulary)
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def answerer(self, model: Any, call: Callable[..., Any], device: torch.device) -> Answerer:
        """What asks a model, which is in evaluation mode afterwards; not to be kept while weights change.

        Args:
            model: a causal model of transformers, adapted or not.
            call: how it is called, with the keyword arguments of its forward pass.
        """
        lm = LanguageModel(
            model, self._tokenizer, call=_without_inference(call), device=device, vocabulary=self._vocabulary
        )
        return Answerer(lm, self.protocol, self.tasks)

    def batches(self, answerer: Answerer, budget: int) -> list[Batch]:
        """The batches of all items that fit the model's context, of at most `budget` tokens; always the same."""
        return order_batches(
            batch
            for name, task in self.tasks.items()
            for batch in plan_batches(
                name, [item for item in task.items if answerer.fits(item)], answerer.cost, budget
            )
        )

    def accuracies(self, correct: Mapping[str, int]) -> dict[str, float]:
        """By task, the share of correct items; one that does not fit the context is not."""
        return {name: correct.get(name, 0) / len(task.items) for name, task in self.tasks.items()}


def _without_inference(call: Callable[..., Any]) -> Callable[..., Any]:
    """A weight that is gathered in inference mode could never be trained again."""

    def called(**arguments: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return call(**arguments)

    return called


@contextmanager
def evaluation_attention(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The model computes with the attention that an evaluation takes; afterwards with its own again."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, own = base.config, base.config._attn_implementation
    config._attn_implementation = resolve_attention("auto", dtype, device, supported_attention(base))
    try:
        yield
    finally:
        config._attn_implementation = own
