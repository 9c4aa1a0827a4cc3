"""From the data file to this process's batches: read, tokenise, hold out, share over the processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.chat import prompt_note
from data_prep.chat_template import ChatTemplate
from data_prep.prompt import CHAT
from data_prep.records import is_chat, load_entries
from flexlora_ds.base_model.loading import load_tokenizer
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.errors import UserError
from flexlora_ds.schedule import require_countable
from flexlora_ds.terminal.progress_bar import ProgressBar
from launch.data.batch_layout import BatchLayout
from launch.data.batches import ProcessShare, TrainingBatches, ValidationBatches, total_steps
from launch.data.encoding import VERSION, Encoding, all_cores, tokenise
from launch.data.examples import TokenisedData, arrange
from launch.data.token_cache import Tokenised, cached, content_key
from launch.data.vocabulary import require_known_tokens
from launch.distributed.process import Process
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USUAL_BATCH = 1024  # records: who learns a few by heart may use it however few they are


@dataclass(frozen=True)
class Data:
    """What a run reads: this process's batches, and how many steps they make."""

    tokenised: TokenisedData
    train: TrainingBatches
    validation: ValidationBatches | None
    steps: int


def prepare_data(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | None = None
) -> TokenisedData:
    """Tokenise the records, or find them tokenised already, and see that rank changes fit the steps they make.

    `vocabulary` is the model's; None looks up no token.

    Raises:
        UserError: the file is missing or malformed, nothing is left to train on, a token is not in the model's
            vocabulary, or the freeze would begin before the start of the rank changes.
        RunError: the cache of tokenised data cannot be written.
    """
    path = require_data(options)
    day = options.prompt_date
    how = Encoding(options.prompt, options.cutoff_len, options.train_on_inputs, place=str(path), day=day)
    settings = {
        "prompt": how.prompt,
        "cutoff_len": how.cutoff_len,
        "train_on_inputs": how.train_on_inputs,
        "encoding": VERSION,
        "date": day,
    }

    def make() -> Tokenised:
        entries = load_entries(path, note=_say)
        said = prompt_note(ChatTemplate(tokenizer, day)) if options.prompt == CHAT else None
        if said:
            _say(said)
        with all_cores(), ProgressBar("tokenising", len(entries), "records", delayed=True) as bar:
            return tokenise(entries, tokenizer, how, bar.show)

    examples, dropped = cached(content_key(path, tokenizer, settings), make)
    data = arrange(
        examples, dropped, cutoff_len=options.cutoff_len, val_size=options.val_size, seed=options.seed
    )
    if vocabulary is not None:
        require_known_tokens(data, tokenizer, vocabulary, str(path))
    _require_batch(options, len(data.train))
    if options.traits.changes_ranks:
        require_countable(steps_of(options, data), options.to_flexlora_config())
    return data


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _require_batch(options: TrainOptions, records: int) -> None:
    """Refuse an update that would see the records more often than the whole run is to see them."""
    if options.batch_size > max(_USUAL_BATCH, records * max(1.0, options.epochs)):
        raise UserError(
            f"batch_size {options.batch_size:,} is more than {options.epochs:g} epochs of {records:,} records",
            options.place("batch_size"),
            "lower it",
        )


def resolve_prompt(options: TrainOptions) -> TrainOptions:
    """The options with the prompt that the data needs: chats are always read through the tokenizer's chat template.

    Raises:
        UserError: the file is missing, or its beginning is malformed.
    """
    return options.replace(prompt=CHAT) if is_chat(require_data(options)) else options


def steps_of(options: TrainOptions, data: TokenisedData) -> int:
    """The steps of a run."""
    return total_steps(len(data.train), options.epochs, options.batch_size, options.max_steps)


def require_data(options: TrainOptions) -> Path:
    """The data file; said at once where it is missing, before a model is loaded for nothing."""
    path = Path(options.data)
    if not path.exists():
        raise UserError(
            f"no training data at {path}",
            options.place("data"),
            "build it with `python -m data_prep --out data`, or name another file with --data",
        )
    return path


def share_batches(
    options: TrainOptions,
    data: TokenisedData,
    layout: BatchLayout,
    process: Process,
    pad: int,
    *,
    packed: bool,
) -> Data:
    """Share the data over the processes; `pad` is the token that fills up rows where examples are not packed."""
    share = ProcessShare(process.world_size, process.rank, layout.micro_batch_size)
    steps = steps_of(options, data)
    validation = None
    if len(data.validation):
        validation = ValidationBatches(data.validation, share, pad, padding_free=packed)
    train = TrainingBatches(
        data.train,
        options.batch_size,
        options.seed,
        share,
        pad,
        padding_free=packed,
        group_by_length=options.group_by_length,
    )
    return Data(data, train, validation, steps)


def load_tokenizer_of(options: TrainOptions) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(options.model)
