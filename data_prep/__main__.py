"""`python -m data_prep`: Commonsense170K and its eight test sets from the original benchmarks."""

from __future__ import annotations

import argparse
import difflib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.build import Options, build
from data_prep.options import positive
from data_prep.sources import HubSource, LocalSource, Source
from data_prep.tasks import TASKS
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import CommandParser, run_parsed

_INTERRUPTED = "no file is half-written, start again"
_DESCRIPTION = """\
Build Commonsense170K (170,420 training records) and the eight test sets from the original benchmarks,
byte for byte as LLM-Adapters published them, and report for every file whether it is identical.

  python -m data_prep --out data                      from the hub (needs a network)
  python -m data_prep --out data --source raw         from raw/<task>/<split>.jsonl, in the hub's columns
  python -m data_prep --demo --out data/demo          a small generated sample of all eight tasks, no network
"""
_EPILOG = f"""\
tasks:    {" ".join(TASKS)}
writes:   OUT/commonsense_170k.json, OUT/<task>/train.json, OUT/<task>/test.json and OUT/manifest.json
verdicts: identical  the SHA-256 of the published file
          differs    as many or more records, another hash
          partial    fewer records than published
          unpublished  a task of yours
A second run with everything in place does nothing. Exit codes: 0 done, 1 what failed, 2 what you must change.
Formats, a local folder's layout, how to add a task: docs/data.md
Overlaps, duplicates, lengths, balance: python -m data_prep.report
"""


def _task_list(text: str) -> tuple[str, ...]:
    names = tuple(TASKS) if text == "all" else tuple(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(TASKS)}"
            raise argparse.ArgumentTypeError(f"unknown task {name!r}: {hint}")
    if not names:
        raise argparse.ArgumentTypeError("names no task")
    return tuple(name for name in TASKS if name in names)  # in natural order, whatever the order of asking


def parser() -> CommandParser:
    """The command line of `python -m data_prep`."""
    p = CommandParser("python -m data_prep", _DESCRIPTION, _EPILOG)
    p.add_argument("--out", type=Path, help="folder to write (default: data; with --demo: data/demo)")
    p.add_argument("--source", default=None, help="hub, or a folder with <task>/<split>.jsonl (default: hub)")
    p.add_argument("--demo", action="store_true", help="build from generated rows: quick, without network")
    p.add_argument("--tasks", type=_task_list, default=tuple(TASKS), help="comma-separated (default: all)")
    p.add_argument("--limit", type=positive, metavar="N", help="at most N records per file (default: all)")
    p.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="with --limit: N random records instead of the first N; with --demo: what is generated (42)",
    )
    p.add_argument(
        "--strict", action="store_true", help="a missing split is an error instead of being left out"
    )
    p.add_argument("--force", action="store_true", help="rebuild, replacing what OUT holds")
    p.add_argument(
        "--published",
        type=Path,
        metavar="DIR",
        help="folder with the published <task>/*.json: where a file differs, show where",
    )
    return p


@contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    if not args.demo:
        yield HubSource(log=_log) if args.source in (None, "hub") else LocalSource(args.source)
        return
    if args.source is not None:
        raise UserError("--demo and --source exclude each other", mend="leave one out")
    from data_prep.demo.sample import write_raw

    with tempfile.TemporaryDirectory(prefix="data_prep_demo_") as folder:
        write_raw(Path(folder), 42 if args.seed is None else args.seed)
        yield LocalSource(folder, name="demo")


def table(manifest: dict[str, Any]) -> str:
    """The files of a build as text: records, bytes, verdict, remarks."""
    rows = [("file", "records", "bytes", "verdict", "")]
    for name, entry in manifest["files"].items():
        remarks = "; ".join(filter(None, (entry["detail"], entry["order"])))
        rows.append((name, f"{entry['records']:,}", f"{entry['bytes']:,}", entry["verdict"], remarks))
    w = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:<{w[0]}}  {records:>{w[1]}}  {size:>{w[2]}}  {verdict:<{w[3]}}  {remarks}".rstrip()
        for name, records, size, verdict, remarks in rows
    ]
    return "\n".join([*lines, *(f"left out: {fault}" for fault in manifest["missing"])])


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    out = args.out or Path("data/demo" if args.demo else "data")
    options = Options(args.tasks, args.limit, args.seed, args.strict, args.force, args.published)
    with _source(args) as source:
        built = build(source, out, options, log=_log)
    print(table(built.manifest))
    if built.unchanged:
        print(f"nothing to do: {built.unchanged}; --force rebuilds")
    else:
        print(f"wrote {out} in {time.monotonic() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, as `flexlora_ds.terminal.command.exit_code_of`."""
    return run_parsed(parser(), _run, argv, interrupted=_INTERRUPTED, stoppable=True)


if __name__ == "__main__":
    sys.exit(main())
