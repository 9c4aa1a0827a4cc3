"""What a report is made of: the files of a run folder, read back and arranged by module kind and layer."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.reading import MIB, read_json_object, read_text
from flexlora_ds.terminal.plain_text import printable
from launch.options.yaml_text import read_entries
from launch.run_folder.folder import RunFolder
from launch.run_folder.new_directions import NewDirection, life_stories
from launch.run_folder.rows import DIRECTIONS, SUMMARY, Check, fault_of, is_number, list_of, object_of

OTHERS = "others"
_MEND = "restore the file, or remove it"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """A run, read from its folder; parts that are not there (yet) are empty."""

    name: str
    options: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: list[Row]
    changes: list[Row]
    validation: list[Row]
    spectra: Mapping[str, list[float]]
    accuracy: list[Row] = field(default_factory=list)
    """On the test sets, where it was measured while training."""
    births: list[NewDirection] = field(default_factory=list)
    """Every direction born after the start."""
    worth: Mapping[str, Any] = field(default_factory=dict)
    """directions.json, where a run has ended."""

    @property
    def warnings(self) -> list[str]:
        """The warnings of the run and of its rank changes, the latter with their step."""
        of_run = [str(text) for text in self.summary.get("warnings", [])]
        of_changes = [
            f"step {row['step']}: {text}" for row in self.changes for text in row.get("warnings", [])
        ]
        return of_run + [text for text in of_changes if text not in of_run]

    def rank_history(self) -> tuple[list[int], dict[str, list[int]]]:
        """The steps (0 = the start) and every matrix's rank after each of them; empty without
        matrices.

        The ranks at the start are those after the first change with its moves undone.
        """
        if not self.changes:
            return [0], {name: [len(values)] for name, values in self.spectra.items()}
        first = self.changes[0]
        start = {
            name: rank + first["pruned"].count(name) - first["expanded"].count(name)
            for name, rank in first["ranks"].items()
        }
        later = {name: [row["ranks"][name] for row in self.changes] for name in start}
        steps = [0, *(row["step"] for row in self.changes)]
        return steps, {name: [rank, *later[name]] for name, rank in start.items()}


def read_run(path: str | Path) -> RunData:
    """Read a run folder. Raises UserError where there is no run, RunError where a file of it is damaged.

    A device or a named pipe in the place of a log is a UserError.
    """
    folder = RunFolder(path, is_rank_zero=False)
    metrics = folder.metrics.read()
    if not metrics:
        raise UserError(
            "no run to report on: metrics.jsonl is missing or empty", str(path), "give a run folder"
        )
    changes = folder.rank_changes.read()
    _require_same_matrices(changes, folder.rank_changes.path)
    spectra = _read_object(
        folder.path / "spectra.json", {"spectra": object_of(list_of(is_number))}, "spectra"
    )
    options = read_options(folder.options)
    worth = _read_object(folder.path / "directions.json", DIRECTIONS)
    return RunData(
        name=printable(folder.path.resolve().name),
        options=options,
        summary=read_summary(folder.path),
        metrics=metrics,
        changes=changes,
        validation=folder.validation.read(),
        accuracy=folder.accuracy.read(),
        spectra={name: [math.nan if x is None else x for x in values] for name, values in spectra.items()},
        births=_births(worth, changes, options),
        worth=worth,
    )


def _births(worth: Mapping[str, Any], changes: list[Row], options: Mapping[str, Any]) -> list[NewDirection]:
    """As the run's end wrote them, or as the changes so far tell; what AdaLoRA unmasks was not born."""
    if "directions" in worth:
        keys = [known.name for known in fields(NewDirection)]
        return [NewDirection(**{key: row[key] for key in keys}) for row in worth["directions"]]
    if options.get("method") == "adalora":
        return []
    return life_stories(changes, str(options.get("new_direction", "–")))


def group_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group matrices that differ in numbers only: {"q_proj": [all layers' …q_proj], …}, in the order given.

    A kind is called by the shortest tail of its name that no other kind shares; kinds of one matrix are put
    together as `others` where there are larger ones.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    if any(len(group) > 1 for group in groups.values()):
        single = [template for template, group in groups.items() if len(group) == 1]
        alone = [name for template in single for name in groups.pop(template)]
    else:
        alone, groups = [name for group in groups.values() for name in group], {}
    named = {_short_name(template, groups): group for template, group in groups.items()}
    return named | ({OTHERS: alone} if alone else {})


def layer_label(name: str, kind: str) -> str:
    """What distinguishes a matrix from the others of its kind: its numbers, or else its whole name."""
    return name if kind == OTHERS else ".".join(_NUMBER.findall(name))


def _short_name(template: str, templates: Iterable[str]) -> str:
    parts = template.split(".")
    for length in range(1, len(parts) + 1):
        tail = ".".join(parts[-length:])
        if parts[-length] != "*" and sum(f".{other}".endswith(f".{tail}") for other in templates) == 1:
            return tail
    return template


def _require_same_matrices(changes: list[Row], path: Path) -> None:
    for row in changes:
        if row["ranks"].keys() != changes[0]["ranks"].keys():
            raise RunError(
                f"the ranks after step {row['step']} are of other matrices than those before",
                str(path),
                "restore the file",
            )


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a run folder; empty where it has none yet. Raises RunError where it is damaged."""
    return _read_object(run / "summary.json", SUMMARY)


@contextmanager
def _damage_of_the_run() -> Iterator[None]:
    """What would be a user's fault in a file of theirs is damage in one that a run wrote."""
    try:
        yield
    except UserError as error:
        raise RunError(error.fault, error.place, error.mend) from None


def read_options(path: Path) -> dict[str, Any]:
    """The options that a run wrote; none where there is no file. Raises RunError where it is damaged."""
    if not os.path.lexists(path):
        return {}
    with _damage_of_the_run():
        text = read_text(path, _MEND, limit=MIB)
        return {entry.key: entry.value() for entry in read_entries(text, str(path))}


def _read_object(path: Path, kind: Mapping[str, Check], key: str | None = None) -> dict[str, Any]:
    """A JSON object whose values are as `kind` says of those that are there; with `key`, of the object itself."""
    if not os.path.lexists(path):
        return {}
    with _damage_of_the_run():
        value = read_json_object(path, _MEND)
    there = value if key is None else {key: value}
    fault = fault_of(there, {name: check for name, check in kind.items() if name in there})
    if fault is not None:
        raise RunError(f"not written by a run: {fault}", str(path), _MEND)
    return value
