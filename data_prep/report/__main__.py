"""`python -m data_prep.report`: what is in a data folder. It only reads; its own files go elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.options import positive
from data_prep.prompt import TEXT_PROMPTS
from data_prep.published.files import CORPUS
from data_prep.records import iter_records
from data_prep.report.measure import CountTokens, Measures, Seen, count_words, measure, token_counter
from data_prep.report.plots import plot_all
from flexlora_ds.errors import UserError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.terminal.command import CommandParser, run_parsed
from flexlora_ds.terminal.plain_text import markdown_text

_DESCRIPTION = """\
Report on a data folder: for every train.json and test.json (and the corpus) duplicates, lengths and
the balance of the answers; for every test set, how much of it occurs in the training data. Changes no data.

  python -m data_prep.report --data data                                    lengths in words
  python -m data_prep.report --data data --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
"""
_EPILOG = """\
columns:  dup        records whose instruction and answer occurred before in the file
          conflict   records whose instruction occurred before with another answer
          exact      test records whose instruction occurs in training, character for character
          normal.    the same, ignoring case, punctuation, white space and Unicode forms
          > cutoff   training texts longer than --cutoff (training drops those; it never truncates an answer)
writes:   OUT/report.md, report.json, lengths.png, answers.png, overlaps.png
"""
_HEAD = (
    "file",
    "records",
    "dup",
    "conflict",
    "exact",
    "normal.",
    "mean",
    "p95",
    "max",
    "> cutoff",
    "answers",
)


def parser() -> CommandParser:
    """The command line of `python -m data_prep.report`."""
    p = CommandParser("python -m data_prep.report", _DESCRIPTION, _EPILOG)
    p.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="folder to report on (default: data)"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: DATA/report)")
    p.add_argument(
        "--tokenizer", metavar="T", help="hub id, folder or .gguf file; without it, words are counted"
    )
    p.add_argument(
        "--prompt", choices=TEXT_PROMPTS, default="alpaca", help="prompt style of the texts (default: alpaca)"
    )
    p.add_argument(
        "--cutoff", type=positive, default=256, metavar="N", help="cutoff_len of training (default: 256)"
    )
    return p


def measure_folder(
    folder: Path, count: CountTokens, style: str, log: Callable[[str], None] = lambda text: None
) -> dict[str, Measures]:
    """Measure every `<task>/train.json` and `<task>/test.json` of a folder, and the corpus, in that order.

    A test file's overlaps are with all training files together. Raises UserError where there are no files or
    one is malformed.
    """
    train = sorted(folder.glob("*/train.json"))
    tests = sorted(folder.glob("*/test.json"))
    corpus = [folder / CORPUS] if (folder / CORPUS).is_file() else []
    if not train and not tests and not corpus:
        raise UserError(
            "holds no <task>/train.json or test.json", str(folder), "build it with python -m data_prep"
        )
    seen = Seen()
    for path in corpus + train:  # the corpus may hold more tasks than have files here, or fewer
        log(f"reading {path}")
        seen.add(iter_records(path))
    measures = {}
    for path in sorted(train + tests) + corpus:
        log(f"measuring {path}")
        overlaps = seen if path.name == "test.json" else None
        measures[str(path.relative_to(folder))] = measure(path, count, style, overlaps)
    return measures


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The measures as a Markdown table, aligned."""
    rows = [_row(name, summary) for name, summary in summaries.items()]
    return markdown_table(_HEAD, rows, left=(0, len(_HEAD) - 1))


def _row(name: str, summary: dict[str, Any]) -> tuple[str, ...]:
    records = summary["records"]
    top = sorted(summary["answers"].items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{markdown_text(answer) or '(none)'} {100 * number / records:.0f} %" for answer, number in top[:5]
    )
    numbers = (
        f"{records:,}",
        f"{summary['duplicates']:,}",
        f"{summary['conflicts']:,}",
        *("" if summary[key] is None else f"{summary[key]:,}" for key in ("overlap", "overlap_normalised")),
        f"{summary['length_mean']:.0f}",
        f"{summary['length_p95']:,}",
        f"{summary['length_max']:,}",
        f"{summary['over_cutoff']:,}",
    )
    return (markdown_text(name), *numbers, shares + (", …" if len(top) > 5 else ""))


def _run(args: argparse.Namespace) -> None:
    if not args.data.is_dir():
        raise UserError("no such folder", str(args.data), "build it with python -m data_prep")
    count, unit = (token_counter(args.tokenizer), "tokens") if args.tokenizer else (count_words, "words")
    measures = measure_folder(
        args.data, count, args.prompt, lambda text: print(text, file=sys.stderr, flush=True)
    )
    summaries = {name: found.summary(args.cutoff) for name, found in measures.items()}
    settings = {"tokenizer": args.tokenizer, "unit": unit, "prompt": args.prompt, "cutoff": args.cutoff}
    text = table(summaries)
    out = args.out or args.data / "report"
    out.mkdir(parents=True, exist_ok=True)
    pictures = plot_all(measures, out, unit, args.cutoff)
    title = f"# {markdown_text(str(args.data))}\n\n"
    title += f"Lengths in {unit}, prompt style {args.prompt}, cutoff {args.cutoff}.\n\n"
    shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
    (out / "report.md").write_text(f"{title}{text}{shown}", encoding="utf-8", errors="backslashreplace")
    document = {"settings": settings, "files": summaries}
    written = json.dumps(document, indent=2, allow_nan=False)
    (out / "report.json").write_text(written + "\n", encoding="utf-8")
    print(f"{text}\nlengths in {unit} ({args.prompt} prompt); wrote {out}/report.md and the pictures")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, as `flexlora_ds.terminal.command.exit_code_of`."""
    return run_parsed(parser(), _run, argv, stoppable=True)


if __name__ == "__main__":
    sys.exit(main())
