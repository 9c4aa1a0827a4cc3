"""The end of a run: adapter, summary, report."""

from __future__ import annotations

import time
from typing import Any

from launch.journal import Journal, peak_memory_gb
from launch.methods import Method
from launch.options import TrainOptions
from launch.report import build_report
from launch.run_folder import Summary, trainable_params_mean


def finish(
    options: TrainOptions, engine: Any, method: Method, journal: Journal, steps: int, initial_parameters: int
) -> None:
    """Write what a run leaves behind; collective."""
    folder = journal.folder
    spectra = method.save(folder.adapter, options.model)
    journal.progress.close()
    if not folder.writes:
        return
    if spectra:
        folder.write_spectra(spectra)
    changes = folder.rank_changes.read()
    wall = time.perf_counter() - journal.started
    folder.write_summary(
        Summary(
            state="finished",
            steps=steps,
            final_loss=journal.last_loss,
            wall_seconds=wall,
            tokens=journal.tokens,
            tokens_per_s=journal.tokens / wall,
            peak_mem_gb=peak_memory_gb(journal.device),
            trainable_params_final=method.trainable_parameters,
            trainable_params_mean=trainable_params_mean(initial_parameters, changes, steps),
            rank_changes=sum(bool(c["pruned"] or c["expanded"]) for c in changes),
            warnings=journal.warnings,
        )
    )
    report = build_report(folder.path)
    print(f"adapter: {folder.adapter}\nreport: {report}", flush=True)
