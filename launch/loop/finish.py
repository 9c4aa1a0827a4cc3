"""The end of a run: adapter, summary, report."""

from __future__ import annotations

from launch.distributed.agreement import alike, on_first
from launch.distributed.signals import stop_line
from launch.loop.run_log import peak_memory_gb
from launch.loop.session import Session
from launch.report.__main__ import build_report
from launch.run_folder.folder import Summary, trainable_params_mean


def finish(session: Session) -> None:
    """Write what a run leaves behind; collective.

    Raises:
        RunError: the disk refuses; on all processes alike.
    """
    process, folder = session.process, session.folder
    session.saver.save(session.control.done)
    spectra = alike(process, lambda: session.method.save(folder.adapter, session.options.model))
    session.journal.progress.close()

    def write() -> None:
        folder.raise_fault()
        if spectra:
            folder.write_spectra(spectra)
        folder.write_summary(summary_of(session, "finished"))
        report = build_report(folder.path)
        print(f"adapter: {folder.adapter}\nreport: {report}", flush=True)

    on_first(process, write)


def stop(session: Session, reason: str | None) -> None:
    """Leave a run that was told to stop so that it can be continued: one complete checkpoint; collective.

    Raises:
        RunError: the disk refuses; on all processes alike.
    """
    done, journal = session.control.done, session.journal
    journal.progress.message(stop_line(reason, done))
    if done:
        session.saver.save(done)
    journal.progress.close()
    on_first(session.process, lambda: session.folder.write_summary(summary_of(session, "stopped")))


def summary_of(session: Session, state: str) -> Summary:
    """What summary.json says after the steps done so far."""
    journal, done = session.journal, session.control.done
    changes = session.folder.rank_changes.read() if session.folder.writes else []
    wall = journal.wall_seconds
    return Summary(
        state=state,
        steps=done,
        final_loss=journal.last_loss,
        wall_seconds=wall,
        tokens=journal.tokens,
        tokens_per_s=journal.tokens / wall,
        peak_mem_gb=peak_memory_gb(journal.device),
        trainable_params_final=session.method.trainable_parameters,
        trainable_params_mean=trainable_params_mean(journal.initial_parameters, changes, done),
        rank_changes=sum(bool(c["pruned"] or c["expanded"]) for c in changes),
        warnings=journal.warnings,
    )
