"""The demo: the whole path on generated data, in a few minutes on two CPU cores, without a network.

`python -m launch.demo [--out runs/demo]` generates records of all eight tasks, pre-trains a small base model on fact
sentences, evaluates it, trains an adapter whose ranks change with `deepspeed launch/train.py`, evaluates again and
compares. Each step is a command of its own, printed before it runs. A rerun replaces what an earlier one wrote.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flexlora_ds.terminal.command import CommandParser, run_parsed
from launch.demo.commands import run_command, training_command
from launch.demo.earlier import replace_earlier
from launch.demo.evaluations import evaluation_before, evaluations_after, print_conclusion

DEFAULT_OUT = Path("runs/demo")
RECIPE = Path("launch/recipes/demo.yaml")


def commands(out: Path, *, processes: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Titles and commands of the steps, in order; paths are below `out`, which is also the run folder."""
    data, base = out / "data", out / "base"
    evaluate = ["-m", "eval", "--model", str(base), "--data", str(data)]
    options = ["--model", str(base), "--data", str(data / "commonsense_170k.json"), "--out", str(out)]
    yield "data", ["-m", "data_prep", "--demo", "--out", str(data)]
    yield "base model", ["-m", "launch.demo.base_model", "--out", str(base)]
    yield evaluation_before(evaluate, out)
    yield "training", training_command(RECIPE, options, processes=processes)
    yield from evaluations_after(evaluate, out)


def run(out: Path, processes: int | None) -> None:
    """Run every step, then print what was shown and where the results are. Raises UserError, RunError."""
    started = time.monotonic()
    replace_earlier(out, "demo")
    for title, command in commands(out, processes=processes):
        run_command(title, command)
    print_conclusion(out)
    print(f"the demo took {time.monotonic() - started:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = CommandParser("python -m launch.demo", __doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="run folder (%(default)s)")
    parser.add_argument("--processes", type=int, help="training processes (all GPUs; without one: 2)")
    return run_parsed(parser, lambda arguments: run(arguments.out, arguments.processes), argv)


if __name__ == "__main__":
    sys.exit(main())
