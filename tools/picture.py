"""A small picture of a run's ranks, for a page: the heatmap of its report, in a palette.

python -m tools.picture runs/NAME docs/images/ranks.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flexlora_ds.errors import RunError, UserError
from launch.report.plots import draw_rank_heatmap
from launch.report.run_data import read_run

WIDTH = 1200
"""Pixels; a page shows no more."""
COLOURS = 255
"""The heatmap has few; a palette takes a quarter of the bytes."""


def draw_picture(run: Path, out: Path) -> None:
    """Draw the ranks of the run folder `run` into the PNG `out`.

    Raises UserError where `run` is no run folder or its ranks never changed, RunError where a file is damaged.
    """
    data = read_run(run)
    if not data.changes:
        raise UserError(f"no rank change to draw ({run}); give a run of method flexlora")
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.png"
        draw_rank_heatmap(data, full)
        with Image.open(full) as image:
            height = round(image.height * WIDTH / image.width)
            small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    out.parent.mkdir(parents=True, exist_ok=True)
    small.quantize(COLOURS).save(out, optimize=True)


def main(argv: Sequence[str]) -> int:
    """Draw what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.picture", description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("out", type=Path, help="the PNG to write")
    arguments = parser.parse_args(argv)
    try:
        draw_picture(arguments.run, arguments.out)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
