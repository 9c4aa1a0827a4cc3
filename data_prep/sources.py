"""Where raw rows come from: a local folder, or the hub through `datasets` (≥ 4, no remote code)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.json_items import iter_objects
from data_prep.rows import Row
from data_prep.tasks import HubPlace, Split, Task
from flexlora_ds.errors import UserError
from flexlora_ds.files.hashing import sha256_of

Loader = Callable[..., Iterable[Row]]  # the signature of datasets.load_dataset

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
_LOGIN_MARKS = (
    "gated",
    "cannot be accessed",
    "401",
    "403",
)  # in the messages of datasets and huggingface_hub
_LOCAL_HELP = "or build from local files with --source DIR (docs/data.md)"


class MissingSplitError(UserError):
    """A split that a local source does not have."""


@dataclass(frozen=True)
class Opened:
    """An opened split: its origin for the manifest, its name in messages, its rows in order."""

    origin: dict[str, Any]
    place: str
    rows: Iterator[Row]


class Source(Protocol):
    """Something that has the raw splits."""

    name: str

    def open(self, task: Task, split: Split) -> Opened:
        """Open one split. Raises MissingSplitError (it is not there) or UserError (it cannot be had)."""
        ...

    def fingerprint(self, task: Task, split: Split) -> str | None:
        """What changes when the split's content does; None where it is missing or unknown."""
        ...


class LocalSource:
    """A folder with `<task>/<split>.jsonl` in the hub's columns (`.jsonl.gz` and `.json` are read too)."""

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder)
        self.name = name or str(folder)
        if not self.folder.is_dir():
            raise UserError(
                "no such folder", str(folder), "give --source hub or a folder of <task>/<split>.jsonl"
            )

    def _path(self, task: Task, split: Split) -> Path | None:
        paths = (self.folder / task.name / f"{split.file}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in paths if path.is_file()), None)

    def open(self, task: Task, split: Split) -> Opened:
        """Open one split. Raises MissingSplitError naming what the task's folder does hold."""
        path = self._path(task, split)
        if path is None:
            folder = self.folder / task.name
            held = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "nothing"
            raise MissingSplitError(
                f"{task.name}/{split.file}.jsonl is not there",
                self.name,
                f"the folder {task.name} holds: {held}",
            )
        place = f"{self.name}/{task.name}/{path.name}"
        origin = {"source": place, "sha256": self.fingerprint(task, split)}
        return Opened(origin, place, _local_rows(path, place))

    def fingerprint(self, task: Task, split: Split) -> str | None:
        """The SHA-256 of the split's file."""
        path = self._path(task, split)
        return None if path is None else sha256_of(path)


def _local_rows(path: Path, place: str) -> Iterator[Row]:
    for number, value in iter_objects(path):
        if not isinstance(value, dict):
            raise UserError(
                f"a {type(value).__name__} where a row (an object) is expected", f"{place}, row {number}"
            )
        yield value


class HubSource:
    """The Hugging Face hub. Each task names several places; the first that gives usable rows is used."""

    name = "hub"

    def __init__(self, load: Loader | None = None, log: Callable[[str], None] = lambda text: None) -> None:
        self._load = load or _datasets_loader()
        self._log = log

    def open(self, task: Task, split: Split) -> Opened:
        """Open one split. Raises UserError naming every place that was tried and why it failed."""
        faults: list[str] = []
        for place in task.hub:
            self._log(f"{task.name}/{split.file}: asking the hub for {place}")
            try:
                with quiet_retries():
                    return self._open(place, task, split)
            # datasets, huggingface_hub and the network raise many unrelated types: each means, try the next
            except Exception as error:
                faults.append(f"{place}: {_reason(error)}")
        login = any(mark in fault.lower() for fault in faults for mark in _LOGIN_MARKS)
        advice = "log in with `hf auth login`" if login else "check the network"
        raise UserError(
            f"no hub source of {task.name}/{split.file} works",
            " | ".join(faults) or "the task names none",
            f"{advice}, {_LOCAL_HELP}",
        )

    def _open(self, place: HubPlace, task: Task, split: Split) -> Opened:
        config = split.config or place.config
        data = self._load(place.path, name=config, revision=place.revision, split=split.split)
        rows = (place.adapt(row) if place.adapt else row for row in data)
        first = next(rows, None)
        if first is not None:
            task.convert(first)  # other columns than expected: better the next place than a failure half-way
        origin = {
            "source": place.path,
            "config": config,
            "split": split.split,
            "revision": place.revision,
            "commit": _commit(data),
        }
        name = " ".join(filter(None, (str(place), config, split.split)))
        return Opened(origin, name, _with_first(first, rows))

    def fingerprint(self, task: Task, split: Split) -> str | None:
        """None: the hub's state is unknown without the network; `--force` rebuilds."""
        return None


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Hide huggingface_hub's warnings about every retry: the failure itself is reported, in one line."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _with_first(first: Row | None, rows: Iterator[Row]) -> Iterator[Row]:
    if first is not None:
        yield first
        yield from rows


def _commit(data: Any) -> str | None:
    """The commit the rows were downloaded from, where `datasets` recorded it (in its download URLs)."""
    urls = getattr(data, "download_checksums", None) or {}
    found = (re.search(r"@([0-9a-f]{40})/", str(url)) for url in urls)
    return next((match.group(1) for match in found if match), None)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:140]}{'…' if len(text) > 140 else ''}"


def _datasets_loader() -> Loader:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "the package 'datasets' is not installed", mend=f"pip install datasets, {_LOCAL_HELP}"
        ) from None
    loader: Loader = load_dataset
    return loader
