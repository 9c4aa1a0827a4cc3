"""What a report is made of: the files of a run folder, read back and arranged by module kind and layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flexlora_ds.errors import RunError, UserError
from launch.run_folder.folder import RunFolder

OTHERS = "others"
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
            name: rank + (name in first["pruned"]) - (name in first["expanded"])
            for name, rank in first["ranks"].items()
        }
        later = {name: [row["ranks"][name] for row in self.changes] for name in start}
        steps = [0, *(row["step"] for row in self.changes)]
        return steps, {name: [rank, *later[name]] for name, rank in start.items()}


def read_run(path: str | Path) -> RunData:
    """Read a run folder. Raises UserError where there is no run, RunError where a file of it is damaged."""
    folder = RunFolder(path, is_rank_zero=False)
    metrics = folder.metrics.read()
    if not metrics:
        raise UserError(
            "no run to report on: metrics.jsonl is missing or empty", str(path), "give a run folder"
        )
    options = folder.path / "options.yaml"
    return RunData(
        name=folder.path.resolve().name,
        options=yaml.safe_load(options.read_text(encoding="utf-8")) if options.exists() else {},
        summary=_read_json(folder.path / "summary.json"),
        metrics=metrics,
        changes=folder.rank_changes.read(),
        validation=folder.validation.read(),
        spectra=_read_json(folder.path / "spectra.json"),
    )


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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"not valid JSON: {error}", str(path), "remove the file") from None
    return dict(value)
