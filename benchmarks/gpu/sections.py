"""The sections of `benchmarks.gpu` in their order, and how one is run in this process."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a section's code is, and its share of the time beside the others."""

    place: str
    weight: float


SECTIONS = {
    "facts": Entry("facts:run", 25),
    "proofs": Entry("proofs:run", 120),
    "step": Entry("step:run", 160),
    "compiled": Entry("step:run_compiled", 120),
    "change": Entry("change:run", 60),
    "plan": Entry("plan:run", 35),
    "eval": Entry("evaluation:run", 70),
}


def run_section(name: str, args: argparse.Namespace) -> None:
    """Measure one section here."""
    from benchmarks.gpu.section import Conditions, Report  # torch, which --help does not wait for

    module, _, function = SECTIONS[name].place.partition(":")
    section = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    conditions = Conditions(args.shape, args.seconds, args.tiny, args.model, tuple(args.proofs))
    section(conditions, Report(name, args.figures))
