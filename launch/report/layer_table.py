"""The ranks at the end over layers and module kinds: the paper's Figure 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from launch.report.history import History, MatrixHistory
from launch.report.run_data import OTHERS


@dataclass(frozen=True)
class Cell:
    """One matrix: its place among `History.matrices`, its name, its rank at the end, and how high that is."""

    place: int
    name: str
    rank: int
    height: float
    """0 at the lowest rank of all matrices and steps, 1 at the highest."""


@dataclass(frozen=True)
class LayerTable:
    """Rows by layer, each with one cell a kind; None where a layer has no such matrix."""

    kinds: list[str]
    rows: dict[str, list[Cell | None]]
    others: list[Cell]
    """Matrices of no layer."""
    lowest: int
    highest: int


def layer_table(history: History) -> LayerTable:
    """The table of a history's last step."""
    ranks = [rank for matrix in history.matrices for rank in matrix.ranks]
    lowest, highest = min(ranks), max(ranks)
    cells = _cells(history.matrices, lowest, max(1, highest - lowest))
    by_kind = {kind: {m.label: next(cells) for m in matrices} for kind, matrices in history.kinds.items()}
    others = list(by_kind.pop(OTHERS, {}).values())
    labels = sorted({label for column in by_kind.values() for label in column}, key=_layer_order)
    rows = {label: [column.get(label) for column in by_kind.values()] for label in labels}
    return LayerTable(list(by_kind), rows, others, lowest, highest)


def _cells(matrices: Iterable[MatrixHistory], lowest: int, spread: int) -> Iterator[Cell]:
    return (
        Cell(place, matrix.name, matrix.ranks[-1], round((matrix.ranks[-1] - lowest) / spread, 3))
        for place, matrix in enumerate(matrices)
    )


def _layer_order(label: str) -> list[int]:
    return [int(number) for number in label.split(".")]
