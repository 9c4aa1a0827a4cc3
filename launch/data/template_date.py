"""The date that a chat template is given: one for a run, also where that is continued on another day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.chat_template import as_day, asks_for_day, today
from data_prep.prompt import CHAT
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_text
from launch.options.train_options import TrainOptions
from launch.run_folder.folder import RunFolder

_KEY = "template_date:"


def resolve_template_date(options: TrainOptions, tokenizer: Any) -> str:
    """The value of `template_date` for this run; as it was given where no template asks for a date.

    `auto` is the date of the run that is continued, else today.

    Raises:
        UserError: what was given is no date.
    """
    if options.prompt != CHAT or not asks_for_day(tokenizer):
        return options.template_date
    if options.template_date == "auto":
        return _earlier_date(options) or today()
    day = as_day(options.template_date)
    if day is None:
        raise UserError(
            f"template_date {options.template_date!r} is no date",
            options.place("template_date"),
            "give YYYY-MM-DD or auto",
        )
    return day


def _earlier_date(options: TrainOptions) -> str | None:
    """The date of the run in `out`, or of the one whose checkpoint is continued; None where there is none."""
    named = Path(options.resume)
    folders = [Path(options.out)]
    if options.resume not in ("auto", "none"):
        folders += [named, named.parent.parent]
    written = (RunFolder(folder).options for folder in folders)
    dates = (_written_date(path) for path in written if path.is_file())
    return next((day for day in dates if day), None)


def _written_date(path: Path) -> str | None:
    lines = [line for line in read_text(path).splitlines() if line.startswith(_KEY)]
    return as_day(lines[0].removeprefix(_KEY).strip().strip("'\"")) if lines else None
