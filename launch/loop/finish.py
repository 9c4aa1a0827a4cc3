"""The end of a run: adapter or model, summary, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flexlora_ds.terminal.command import one_line, reported_error
from launch.distributed.agreement import on_all_ranks, on_rank_zero
from launch.distributed.signals import stop_line
from launch.loop.outcome import require_success
from launch.loop.run_log import peak_memory_gb
from launch.loop.session import Session
from launch.loop.worth import directions_of, weigh
from launch.report.build import build_report
from launch.run_folder.folder import Summary, trainable_params_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finish(session: Session) -> None:
    """Write what a run leaves behind; collective.

    Raises:
        RunError: the run is no success, its adapter holds numbers that are not finite, the disk refuses, or the run
            folder is another now; on all processes alike. No adapter is written then.
    """
    process, folder = session.process, session.folder
    require_success(session)
    session.saver.save(session.done)
    on_rank_zero(process, folder.require_present)  # the adapter's folder would be made anew
    what = "model" if session.options.traits.trains_base else "adapter"
    trained = folder.model if what == "model" else folder.adapter
    spectra = on_all_ranks(process, lambda: session.method.save(trained, session.options.model))

    def write() -> None:
        folder.raise_fault()
        if spectra:
            folder.write_spectra(spectra)
        folder.write_summary(summary_of(session, "finished"))

    on_rank_zero(process, write)
    worth = weigh(session)  # last, when all that a run is for lies on disk
    session.log.progress.close()

    def write_report() -> None:
        directions = directions_of(session, worth, spectra)
        if directions is not None:
            folder.write_directions(directions)
        print(f"{what}: {trained}\n{report_line(folder.path)}", flush=True)

    on_rank_zero(process, write_report)


def report_line(run: Path) -> str:
    """Build the report; where it is, or why there is none: a run that has its adapter and summary has not failed."""
    try:
        return f"report: {build_report(run)}"
    except Exception as error:
        fault = one_line(str(reported_error(error)))
        return f"warning: no report: {fault}; python -m launch.report {run} builds it again"


def stop(session: Session, reason: str | None) -> None:
    """Leave a run that was asked to stop so that it can be continued: one complete checkpoint; collective.

    Raises:
        RunError: the disk refuses; on all processes alike.
    """
    done, progress = session.done, session.log.progress
    progress.message(stop_line(reason, done))
    if done:
        session.saver.save(done)
    progress.close()
    on_rank_zero(session.process, lambda: session.folder.write_summary(summary_of(session, "stopped")))


def summary_of(session: Session, state: str) -> Summary:
    """What summary.json says after the steps done so far."""
    log, done = session.log, session.done
    changes = session.folder.rank_changes.read() if session.folder.is_rank_zero else []
    wall = log.wall_seconds
    return Summary(
        state=state,
        steps=done,
        final_loss=log.last_loss,
        wall_seconds=wall,
        tokens=log.tokens,
        tokens_per_s=log.tokens / wall,
        peak_mem_gb=peak_memory_gb(log.device),
        trainable_params_final=session.method.trainable_parameters,
        trainable_params_mean=trainable_params_mean(log.initial_parameters, changes, done),
        rank_changes=sum(bool(c["pruned"] or c["expanded"]) for c in changes),
        warnings=log.warnings,
        match=session.match,
        frozen_params=frozen_parameters(session.engine.module),
    )


def frozen_parameters(model: PreTrainedModel) -> int:
    """The frozen weights that every token is multiplied with: all but the embeddings' and the head's."""
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(p) for module in outside if module is not None for p in module.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in left_out]
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in frozen)
