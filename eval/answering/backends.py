"""What answers the questions: our own batching around transformers, or vLLM. `eval.run` treats both alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.answering.vllm_backend import VllmAnswerer, start_vllm
from eval.items import Item, TaskItems
from eval.model.loading import load
from eval.options import Options
from eval.predictions import Prediction
from eval.protocols import Protocol as EvaluationProtocol
from flexlora_ds.base_model.loading import load_tokenizer
from flexlora_ds.base_model.vocabulary import Vocabulary


class Answering(Protocol):
    """What a run needs of a backend; `Answerer` describes each method."""

    def fits(self, item: Item) -> bool: ...
    def cost(self, item: Item) -> int: ...
    def default_tokens(self) -> int: ...
    def answer(self, batch: Batch) -> list[Prediction]: ...


@dataclass(frozen=True)
class Backend:
    """A loaded model. `most_rows`: the most items a batch may have (None: any number). `settings`: those of the
    model that can change a prediction. `device`: its type. `vocabulary`: None where it looks for unknown tokens.
    `effect`: what is to be said of the adapter. `doubts`: what its configuration says to no effect."""

    tokenizer: Any
    context: int | None
    most_rows: int | None
    device: str
    settings: dict[str, Any]
    vocabulary: Vocabulary | None
    effect: str | None
    doubts: tuple[str, ...]
    answerer: Callable[[EvaluationProtocol, dict[str, TaskItems]], Answering]


def open_backend(options: Options, device: torch.device) -> Backend:
    """Load the backend that `--backend` names. UserError for what is missing or does not fit."""
    return _with_vllm(options) if options.backend == "vllm" else _with_transformers(options, device)


def _with_transformers(options: Options, device: torch.device) -> Backend:
    lm = load(options, device)
    dtype = next(lm.model.parameters()).dtype
    return Backend(
        tokenizer=lm.tokenizer,
        context=lm.context,
        most_rows=1 if lm.unpadded_only else None,
        device=lm.device.type,
        settings={
            "revision": getattr(lm.model.config, "_commit_hash", None),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": lm.config._attn_implementation,
        },
        vocabulary=lm.vocabulary,
        effect=lm.effect,
        doubts=lm.doubts,
        answerer=lambda protocol, tasks: Answerer(lm, protocol, tasks),
    )


def _with_vllm(options: Options) -> Backend:
    engine = start_vllm(options)
    return Backend(
        tokenizer=load_tokenizer(options.model),
        context=engine.context,
        most_rows=None,
        device="cuda",
        settings={"dtype": engine.dtype, "attention": "vllm", "backend": f"vllm {engine.version}"},
        vocabulary=None,
        effect=None,
        doubts=engine.doubts,
        answerer=lambda protocol, tasks: VllmAnswerer(engine, tasks),
    )
