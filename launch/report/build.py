"""The report of a run: its plots and a page that holds them, made from the run folder's files alone."""

from __future__ import annotations

from pathlib import Path

from flexlora_ds.errors import RunError
from flexlora_ds.files.text import write_bytes_atomically
from launch.report.births import draw_births
from launch.report.page import page
from launch.report.plots import draw_loss, draw_rank_heatmap, draw_singular_values
from launch.report.run_data import read_run


def build_report(path: str | Path) -> Path:
    """Write `report/` into the run folder `path` and return its index.html.

    A plot is left out where there is nothing to draw: no matrices (`method: lora`), no λ yet (spectra.json),
    no direction born at a rank change.
    Raises UserError where `path` is no run folder, RunError where one of its files is damaged or cannot be
    written.
    """
    run = read_run(path)
    folder = Path(path) / "report"
    try:
        folder.mkdir(exist_ok=True)
        plots = {"Loss": folder / "loss.png"}
        draw_loss(run, plots["Loss"])
        if any(run.rank_history()[1].values()):
            plots["Ranks"] = folder / "rank_heatmap.png"
            draw_rank_heatmap(run, plots["Ranks"])
        if run.spectra:
            plots["Singular values"] = folder / "singular_values.png"
            draw_singular_values(run, plots["Singular values"])
        if run.births:
            plots["New directions"] = folder / "new_directions.png"
            draw_births(run, plots["New directions"])
    except OSError as error:
        raise RunError(f"cannot write: {error.strerror}", str(folder), "free some space") from error
    index = folder / "index.html"
    text = page(run, {title: plot.read_bytes() for title, plot in plots.items()})
    write_bytes_atomically(index, text.encode(errors="backslashreplace"))
    return index
