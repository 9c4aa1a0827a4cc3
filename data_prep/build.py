"""Raw rows to train and test files, the corpus, and a manifest that compares each with the published file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.convert import Limits, Section, read_sections
from data_prep.published.compare import first_differences, judge
from data_prep.published.files import CORPUS, PUBLISHED, Published
from data_prep.published.order import HEAD, SEPARATOR, TAIL, find_order, framed
from data_prep.sources import Source
from data_prep.staging import MANIFEST, commit, locked, read_manifest, staging
from data_prep.tasks import TASKS, Task
from flexlora_ds.errors import UserError
from flexlora_ds.files.hashing import sha256_of

FORMAT = 1
_PARTS_SECONDS, _CORPUS_SECONDS = 60.0, 15.0
_CORPUS_ORDERS = (  # after the natural order of TASKS; then whatever else time allows
    ("ARC-Challenge", "ARC-Easy", "boolq", "hellaswag", "openbookqa", "piqa", "social_i_qa", "winogrande"),
    ("ARC-Easy", "ARC-Challenge", "boolq", "hellaswag", "openbookqa", "piqa", "social_i_qa", "winogrande"),
    ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa"),
    ("boolq", "piqa", "social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa", "hellaswag", "winogrande"),
)


@dataclass(frozen=True)
class Options:
    """What to build. `published` is a folder with the published files, for showing the first difference."""

    tasks: tuple[str, ...] = tuple(TASKS)
    limit: int | None = None
    seed: int | None = None
    strict: bool = False
    force: bool = False
    published: Path | None = None


@dataclass(frozen=True)
class Built:
    """The manifest of a build, and why nothing was done (empty: it was built now)."""

    manifest: dict[str, Any]
    unchanged: str = ""


def build(
    source: Source,
    out: Path,
    options: Options,
    *,
    tasks: Mapping[str, Task] = TASKS,
    published: Mapping[str, Published] = PUBLISHED,
    log: Callable[[str], None] = lambda text: None,
) -> Built:
    """Build `out` from `source`, or find that it is already there.

    Everything is written to a staging folder and moved into place at the end. Raises UserError, with nothing written,
    for rows that cannot be converted, for splits that are missing (`strict`) or empty, and where `out` holds
    something else and `force` is not set.
    """
    chosen = [tasks[name] for name in options.tasks]
    request = {
        "source": source.name,
        "tasks": {task.name: task.version for task in chosen},
        "limit": options.limit,
        "seed": options.seed,
    }
    with locked(out):
        inputs = _inputs(source, chosen)
        old = read_manifest(out)
        if not options.force:
            reason = _stale(out, old, request, inputs)
            if old is not None and not reason:
                return Built(old, f"{out} is up to date: {len(old['files'])} files, all as in the manifest")
            _refuse_foreign(out, old, request, chosen)
            if old is not None:
                log(f"rebuilding: {reason}")
        draft = _Draft(staging(out), published, options, log)
        parts = [(task.name, draft.task(task, source)) for task in chosen]
        if not draft.files:
            raise UserError(
                "no rows for any task", source.name, "expected <task>/<split>.jsonl, see docs/data.md"
            )
        draft.corpus({name: part for name, part in parts if part is not None})
        manifest = {
            "format": FORMAT,
            "request": request,
            "inputs": inputs,
            "missing": draft.missing,
            "files": draft.files,
        }
        commit(out, manifest)
    return Built(manifest)


def _inputs(source: Source, tasks: Iterable[Task]) -> dict[str, str | None]:
    return {
        f"{task.name}/{split.file}": source.fingerprint(task, split)
        for task in tasks
        for split in (*task.train, task.test)
    }


def _stale(
    out: Path, old: dict[str, Any] | None, request: dict[str, Any], inputs: dict[str, str | None]
) -> str:
    """Why `out` is not what `request` would build; empty if it is."""
    if old is None:
        return "no manifest"
    if old.get("format") != FORMAT or old.get("request") != request:
        return "built with other settings"
    changed = [name for name in inputs if inputs[name] != old.get("inputs", {}).get(name)]
    if changed:
        return f"the source has changed: {', '.join(changed[:3])}"
    for name, entry in old["files"].items():
        path = out / name
        if not path.is_file():
            return f"{name} is gone"
        if sha256_of(path) != entry.get("sha256"):
            return f"{name} is not what was built"
    return ""


def _refuse_foreign(
    out: Path, old: dict[str, Any] | None, request: dict[str, Any], tasks: Iterable[Task]
) -> None:
    """Raise UserError where another build, or files that no build wrote, would be overwritten."""
    remedy = "choose another --out, or --force to replace it"
    if old is not None:
        if old.get("request") != request:
            raise UserError(
                "holds a build with other settings (source, tasks, limit or seed)", str(out), remedy
            )
        return
    names = [f"{task.name}/{kind}.json" for task in tasks for kind in ("train", "test")]
    for name in (CORPUS, MANIFEST, *names):
        if (out / name).exists():
            raise UserError(f"{name} is already there and was not built by this command", str(out), remedy)


class _Draft:
    """The staged files and their entries in the manifest."""

    def __init__(
        self, folder: Path, published: Mapping[str, Published], options: Options, log: Callable[[str], None]
    ) -> None:
        self.folder, self.published, self.options, self.log = folder, published, options, log
        self.files: dict[str, dict[str, Any]] = {}
        self.missing: list[str] = []

    def task(self, task: Task, source: Source) -> Section | None:
        """Write the files of one task; returns its part of the corpus, if it has one."""
        limits = Limits(self.options.limit, self.options.seed)
        part: Section | None = None
        for kind, splits in (("train", task.train), ("test", (task.test,))):
            sections, missing = read_sections(task, splits, source, limits, self.options.strict)
            self.missing += missing
            if not sections:
                continue
            labels = [str(split.file) for split in splits]
            ordered = self._ordered(f"{task.name}/{kind}.json", sections, labels, _PARTS_SECONDS)
            if kind == "train" and task.in_corpus:
                body = SEPARATOR.join(section.body for section in ordered)
                records = sum(section.records for section in ordered)
                part = Section(body, records, {"source": f"{task.name}/train.json"})
        self.log(f"{task.name}: " + (", ".join(self._counts(task)) or "nothing"))
        return part

    def corpus(self, parts: dict[str, Section]) -> None:
        """Write the training records of all tasks as one file."""
        if not parts:
            return
        names = list(parts)
        train_files = [f"{name}/train.json" for name in names]
        identical = all(self.files.get(name, {}).get("verdict") == "identical" for name in train_files)
        guesses = [
            [names.index(name) for name in order]
            for order in _CORPUS_ORDERS
            if sorted(order) == sorted(names)
        ]
        self._ordered(CORPUS, list(parts.values()), names, _CORPUS_SECONDS if identical else 0.0, guesses)

    def _counts(self, task: Task) -> list[str]:
        entries = ((kind, self.files.get(f"{task.name}/{kind}.json")) for kind in ("train", "test"))
        return [f"{entry['records']:,} {kind}" for kind, entry in entries if entry]

    def _ordered(
        self,
        name: str,
        sections: list[Section],
        labels: list[str],
        seconds: float,
        guesses: Sequence[Sequence[int]] = (),
    ) -> list[Section]:
        """Write a file of these sections in the published order, if it can be found, else in theirs."""
        order, note = tuple(range(len(sections))), ""
        target = self.published.get(name)
        if len(sections) > 1 and target is not None and seconds and _same_size(sections, target):
            self.log(f"{name}: searching the order of its {len(sections)} parts")
            result = find_order(
                [section.body for section in sections], target.sha256, [order, *guesses], seconds
            )
            order = result.order or order
            listed = ", ".join(labels[i] for i in order)
            if result.order:
                note = f"order found by hash: {listed}"
            else:
                tried = "all orders" if result.complete else f"{result.tried:,} orders"
                note = f"{tried} tried, none gives the published hash; natural order kept: {listed}"
        ordered = [sections[i] for i in order]
        self._write(name, ordered, target, note)
        return ordered

    def _write(self, name: str, sections: list[Section], target: Published | None, note: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in framed(section.body for section in sections):
                digest.update(chunk)
                size += file.write(chunk)
        records = sum(section.records for section in sections)
        verdict = judge(records, size, digest.hexdigest(), target)
        detail = verdict.detail
        theirs = self.options.published / name if self.options.published else None
        if verdict.kind == "differs" and theirs is not None and theirs.is_file():
            detail = f"{detail}; {first_differences(path, theirs)}"
        self.files[name] = {
            "sources": [section.origin for section in sections],
            "rows": sum(section.origin.get("rows", section.records) for section in sections),
            "records": records,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "verdict": verdict.kind,
            "detail": detail,
            "order": note,
            "published": target._asdict() if target else None,
        }


def _same_size(sections: Sequence[Section], target: Published) -> bool:
    size = len(HEAD) + len(TAIL) + len(SEPARATOR) * (len(sections) - 1) + sum(len(s.body) for s in sections)
    return size == target.bytes and sum(section.records for section in sections) == target.records
