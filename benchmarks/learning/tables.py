"""The comparison as Markdown: a sentence on what is shown, then a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.intervals import paired_difference
from benchmarks.learning.comparison import Comparison
from benchmarks.learning.figures import AFTERMATH, EARLY, QUARTERS
from benchmarks.learning.settings import plain_growth
from flexlora_ds.files.markdown import markdown_table

NONE = "–"
"""What was not measured."""
SPECTRA = ("violation", "spectrum error", "entropies' rank correlation")


def page(comparison: Comparison) -> str:
    """All tables that there is something for."""
    parts = (rates_table, validation_table, training_table, growth_table, spectra_table)
    return "\n".join(text for part in parts if (text := part(comparison)))


def rates_table(comparison: Comparison) -> str:
    """The last validation loss at every rate on the first seed; '' where one rate was given."""
    if len(comparison.rates) < 2:
        return ""
    seed = comparison.seeds[0]

    def cells(setting: str) -> list[str]:
        by_rate = {
            run.rate: row
            for run, row in comparison.found.items()
            if (run.setting, run.seed) == (setting, seed)
        }
        losses = [f"{by_rate[rate]['val, end']:.4f}" for rate in comparison.rates]
        return [*losses, str(comparison.chosen[setting])]

    header = ["", *(f"lr {rate}" for rate in comparison.rates), "chosen"]
    said = f"Last validation loss on seed {seed} by learning rate. The other seeds run at the lowest."
    return _section(said, header, ([setting, *cells(setting)] for setting in comparison.settings))


def validation_table(comparison: Comparison) -> str:
    """Parameters and validation loss; against the reference seed by seed, with an interval."""
    seeds, reference = comparison.seeds, comparison.reference
    header = ["", "lr", "mean parameters", "middle", "last", f"last, seed {_listed(seeds)}"]
    said = "Validation loss."
    if reference is not None:
        header += [f"minus {reference}, by seed", "mean (95 %)"]
        said = (
            f"Validation loss; the interval is a paired bootstrap over the {len(seeds)} seeds' differences."
        )
        if len(seeds) < 5:
            said += f" Of {len(seeds)} differences it is little more than their range."

    def cells(setting: str) -> list[str]:
        rows = comparison.rows(setting)
        ends = [row["val, end"] for row in rows]
        found = [f"{rows[0]['lr']:g}", f"{np.mean([row['mean parameters'] for row in rows]):,.0f}"]
        found += [_mean(rows, "val, middle"), _mean(rows, "val, end"), _each(ends, ".4f")]
        if reference is None:
            return found
        if setting == reference:
            return [*found, NONE, NONE]
        gap = paired_difference(ends, [row["val, end"] for row in comparison.rows(reference)])
        return [*found, _each(gap.each, "+.4f"), str(gap)]

    return _section(said, header, ([setting, *cells(setting)] for setting in comparison.settings))


def training_table(comparison: Comparison) -> str:
    """Early loss and quarters; the early loss as a share of the reference's, at the same rate and at its own."""
    reference = comparison.reference
    header = ["", "lr", f"steps 1–{EARLY}", *(f"quarter {k + 1}" for k in range(len(QUARTERS)))]
    header += [f"steps 1–{EARLY}, seed {_listed(comparison.seeds)}"]
    said = f"Mean training loss over the seeds, of steps 1–{EARLY} and of the run's quarters."
    if reference is not None:
        header += [f": {reference}, same lr", f": {reference}, its own lr"]
        said += f" Ratios to {reference}'s loss of steps 1–{EARLY} stand seed by seed."

    def cells(setting: str) -> list[str]:
        rows = comparison.rows(setting)
        found = [f"{rows[0]['lr']:g}", *(_mean(rows, key) for key in ("early", *QUARTERS))]
        found += [_each([row["early"] for row in rows], ".3f")]
        if reference is None:
            return found
        own = comparison.rows(reference)
        return [*found, _ratios(rows, comparison.references(setting), "early"), _ratios(rows, own, "early")]

    return _section(said, header, ([setting, *cells(setting)] for setting in comparison.settings))


def growth_table(comparison: Comparison) -> str:
    """What follows a growth, beside the growth by Gaussian directions at the same step."""
    grown = [s for s in comparison.settings if all("grown to" in row for row in comparison.rows(s))]
    if not grown:
        return ""
    keys = ("loss after first", "loss after last")
    header = ["", "grown after steps", f"{AFTERMATH} steps from the first on", ": Gaussian, by seed"]
    header += [f"{AFTERMATH} steps after the last", ": Gaussian, by seed"]
    header += ["worth together", ": Gaussian, by seed", "worth, sum over changes", ": Gaussian, by seed"]
    header += ["last validation"]

    def cells(setting: str) -> list[str]:
        rows, plain = comparison.rows(setting), plain_growth(setting)
        beside = comparison.rows(plain) if plain in comparison.settings else []
        found = [f"{rows[0]['grown from']:g}–{rows[0]['grown to']:g}"]
        for key in (*keys, "worth together", "worth one by one"):
            found += [_mean(rows, key), _ratios(rows, beside, key) if beside else NONE]
        return [*found, _mean(rows, "val, end")]

    said = f"Mean training loss of the {AFTERMATH} steps that follow a growth, and its ratio to Gaussian directions'."
    said += " Worth: the rise of the last validation loss without the directions that were grown."
    return _section(said, header, ([setting, *cells(setting)] for setting in grown))


def spectra_table(comparison: Comparison) -> str:
    """How near λ are to singular values, of the settings that have λ."""
    shown = [s for s in comparison.settings if all(SPECTRA[0] in row for row in comparison.rows(s))]
    if not shown:
        return ""
    said = "At the end: the mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖, how far λ are from the true singular values, and the rank "
    said += "correlation of the matrices' entropies by λ and by those."
    rows = ([s, *(_mean(comparison.rows(s), key) for key in SPECTRA)] for s in shown)
    return _section(said, ["", *SPECTRA], rows)


def _section(said: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"{said}\n\n{markdown_table(header, list(rows))}"


def _mean(rows: Sequence[dict[str, float]], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.4f}" if all(key in row for row in rows) else NONE


def _each(values: Iterable[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _ratios(rows: Sequence[dict[str, float]], references: Sequence[dict[str, float] | None], key: str) -> str:
    """Seed by seed; a dash where the reference did not run."""
    show: Callable[[float], str] = "{:.3f}".format
    return ", ".join(
        NONE if beside is None or key not in row or key not in beside else show(row[key] / beside[key])
        for row, beside in zip(rows, references, strict=True)
    )
