"""The comparison as Markdown: a sentence on what is shown, then a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.intervals import paired_difference
from benchmarks.learning.comparison import Comparison, criterion
from benchmarks.learning.figures import AFTERMATH, EARLY, QUARTERS
from benchmarks.learning.further import COUNT, FURTHER
from benchmarks.learning.settings import plain_growth
from flexlora_ds.files.markdown import markdown_table

NONE = "–"
"""What was not measured."""
SPECTRA = ("violation", "spectrum error", "entropies' rank correlation")


def page(comparison: Comparison) -> str:
    """All tables that there is something for."""
    parts = (rates_table, validation_table, further_table, training_table, growth_table, spectra_table)
    return "\n".join(text for part in parts if (text := part(comparison)))


def rates_table(comparison: Comparison) -> str:
    """The loss that chose the rate, at every rate on the first seed; '' where one rate was given."""
    if len(comparison.rates) < 2:
        return ""
    seed, key = comparison.seeds[0], criterion(comparison.found)

    def cells(setting: str) -> list[str]:
        by_rate = {
            run.rate: row
            for run, row in comparison.found.items()
            if (run.setting, run.seed) == (setting, seed)
        }
        losses = [f"{by_rate[rate][key]:.4f}" for rate in comparison.rates]
        return [*losses, str(comparison.chosen[setting])]

    header = ["", *(f"lr {rate}" for rate in comparison.rates), "chosen"]
    what = "Last validation loss" if key != FURTHER else "Loss on further records"
    said = f"{what} on seed {seed} by learning rate. The other seeds run at the lowest."
    return _section(said, header, ([setting, *cells(setting)] for setting in comparison.settings))


def validation_table(comparison: Comparison) -> str:
    """Parameters and validation loss; against the reference seed by seed, with an interval."""
    said, header = "Validation loss.", ["", "lr", "mean parameters", "middle", "last"]
    header += [f"last, seed {_listed(comparison.seeds)}", *_against_header(comparison)]

    def cells(setting: str) -> list[str]:
        rows = comparison.rows(setting)
        found = [f"{rows[0]['lr']:g}", f"{np.mean([row['mean parameters'] for row in rows]):,.0f}"]
        found += [_mean(rows, "val, middle"), _mean(rows, "val, end"), _by_seed(rows, "val, end")]
        return [*found, *_against(comparison, setting, "val, end")]

    rows = ([setting, *cells(setting)] for setting in comparison.settings)
    return _section(said + _of_intervals(comparison), header, rows)


def further_table(comparison: Comparison) -> str:
    """The loss on records beyond those that a run held out; '' where it was not measured."""
    if criterion(comparison.found) != FURTHER:
        return ""
    count = next(iter(comparison.found.values()))[COUNT]
    said = f"Loss on {count:g} further records of each seed, which no run trained on or held out; adapters in fp32."
    header = ["", "lr", f"held out ({count:g} records, fp32)", f"seed {_listed(comparison.seeds)}"]

    def cells(setting: str) -> list[str]:
        rows = comparison.rows(setting)
        found = [f"{rows[0]['lr']:g}", _mean(rows, FURTHER), _by_seed(rows, FURTHER)]
        return [*found, *_against(comparison, setting, FURTHER)]

    rows = ([setting, *cells(setting)] for setting in comparison.settings)
    return _section(said + _of_intervals(comparison), [*header, *_against_header(comparison)], rows)


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


def _against_header(comparison: Comparison) -> list[str]:
    reference = comparison.reference
    return [] if reference is None else [f"minus {reference}, by seed", "mean (95 %)"]


def _against(comparison: Comparison, setting: str, key: str) -> list[str]:
    """The differences to the reference, and the interval of their mean; [] without a reference."""
    if comparison.reference is None:
        return []
    if setting == comparison.reference:
        return [NONE, NONE]
    own, others = comparison.rows(setting), comparison.rows(comparison.reference)
    gap = paired_difference([row[key] for row in own], [row[key] for row in others])
    return [_each(gap.each, "+.4f"), str(gap)]


def _of_intervals(comparison: Comparison) -> str:
    """What the interval is, for the sentence above a table."""
    count = len(comparison.seeds)
    if comparison.reference is None:
        return ""
    said = f" The interval is a paired bootstrap over the {count} seeds' differences."
    return said if count >= 5 else f"{said} Of {count} differences it is little more than their range."


def _mean(rows: Sequence[dict[str, float]], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.4f}" if all(key in row for row in rows) else NONE


def _by_seed(rows: Sequence[dict[str, float]], key: str) -> str:
    return _each((row[key] for row in rows), ".4f")


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
