"""`init gradient`, and `auto`: before the first step, directions from the gradient of the first batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from flexlora_ds.gradient.start import start_from_gradient
from flexlora_ds.terminal.counted import counted
from launch.engine.first_batches import FirstBatches
from launch.loop.session import Session


def begin_directions(run: Session) -> None:
    """Replace the Gaussian P and Q of a run that begins, unless `init` says gaussian; collective.

    The gradient is the mean over `init_batches` global batches, those of the first steps, or as many as the records
    fill.
    """
    config = run.options.to_flexlora_config()
    if not run.options.traits.changes_ranks or not config.begins_from_gradient(language_model=True):
        return
    if run.options.init_adapter:
        return
    batches = FirstBatches.of(run.options, run.data, run.process.device)
    started = time.perf_counter()
    found = start_from_gradient(
        run.engine, config, lambda: batches.losses(run.engine.module, run.method.before_forward)
    )
    run.log.progress.message(
        f"directions from the gradient of {counted(batches.records, 'record')}: "
        f"{counted(len(found.sigma), 'matrix', 'matrices')}, "
        f"median σ₁ {_median_of_first(found.sigma.values()):.3g}, {time.perf_counter() - started:.1f} s"
    )
    for doubt in batches.shortage():
        # Who left the choice to us did not ask for a number of batches either.
        (run.log.progress.message if config.init == "auto" else run.log.warn)(doubt)
    if found.gaussian:
        few = ", ".join(found.gaussian[:3]) + (", …" if len(found.gaussian) > 3 else "")
        run.log.warn(
            f"no finite gradient but zero: Gaussian directions stay in "
            f"{counted(len(found.gaussian), 'matrix', 'matrices')} ({few})"
        )


def _median_of_first(spectra: Iterable[list[float]]) -> float:
    return statistics.median([sigma[0] for sigma in spectra] or [0.0])
