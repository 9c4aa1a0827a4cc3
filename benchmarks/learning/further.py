"""The loss of finished runs on further records: many more than a run holds out, in fp32, the same for a seed's runs.

A run logs its validation loss in its own precision, on few records: enough to watch it, too little to rank settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.held_out import ExactBase, FinishedRun
from flexlora_ds.errors import RunError, UserError
from launch.data.examples import Examples
from launch.data.hashing import seeded_order

FURTHER = "further records"
"""The figure's name."""
COUNT = "further records, number"
FILE = "further.json"
"""In the run's folder: what was measured, so that it is not measured again."""


@dataclass(frozen=True)
class Measured:
    """One run's loss on the further records of its seed."""

    records: int
    seed: int
    digest: str
    """SHA-256 of the records."""
    target_tokens: int
    loss: float


class FurtherRecords:
    """Measures runs on `count` records each; a base model is loaded once for all runs that have it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._bases: dict[tuple[str, str], ExactBase] = {}
        self._digests: dict[int, str] = {}

    def figures(self, folder: Path) -> dict[str, float]:
        """The loss and the number of records; nothing where no records are asked for.

        Raises:
            UserError: too few records are left; or as `FinishedRun`.
            RunError: another run of the seed was measured on other records.
        """
        if not self._count:
            return {}
        found = read_measured(folder)
        if found is None or found.records != self._count:
            found = self._measure(folder)
            folder.joinpath(FILE).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        if self._digests.setdefault(found.seed, found.digest) != found.digest:
            raise RunError(
                f"measured on other records than another run of seed {found.seed}",
                str(folder / FILE),
                "compare runs of the same data and remove that file",
            )
        return {FURTHER: found.loss, COUNT: found.records}

    def _measure(self, folder: Path) -> Measured:
        run = FinishedRun(folder)
        examples = further_records(run, self._count)
        batches = run.batches(examples)
        loss = self._base_of(run).loss(folder / "adapter", batches)
        return Measured(self._count, run.options.seed, examples.digest(), batches.target_tokens, loss)

    def _base_of(self, run: FinishedRun) -> ExactBase:
        key = (run.options.model, run.settled.computation.dtype)
        if key not in self._bases:
            self._bases[key] = ExactBase(run.base())
        return self._bases[key]


def further_records(run: FinishedRun, count: int) -> Examples:
    """`count` records that a run neither trained on nor held out, by a hash of (seed, index), in the file's order.

    Raises:
        UserError: fewer are left.
    """
    train, options = run.data.tokenised.train, run.options
    unseen = np.ones(len(train), dtype=bool)
    # A start from the gradient looks at the batches of the first steps, however few steps there are.
    for step in range(1, max(run.data.steps, options.init_batches) + 1):
        unseen[run.data.train.batch(step).indices] = False
    order = seeded_order(len(train), options.seed, FURTHER)
    chosen = order[unseen[order]][:count]
    if len(chosen) < count:
        raise UserError(
            f"{len(chosen):,} records are neither trained on nor held out, and {count:,} are asked for",
            "--held_out",
            "lower it, or name a larger data file",
        )
    return train.subset(np.sort(chosen))


def read_measured(folder: Path) -> Measured | None:
    """What was measured before, if anything was."""
    path = folder / FILE
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**found)
