"""What holds, and how fast, on the GPU that is there: proofs and figures by one command.

    python -m benchmarks.gpu [--sections LIST] [--seconds 480] [--shape llama3-8b] [--json FILE]
                             [--model MODEL --data RECORDS]
    python -m benchmarks.gpu --tiny                      the same code with small sizes, on a CPU in minutes

Each section runs in a process of its own with a share of the time, prints its figures as soon as it has them, and
stops none of the others. A table comes last. With --json everything goes into a file, with the card and versions.
With --model and --data the section `study` trains that model by several methods; without, it says that it did not.
The exit code is 1 where a proof does not hold, a section fails, or with --compare a figure is worse than before: beyond
15 % in speed or 2 % in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.compare import baseline_of, read_figures, worse
from benchmarks.gpu.sections import SECTIONS, run_section, share_of
from flexlora_ds.errors import RunError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.terminal.command import CommandParser, exit_code_of

GRACE = 15.0
"""Seconds that a section may take beyond its share before it is ended; kept back from the time for all of them."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("python -m benchmarks.gpu", __doc__)
    names = ",".join(SECTIONS)
    parser.add_argument("--sections", default=names, help="of %(default)s; a list")
    parser.add_argument("--seconds", type=float, default=480, help="for all sections (%(default)s)")
    parser.add_argument("--shape", help="of benchmarks.shapes (llama3-8b; tiny with --tiny)")
    parser.add_argument("--model", help="for `study`: a model to train, as in launch/train.py")
    parser.add_argument("--data", help="for `study`: records to train on, as in launch/train.py")
    parser.add_argument("--proofs", default="", help="only proofs whose names contain one of these; a list")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument(
        "--compare",
        nargs="?",
        type=Path,
        const=Path(),
        help="fail where a figure is worse than in this file, or than what is kept for this card",
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or ("tiny" if args.tiny else "llama3-8b")
    args.sections = args.sections.split(",")
    args.proofs = [text for text in args.proofs.split(",") if text]
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"--sections: there is no {name!r}; there are {names}")
    if not args.run and (args.model is None) != (args.data is None):
        parser.error("--model and --data go together: `study` trains the one on the other")
    if args.compare not in (None, Path()) and not args.compare.is_file():
        parser.error(f"--compare: there is no file {args.compare}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}; make it, or name another")
    return args


def main() -> int:
    """Run the sections; the exit code, 1 where one failed, a proof does not hold or a figure became worse."""
    return exit_code_of(lambda: run(parse()))


def run(args: argparse.Namespace) -> None:
    """Run the sections one after another. Raises RunError where something failed, or became worse."""
    if args.run:
        run_section(args.run, args)
        return
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        figures = Path(scratch) / "figures.jsonl"
        figures.touch()
        for number, name in enumerate(args.sections):
            left = args.seconds - GRACE - (time.monotonic() - started)
            share = share_of(args.sections[number:], left, model=args.model is not None)
            began = time.monotonic()
            code = in_a_process(name, share, args, figures)
            print(f"[{name}] {time.monotonic() - began:.0f} s of {share:.0f}", flush=True)
            if code:
                failed.append(name)
        rows = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    print("\n" + table(rows), end="")
    not_run = [row["name"] for row in rows if row.get("unproven")]
    if not_run:
        print(f"\n{len(not_run)} proofs were not run: {'; '.join(not_run)}")
    if args.json:
        write(args, rows, failed)
    broken = [row["name"] for row in rows if row.get("proof") and not row["holds"]]
    lost = worse(rows, read_figures(baseline_for(args, rows))) if args.compare is not None else []
    print("\n".join(f"worse: {line}" for line in lost))
    if failed or broken or lost:
        raise RunError(
            f"sections that failed: {', '.join(failed) or 'none'}, proofs that do not hold: {len(broken)}, "
            f"figures that became worse: {len(lost)}"
        )


def baseline_for(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    """The file asked for; else that of the card, which `facts` names."""
    if args.compare != Path():
        return Path(args.compare)
    return baseline_of(next((row["value"] for row in rows if row["name"] == "device"), "unknown"))


def in_a_process(name: str, share: float, args: argparse.Namespace, figures: Path) -> int:
    """One section; its exit code, 124 where it outran its share. What it started ends with it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--figures", str(figures)]
    command += ["--seconds", str(share), "--shape", args.shape]
    command += ["--tiny"] if args.tiny else []
    command += ["--proofs", ",".join(args.proofs)]
    command += ["--model", args.model, "--data", args.data] if args.model else []
    environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"}
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=None if args.tiny else max(share, 0) + GRACE)
    except subprocess.TimeoutExpired:
        print(f"[{name}] ended: it outran its share", flush=True)
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per figure and proof."""
    lines = []
    for row in rows:
        if row.get("proof"):
            value, aim = ("holds" if row["holds"] else "**fails**"), "holds"
        elif row.get("unproven"):
            value, aim = f"**not run**: {row['reason']}", "holds"
        elif row.get("absent"):
            value, aim = f"not measured: {row['reason']}", ""
        else:
            number = row["value"]
            value = f"{number:,.4g}" if isinstance(number, float) else str(number)
            value, aim = f"{value} {row['unit']}".strip(), row["aim"]
        lines.append([row["section"], row["name"], value, aim])
    return markdown_table(("section", "what", "value", "aim"), lines, left=range(4))


def write(args: argparse.Namespace, rows: list[dict[str, Any]], failed: list[str]) -> None:
    """All figures, with what they hold for."""
    report = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "shape": args.shape, "tiny": args.tiny,
              "failed": failed, "figures": rows}  # fmt: skip
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def commit() -> str:
    """Of the code that ran; empty where git does not say."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
