"""The sections of `benchmarks.gpu` in their order, and how one is run in this process."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a section's code is, and its share of the time beside the others."""

    place: str
    weight: float
    needs_model: bool = False
    """Without a model it says that it was not run, and gets no time."""


SECTIONS = {
    "facts": Entry("facts:run", 12),
    "proofs": Entry("proofs:run", 120),
    "step": Entry("step:run", 70),
    "compiled": Entry("step:run_compiled", 118),
    "change": Entry("change:run", 58),
    "plan": Entry("plan:run", 27),
    "eval": Entry("evaluation:run", 50),
    "study": Entry("study:run", 140, needs_model=True),
}
WITHOUT_MODEL = 6
"""The weight of a section that has only to say what it lacks: the start of Python."""


def share_of(names: Sequence[str], left: float, *, model: bool) -> float:
    """The first section's share of the seconds that are left for all of `names`."""
    weights = [
        WITHOUT_MODEL if SECTIONS[name].needs_model and not model else SECTIONS[name].weight for name in names
    ]
    return left * weights[0] / sum(weights)


def run_section(name: str, args: argparse.Namespace) -> None:
    """Measure one section here."""
    from benchmarks.gpu.section import Conditions, Report  # torch, which --help does not wait for

    module, _, function = SECTIONS[name].place.partition(":")
    section = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    conditions = Conditions(
        args.shape, args.seconds, args.tiny, args.model, args.data, proofs=tuple(args.proofs)
    )
    section(conditions, Report(name, args.figures))
