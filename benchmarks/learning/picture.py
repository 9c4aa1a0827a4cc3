"""Two halves of one picture: how runs learn from their first step, and what a market finds worth buying.

    python -m benchmarks.learning.picture --runs DIR [DIR ...] --market RUN [RUN ...] [--out FILE]

DIR holds finished runs as `benchmarks.learning` leaves them, SETTING-SEED of the group `starts`, all at one learning
rate. RUN is the folder of one run with `importance growth`. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from benchmarks.learning.figures import lines_of, losses_of
from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import read_text
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.options.train_options import TrainOptions
from launch.report.style import BLUE, INK, MUTED, ORANGE, STYLE, TEAL, make_figure

STEPS = 60
"""Of the left half: the plateau follows."""
STARTS = {
    "LoRA": ("PEFT LoRA", MUTED),
    "LoRA-GA": ("PEFT LoRA-GA", TEAL),
    "gaussian": ("FlexLoRA, Gaussian start", ORANGE),
    "gradient": ("FlexLoRA, gradient start", BLUE),
}
"""By setting, what the legend calls it, and its colour."""
_DPI = 100
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Offers:
    """What a market saw and traded at the changes of one run."""

    init: str
    steps: list[int]
    standing_out: list[int]
    """Matrices whose gain is above the noise."""
    best: list[float]
    """The best gain, in units of the loss; 0 for none."""
    traded: list[int]
    """Directions bought."""
    matrices: int


def starts_in(folders: Sequence[Path]) -> tuple[dict[str, dict[int, list[float]]], float]:
    """The training loss of the first steps by setting and seed, and the learning rate of all these runs.

    Raises:
        UserError: there is no such run, or they differ in their rates.
    """
    found: dict[str, dict[int, list[float]]] = {}
    rates: dict[float, Path] = {}
    for setting in STARTS:
        for path in (path for folder in folders for path in sorted(folder.glob(f"{setting}-*"))):
            seed = path.name.removeprefix(f"{setting}-")
            if not seed.isdigit():
                continue
            rates.setdefault(_options(path).lr, path)
            losses = losses_of(path)
            found.setdefault(setting, {})[int(seed)] = [losses[s] for s in sorted(losses) if s <= STEPS]
    place = ", ".join(str(folder) for folder in folders)
    if not found:
        raise UserError(
            "no run of the group starts", place, "run benchmarks.learning --settings starts first"
        )
    if len(rates) > 1:
        seen = ", ".join(f"{path} has lr {rate:g}" for rate, path in rates.items())
        raise UserError(f"runs at several learning rates: {seen}", place, "give the folders of one rate")
    return found, next(iter(rates))


def offers_of(run: Path) -> Offers:
    """The market of one run.

    Raises:
        UserError: it had none.
    """
    changes = [row for row in lines_of(run / "ranks.jsonl") if row.get("market")]
    if not changes:
        raise UserError("no market", str(run / "ranks.jsonl"), "give a run with importance growth")
    gains: list[Mapping[str, float]] = [row["market"]["gain"] for row in changes]
    return Offers(
        init=_options(run).init,
        steps=[row["step"] for row in changes],
        standing_out=[sum(value > 0 for value in by_matrix.values()) for by_matrix in gains],
        best=[max(by_matrix.values(), default=0.0) for by_matrix in gains],
        traded=[len(row["expanded"]) for row in changes],
        matrices=len(gains[0]),
    )


def draw(
    starts: Mapping[str, Mapping[int, list[float]]], rate: float, markets: Sequence[Offers], path: Path
) -> None:
    """Both halves, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = make_figure(9.6, 4.2)
        grid = figure.add_gridspec(2, 2, width_ratios=[1.2, 1])
        _draw_losses(figure.add_subplot(grid[:, 0]), starts, rate)
        upper = figure.add_subplot(grid[0, 1])
        lower = figure.add_subplot(grid[1, 1], sharex=upper)
        _draw_markets(upper, lower, markets)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, pil_kwargs={"optimize": True})


def _draw_losses(axes: Axes, starts: Mapping[str, Mapping[int, list[float]]], rate: float) -> None:
    """Each seed as a thin line, their mean as a thick one."""
    for setting, (label, colour) in STARTS.items():
        by_seed = list(starts.get(setting, {}).values())
        if not by_seed:
            continue
        shortest = min(len(losses) for losses in by_seed)
        steps = np.arange(1, shortest + 1)
        for losses in by_seed:
            axes.plot(steps, losses[:shortest], color=colour, linewidth=0.6, alpha=0.45)
        mean = np.mean([losses[:shortest] for losses in by_seed], axis=0)
        axes.plot(steps, mean, color=colour, linewidth=2, label=label)
    seeds = sorted({seed for by_seed in starts.values() for seed in by_seed})
    axes.set_title(f"Training loss at lr {rate:g}, seeds {', '.join(map(str, seeds))}", fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2]))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_xlim(1, STEPS)
    axes.legend(fontsize=9)


def _draw_markets(upper: Axes, lower: Axes, markets: Sequence[Offers]) -> None:
    """How many matrices stand out of the noise, and below them the best gain, run beside run."""
    apart = min(int(np.diff(m.steps).min()) if len(m.steps) > 1 else 20 for m in markets)
    width = 0.8 * apart / len(markets)
    for number, market in enumerate(markets):
        name, colour = STARTS["gaussian" if market.init == "gaussian" else "gradient"]
        label = name.removeprefix("FlexLoRA, ")
        places = np.asarray(market.steps) + width * (number - (len(markets) - 1) / 2)
        upper.bar(places, market.standing_out, width, color=colour, label=label)
        for x, height, traded in zip(places, market.standing_out, market.traded, strict=True):
            upper.text(x, height, f"{traded}", ha="center", va="bottom", fontsize=7, color=INK)
        shown = [(x, gain) for x, gain in zip(places, market.best, strict=True) if gain > 0]
        lower.plot([x for x, _ in shown], [gain for _, gain in shown], "o", color=colour)
    upper.set_title("Matrices above the noise (figures: traded)", fontsize=10)
    upper.set_ylabel(f"of {max(m.matrices for m in markets)} matrices", fontsize=9)
    upper.margins(y=0.15)
    upper.legend(fontsize=8, loc="upper center")
    upper.tick_params(labelbottom=False)
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(_PLAIN)
    lower.yaxis.set_minor_formatter(NullFormatter())
    lower.set_ylabel("best gain, in loss", fontsize=9)
    lower.set_xlabel("step of the change")
    lower.set_xticks(sorted({step for m in markets for step in m.steps}))


def _options(run: Path) -> TrainOptions:
    path = run / "options.yaml"
    return TrainOptions.from_yaml(read_text(path, "give the folder of a run"), str(path))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("python -m benchmarks.learning.picture", __doc__)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="folders that hold the runs of starts"
    )
    parser.add_argument(
        "--market", type=Path, nargs="+", required=True, help="run folders with importance growth"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images/gradient.png"))
    return parser.parse_args()


def run() -> None:
    """Read the runs and draw."""
    args = parse()
    starts, rate = starts_in(args.runs)
    draw(starts, rate, [offers_of(path) for path in args.market], args.out)


if __name__ == "__main__":
    sys.exit(exit_code_of(run))
