"""How fast the evaluation is, beside a stand-in of the reference's loop, in one run, interleaved.

    python -m benchmarks.eval_speed --model MODEL --adapter ADAPTER --data DATA [--limit 100] [--dtype fp32]
        [--reference_items 40] [--endless_items 8] [--greedy_items 400] [--merged] [--json FILE]

The threads are OMP_NUM_THREADS, the same for all. `reference` is LLM-Adapters' loop (batch 1, beam 4, up to 32 new
tokens); it answers a sample spread evenly over all items by their length, because it takes so long, our modes
answer all. `forward` is the floor of `score`: bare forward passes over the tokens that must be computed. Every
prediction of `generate` is held against transformers' greedy loop at batch 1; one that differs must have a margin
below 1e-4, else the exit code is 1. `--merged` adds our modes with the adapter merged first. Give an adapter that
answers: an untuned model generates to the limit.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.eval_contenders import ROUNDS, Contender, Key, forward, greedy, ours, reference
from eval.items import Item, TaskItems, load_questions, tokenise
from eval.model.language_model import LanguageModel
from eval.model.loading import load, resolve_prompt
from eval.model.merging import merge_adapter
from eval.options import Options, parse_options
from eval.predictions import Prediction
from eval.results import versions
from eval.run import quiet_libraries
from flexlora_ds.errors import RunError
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.files.text import write_json_atomically
from flexlora_ds.terminal.command import CommandParser, exit_code_of

GAP = 1e-4


@dataclass
class Answers:
    """What each contender answered."""

    reference: dict[Key, str | None] = field(default_factory=dict)
    endless: dict[Key, str | None] = field(default_factory=dict)
    greedy: dict[Key, str | None] = field(default_factory=dict)
    generate: dict[Key, Prediction] = field(default_factory=dict)
    score: dict[Key, Prediction] = field(default_factory=dict)


def spread_evenly(tasks: dict[str, TaskItems], count: int) -> list[Item]:
    """`count` items at even distances in the list of all, ordered by length."""
    everything = sorted((i for t in tasks.values() for i in t.items), key=lambda item: len(item.prompt))
    count = min(count, len(everything))
    return [everything[(2 * n + 1) * len(everything) // (2 * count)] for n in range(count)]


def contenders_of(
    lm: LanguageModel, tasks: dict[str, TaskItems], known: argparse.Namespace, answers: Answers
) -> list[Contender]:
    """All that run, the reference first."""
    found = [
        reference(lm, tasks, spread_evenly(tasks, known.reference_items), answers.reference, ends=True),
        reference(lm, tasks, spread_evenly(tasks, known.endless_items), answers.endless, ends=False),
        greedy(lm, tasks, spread_evenly(tasks, known.greedy_items), answers.greedy),
        ours(lm, tasks, "generate", answers.generate, "generate"),
        ours(lm, tasks, "score", answers.score, "score"),
        forward(lm, tasks),
    ]
    if known.merged:
        merged = LanguageModel(merge_adapter(copy.deepcopy(lm.model)), lm.tokenizer)
        for mode in ("generate", "score"):
            found.append(ours(merged, tasks, mode, {}, f"{mode}, merged"))
    return found


def agreement(first: Mapping[Key, str | None], second: Mapping[Key, Prediction]) -> dict[str, int]:
    """Same answers, of the items that either answered."""
    pairs = [(a, second[key].prediction) for key, a in first.items()]
    either = [(a, b) for a, b in pairs if a is not None or b is not None]
    return {"same": sum(a == b for a, b in either), "answered": len(either), "asked": len(pairs)}


def differences(answers: Answers) -> list[dict[str, Any]]:
    """Where `generate` and the greedy loop at batch 1 differ; `allowed` below the gap."""
    found = []
    for (task, index), theirs in answers.greedy.items():
        own = answers.generate[task, index]
        if own.prediction != theirs:
            allowed = own.margin is not None and own.margin < GAP
            place = {"task": task, "index": index, "greedy": theirs, "generate": own.prediction}
            found.append({**place, "margin": own.margin, "allowed": allowed})
    return found


def measures(contender: Contender, base: Contender) -> dict[str, Any]:
    """A contender's figures, in proportion to the reference's."""
    ratios = [
        (items / seconds) / (base_items / base_seconds)
        for items, seconds, base_items, base_seconds in zip(
            contender.items, contender.seconds, base.items, base.seconds, strict=True
        )
        if items and base_items
    ]
    return {
        "items": sum(contender.items),
        "seconds": sum(contender.seconds),
        "items_per_s": contender.rate,
        "times_reference": contender.rate / base.rate,
        "times_reference_median_round": statistics.median(ratios) if ratios else None,
        "cpu_s_per_item": contender.cpu_cost,
        "times_reference_by_cpu": base.cpu_cost / contender.cpu_cost,
    }


def summary_of(
    options: Options, lm: LanguageModel, contenders: Sequence[Contender], answers: Answers
) -> dict[str, Any]:
    """Everything that the run showed."""
    by_name = {c.name: measures(c, contenders[0]) for c in contenders}
    score, floor = by_name["score"], by_name["forward"]
    return {
        "model": Path(options.model).name,
        "adapter": options.adapter,
        "dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "device": lm.device.type,
        "threads": torch.get_num_threads(),
        "contenders": by_name,
        "score_of_forward_rate": score["items_per_s"] / floor["items_per_s"],
        "score_of_forward_rate_by_cpu": floor["cpu_s_per_item"] / score["cpu_s_per_item"],
        "agreement_with_reference": {
            "generate": agreement(answers.reference, answers.generate),
            "score": agreement(answers.reference, answers.score),
        },
        "agreement_with_endless_reference": {"generate": agreement(answers.endless, answers.generate)},
        "generate_against_greedy": {"asked": len(answers.greedy), "differences": differences(answers)},
        "unanswered": {
            "reference": list(answers.reference.values()).count(None),
            "generate": sum(p.prediction is None for p in answers.generate.values()),
        },
        "versions": versions(),
    }


def show(summary: Mapping[str, Any]) -> str:
    """The summary as a table and a few lines."""
    rows = [
        (
            name,
            f"{m['items']:,}",
            f"{m['seconds']:.1f}",
            f"{m['items_per_s']:.2f}",
            f"{m['times_reference']:.1f}",
            f"{m['times_reference_median_round'] or 0:.1f}",
            f"{m['times_reference_by_cpu']:.1f}",
        )
        for name, m in summary["contenders"].items()
    ]
    header = ("", "items", "s", "items/s", "x reference", "median round", "by CPU time")
    lines = [f"{summary['model']}, {summary['dtype']}, {summary['device']}, {summary['threads']} threads", ""]
    lines += [markdown_table(header, rows)]
    fraction, by_cpu = summary["score_of_forward_rate"], summary["score_of_forward_rate_by_cpu"]
    lines += [f"score, of the forward passes' rate: {fraction:.2f} (by CPU time {by_cpu:.2f})"]
    for mode, a in summary["agreement_with_reference"].items():
        lines += [f"{mode} answers as the reference: {a['same']} of {a['answered']} that either answered"]
    found = summary["generate_against_greedy"]
    apart = found["differences"]
    refused = sum(not d["allowed"] for d in apart)
    lines += [
        f"generate against the greedy loop at batch 1: {found['asked']} items, {len(apart)} differ, "
        f"{refused} of them with a margin of {GAP:g} or more",
        *(
            f"  {d['task']} {d['index']}: {d['greedy']} / {d['generate']}, margin {d['margin']}"
            for d in apart
        ),
    ]
    silent = summary["unanswered"]
    lines += [f"unanswered: reference {silent['reference']}, generate {silent['generate']}"]
    return "\n".join(lines)


def arguments() -> tuple[argparse.Namespace, Options]:
    """Our own options, and those of `python -m eval`."""
    parser = CommandParser("python -m benchmarks.eval_speed", __doc__)
    parser.add_argument("--reference_items", type=int, default=40)
    parser.add_argument("--endless_items", type=int, default=8, help="for the reference without an end token")
    parser.add_argument("--greedy_items", type=int, default=400, help="for the greedy loop at batch 1")
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("runs/eval_speed.json"))
    known, rest = parser.parse_known_args()
    return known, parse_options(rest)


def compare() -> None:
    """Print and write the figures.

    Raises:
        UserError: what the evaluation would refuse too. RunError: `generate` parts from the greedy loop.
    """
    known, options = arguments()
    quiet_libraries()
    lm = load(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    style, _ = resolve_prompt(options.prompt, options.adapter or options.model)
    tasks = {
        task: tokenise(task, load_questions(options.data, task, style, options.limit), lm.tokenizer)
        for task in options.tasks
        if (options.data / task / "test.json").is_file()
    }
    answers = Answers()
    contenders = contenders_of(lm, tasks, known, answers)
    for number in range(ROUNDS):
        for contender in contenders:
            contender.run(number)
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    summary = summary_of(options, lm, contenders, answers)
    write_json_atomically(known.json, summary)
    print(f"{show(summary)}\n{known.json}")
    wrong = [d for d in summary["generate_against_greedy"]["differences"] if not d["allowed"]]
    if wrong:
        raise RunError(
            f"{len(wrong)} predictions of generate are not the greedy loop's", f"{known.json} lists them"
        )


def main() -> int:
    """Compare; the exit code."""
    return exit_code_of(compare)


if __name__ == "__main__":
    sys.exit(main())
