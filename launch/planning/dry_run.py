"""`--dry_run true`: everything that can be known of a run without loading its weights, on one page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launch.data.examples import IGNORED, TokenisedData
from launch.data.prepare import load_tokenizer_of, prepare_data, steps_of
from launch.data.template_date import resolve_template_date
from launch.data.vocabulary import length_doubt
from launch.distributed.process import world_size_of_environment
from launch.engine.adapter_start import identify_adapter
from launch.engine.lr_schedule import peak_doubt
from launch.options.train_options import TrainOptions
from launch.options.without_effect import idle_line
from launch.planning.match_params import match_over
from launch.planning.memory_plan import memory_of
from launch.planning.page import DryRunPage, render_plan
from launch.planning.parameters import trained_at_start
from launch.planning.settle import settle
from launch.run_folder.compatibility import Identity
from launch.run_folder.resume import expect_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dry_run(options: TrainOptions) -> None:
    """Print the page.

    Raises:
        UserError, RunError: what would also stop the run itself.
    """
    settled = settle(options, world_size_of_environment())
    tokenizer = load_tokenizer_of(settled.options)
    settled = settled.dated(resolve_template_date(settled.options, tokenizer))
    options, layout, skeleton = settled.repeatable, settled.layout, settled.skeleton
    plan = memory_of(settled)
    data = prepare_data(options, tokenizer, skeleton.vocabulary)
    steps = steps_of(options, data)
    adapter = identify_adapter(options)
    identity = Identity.of(settled.options, None, data.train.digest(), steps, adapter)
    begins = expect_start(settled.options, identity)
    dropped = data.dropped_line()
    matched = []
    if settled.match is not None:
        matched = [match_over(settled.match, settled.options, skeleton.shapes, steps).line()]
    idle = idle_line(settled.options)
    too_long = length_doubt(data, skeleton.vocabulary, options.data)
    found = (*settled.doubts, too_long, peak_doubt(options, steps))
    doubts = [f"warning: {doubt}" for doubt in filter(None, found)]
    page = DryRunPage(
        options=options,
        shapes=skeleton.shapes,
        base_parameters=skeleton.parameters,
        records=data.kept_words(),
        total_steps=steps,
        layout=layout,
        memory=plan.at(layout.micro_batch_size),
        trained=trained_at_start(options, skeleton),
        memory_limit=plan.limit,
        example=_example(data, tokenizer),
        ranks=skeleton.ranks,
        notes=[
            *([dropped] if dropped else []),
            settled.line(),
            *matched,
            *skeleton.remarks,
            *([idle] if idle else []),
            *doubts,
            *begins,
        ],
    )
    text = render_plan(page)
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _example(data: TokenisedData, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    first = data.train[0]
    pieces = decoded_pieces(first.input_ids, tokenizer)
    return [(piece, label != IGNORED) for piece, label in zip(pieces, first.labels, strict=True)]


def decoded_pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each token adds to the decoded text. Decoded alone, tokens of sentencepiece lose the space before them."""
    shown = ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        if text.endswith("\ufffd") and end < len(tokens):  # the rest of this character is in the next token
            yield ""
            continue
        yield text[len(shown) :]
        shown = text
