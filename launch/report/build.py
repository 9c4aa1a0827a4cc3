"""The report of a run: its plots and a page that holds them, made from the run folder's files alone."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from flexlora_ds.files.text import cannot_write, write_bytes_atomically
from launch.report.births import draw_births
from launch.report.page import RANKS, page
from launch.report.plots import draw_loss, draw_rank_heatmap, draw_singular_values
from launch.report.run_data import RunData, read_run


def build_report(path: str | Path, beside: Sequence[str | Path] = ()) -> Path:
    """Write `report/` into the run folder `path` and return its index.html.

    A plot is left out where there is nothing to draw: no matrices (`method: lora`), no λ yet (spectra.json),
    no direction born at a rank change.

    Args:
        path: the run folder.
        beside: folders of other runs, whose costs stand beside this run's.

    Raises:
        UserError: `path` or one of `beside` is no run folder.
        RunError: one of its files is damaged or cannot be written.
    """
    run = read_run(path)
    others = [read_run(other) for other in beside]
    folder = Path(path) / "report"
    try:
        folder.mkdir(exist_ok=True)
        plots = _draw(run, folder)
    except OSError as error:
        raise cannot_write(error, folder) from error
    index = folder / "index.html"
    text = page(run, {title: _in_few_colours(plot) for title, plot in plots.items()}, others)
    write_bytes_atomically(index, text.encode(errors="backslashreplace"))
    return index


def _draw(run: RunData, folder: Path) -> dict[str, Path]:
    plots = {"Loss": folder / "loss.png"}
    draw_loss(run, plots["Loss"])
    if any(run.rank_history()[1].values()):
        plots[RANKS] = folder / "rank_heatmap.png"
        draw_rank_heatmap(run, plots[RANKS])
    if run.spectra:
        plots["Singular values"] = folder / "singular_values.png"
        draw_singular_values(run, plots["Singular values"])
    if run.births:
        plots["New directions"] = folder / "new_directions.png"
        draw_births(run, plots["New directions"])
    return plots


def _in_few_colours(plot: Path) -> bytes:
    """A plot as a PNG of 256 colours, which is half of its size and looks alike."""
    packed = BytesIO()
    with Image.open(plot) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(packed, "png")
    return packed.getvalue()
