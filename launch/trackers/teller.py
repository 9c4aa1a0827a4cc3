"""What goes from a run's logs to one tracker, and what it was told already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from launch.report.run_data import read_options, read_run, read_summary
from launch.run_folder.folder import RunFolder
from launch.trackers.known import open_tracker
from launch.trackers.log_tail import Entry, RunTail
from launch.trackers.protocol import TrackedRun
from launch.trackers.readings import HEATMAP, scalars_of
from launch.trackers.told import Told


class Teller:
    """Tells one tracker each row once, in the order of the steps.

    Args:
        name: of the tracker.
        run: the run folder.
        after: the run has just gone on after this step; None: nothing was undone.

    Raises:
        RunError, UserError: a file of the run is damaged. What the tracker's library raises is not ours.
    """

    def __init__(self, name: str, run: Path, after: int | None) -> None:
        self._run, self._folder = run, run / "tracking"
        self._file, self._heatmap = self._folder / f"{name}.json", self._folder / f"{name}-{HEATMAP}.png"
        self._told = Told.read(self._file)
        options = read_options(run / "options.yaml")
        undone = after is not None and any(last > after for last in self._told.last.values())
        described = TrackedRun(
            run.resolve().name, options, self._folder, self._told.id, after if undone else None
        )
        self._tracker = open_tracker(name, described)
        self._importance = str(options.get("importance", "score"))
        self._told.id = self._tracker.id
        if after is not None and self._tracker.takes_back:
            self._told.take_back(after)
        self._told.write(self._file)
        self._tail = RunTail(RunFolder(run, is_rank_zero=False))

    def tell(self, *, ended: bool) -> None:
        """Tell what is new; of several new rank changes, the last is drawn, with all before it in the picture."""
        entries = [entry for entry in self._tail.new(ended=ended) if self._told.lacks(entry)]
        for entry in entries:
            self._tracker.scalars(entry.step, scalars_of(entry.log, entry.row, self._importance))
            self._told.add(entry)
        changes = [entry for entry in entries if entry.log == "ranks.jsonl"]
        if changes:
            self._draw(changes[-1])
        if entries:
            self._told.write(self._file)

    def _draw(self, change: Entry) -> None:
        from launch.report.plots import draw_rank_heatmap  # matplotlib, for runs whose ranks change

        run = read_run(self._run)
        until = [row for row in run.changes if row["step"] <= change.step]
        draw_rank_heatmap(dataclasses.replace(run, changes=until), self._heatmap)
        self._tracker.image(change.step, HEATMAP, self._heatmap)

    def finish(self) -> None:
        """End the tracker's run as the summary says that the run ended."""
        self._tracker.finish(finished=read_summary(self._run).get("state") == "finished")
