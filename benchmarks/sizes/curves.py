"""Loss over size: the points of each curve, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.runs import Run, Runner
from benchmarks.learning.settings import LORA
from benchmarks.sizes.whole import HeldOut
from flexlora_ds.errors import UserError
from flexlora_ds.exports.truncation import Size, truncate
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.peft_format import LoraAdapter
from flexlora_ds.peft_reading.plain import read_peft_adapter

TRUNCATED, TRAINED, PARA = (
    "truncated after training",
    "trained at this size",
    "PEFT LoRA, truncated after training",
)
CURVES = (TRUNCATED, TRAINED, PARA)


@dataclass(frozen=True)
class Point:
    """One adapter, measured."""

    curve: str
    fraction: float
    seed: int
    parameters: int
    """Σ rank · (in + out)."""
    loss: float


@dataclass(frozen=True)
class Family:
    """The runs of a curve's picture: one setting at its rate, LoRA at its own, and the sizes."""

    setting: str
    rate: str | None
    lora_rate: str | None
    fractions: Sequence[float]
    """Of the parameters at `rank`; 1 is measured besides."""
    rank: int
    min_rank: int

    def whole(self, seed: int) -> tuple[Run, Run]:
        """The runs to truncate: ours and LoRA's."""
        return Run(self.setting, seed, self.rate), Run(LORA, seed, self.lora_rate)

    def smaller(self, seed: int) -> dict[float, Run]:
        """The runs trained at each size.

        Raises:
            UserError: a fraction of the rank is no whole number.
        """
        return {f: Run(self.setting, seed, self.rate, rank=self._rank(f)) for f in self.fractions}

    def runs(self, seed: int) -> list[Run]:
        """All runs of a seed."""
        return [*self.whole(seed), *self.smaller(seed).values()]

    def _rank(self, fraction: float) -> int:
        rank = round(fraction * self.rank)
        if not 0 < fraction < 1 or abs(rank - fraction * self.rank) > 1e-9:
            raise UserError(
                f"{fraction:g} of rank {self.rank} is no smaller whole rank", "--fractions", "choose another"
            )
        return rank


def measure(family: Family, runner: Runner, seed: int) -> Iterator[Point]:
    """The points of a seed, from finished runs.

    Raises:
        RunError: a whole adapter does not give its run's own validation loss.
        UserError: as `truncate`.
    """
    for curve, run in zip((TRUNCATED, PARA), family.whole(seed), strict=True):
        held_out, whole = HeldOut(runner.folder(run)), _adapter_of(runner.folder(run))
        yield Point(curve, 1.0, seed, parameters_of(whole), held_out.whole_loss(whole))
        for fraction in family.fractions:
            size = Size(parameters=int(fraction * parameters_of(whole)), min_rank=family.min_rank)
            part = truncate(whole, size)
            yield Point(curve, fraction, seed, part.parameters[0], held_out.loss(part.adapter))
    for fraction, run in family.smaller(seed).items():
        adapter = _adapter_of(runner.folder(run))
        yield Point(TRAINED, fraction, seed, parameters_of(adapter), held_out.loss(adapter))


def parameters_of(adapter: LoraAdapter) -> int:
    """Σ rank · (in + out)."""
    return sum(m.rank * (m.B.shape[0] + m.A.shape[1]) for m in adapter.matrices.values())


def table(points: Sequence[Point]) -> str:
    """Markdown: a row for each curve, a column for each size; the mean over the seeds, and each seed's loss."""
    fractions = sorted({point.fraction for point in points}, reverse=True)
    header = ["validation loss", *(f"{fraction:.0%} of the parameters" for fraction in fractions)]
    rows = [["parameters", *(f"{_mean(_at(points, None, f), 'parameters'):,.0f}" for f in fractions)]]
    rows += [[curve, *(_cell(_at(points, curve, f)) for f in fractions)] for curve in CURVES]
    return markdown_table(header, rows)


def _adapter_of(folder: Path) -> LoraAdapter:
    return read_peft_adapter(folder / "adapter")


def _at(points: Sequence[Point], curve: str | None, fraction: float) -> list[Point]:
    return [p for p in points if curve in (None, p.curve) and p.fraction == fraction]


def _mean(points: Sequence[Point], key: str) -> float:
    return sum(float(getattr(point, key)) for point in points) / len(points)


def _cell(points: Sequence[Point]) -> str:
    if not points:
        return "–"
    each = ", ".join(f"{point.loss:.4f}" for point in points)
    return f"{_mean(points, 'loss'):.4f} ({each})"
