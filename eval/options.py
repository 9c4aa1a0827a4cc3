"""The command line of `python -m eval`, validated."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.prompt import PROMPTS
from data_prep.tasks import TASKS
from eval.protocols import PROTOCOLS
from flexlora_ds.errors import UserError
from flexlora_ds.terminal.command import CommandParser, boolean

DTYPES = ("auto", "fp32", "bf16", "fp16")
BACKENDS = ("transformers", "vllm")
_DESCRIPTION = """Ask a model, with or without an adapter, the commonsense test sets, and measure accuracy per task.

  python -m eval --model meta-llama/Meta-Llama-3-8B --adapter runs/llama3_8b_r8/adapter
  python -m eval --model MODEL --mode score --limit 100     a quick look, also at an untuned model
  torchrun --nproc_per_node 8 -m eval --model MODEL         on eight GPUs
"""
_EPILOG = """\
modes:    generate        greedy, read as published; generate-beam4 the same with four beams
          score           the likeliest of an item's own answers
writes:   OUT/results.json, OUT/table.md, OUT/predictions/<task>.jsonl and OUT/settings.json
Test sets come from python -m data_prep. Protocols and their traps: docs/evaluation.md
"""


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; `None` for `batch_size` and `batch_tokens` means `auto`."""

    model: str
    adapter: str | None = None
    data: Path = Path("data")
    tasks: tuple[str, ...] = tuple(TASKS)
    mode: str = "generate"
    batch_size: int | None = None
    batch_tokens: int | None = None
    dtype: str = "auto"
    prompt: str = "auto"
    attention: str = "auto"
    merge: bool = False
    limit: int | None = None
    backend: str = "transformers"
    out: Path = Path("runs/eval")
    debug: bool = False


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Raises UserError naming the option, its value and what is allowed."""
    parser = _build_parser()
    given = parser.parse_args(argv)
    if given.model is None:  # after a misspelt --model, which has a better message
        raise UserError("no model given", "--model", "give a hub id, a local folder or a .gguf file")
    return Options(
        model=given.model,
        adapter=given.adapter,
        data=Path(given.data),
        tasks=_tasks(given.tasks),
        mode=given.mode,
        batch_size=_count("batch_size", given.batch_size),
        batch_tokens=_count("batch_tokens", given.batch_tokens),
        dtype=given.dtype,
        prompt=given.prompt,
        attention=given.attention,
        merge=given.merge,
        limit=_count("limit", given.limit),
        backend=given.backend,
        out=Path(given.out) if given.out else default_out(given.model, given.adapter, given.mode),
        debug=given.debug,
    )


def default_out(model: str, adapter: str | None, mode: str) -> Path:
    """`runs/eval/<model>[+<adapter>]-<mode>`, from the last parts of their paths (`runs/x/adapter` gives `x`)."""
    parts = [Path(model).stem if model.endswith(".gguf") else Path(model).name]
    if adapter:
        path = Path(adapter)
        parts.append(path.parent.name if path.name == "adapter" and path.parent.name else path.name)
    name = re.sub(r"[^\w.+-]+", "_", "+".join(parts))
    return Path("runs/eval") / f"{name}-{mode}"


def _build_parser() -> CommandParser:
    parser = CommandParser("python -m eval", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--model", help="hub id, local folder or .gguf file")
    add("--adapter", help="an adapter in PEFT's format (folder or hub id)")
    add("--data", default="data", help="the folder with <task>/test.json (default: data)")
    add("--tasks", default="all", help=f"all, or a comma-separated list of: {', '.join(TASKS)}")
    add("--mode", default="generate", choices=tuple(PROTOCOLS), help="the protocol (default: generate)")
    add(
        "--batch_size",
        default="auto",
        help="most items in a batch (default: auto, no limit but --batch_tokens)",
    )
    add("--batch_tokens", default="auto", help="most tokens in a batch, padding included (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="auto: bf16 on a GPU (fp16 on an old one), fp32 on a CPU",
    )
    add(
        "--prompt",
        default="auto",
        choices=("auto", *PROMPTS),
        help="auto: the one recorded with the adapter, else alpaca",
    )
    add("--attention", default="auto", help="auto, sdpa, eager, flash_attention_2, …")
    add(
        "--merge",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="merge the adapter into the model first",
    )
    add("--limit", help="only the first N items of each task")
    add(
        "--backend",
        default="transformers",
        choices=BACKENDS,
        help="vllm, where it is installed: generate only",
    )
    add(
        "--out",
        help="results' folder (default: runs/eval/<model>[+<adapter>]-<mode>); an interrupted run continues",
    )
    # Some launchers pass it; the environment has the same number.
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _count(name: str, text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name} {text!r} is not a positive whole number", f"--{name}", "give 1 or more")
    return int(text)


def _tasks(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(TASKS)
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown task {name!r}", "--tasks", f"{hint}the tasks are {', '.join(TASKS)}")
    if not chosen:
        raise UserError("no task given", "--tasks", f"choose all, or some of {', '.join(TASKS)}")
    return tuple(name for name in TASKS if name in chosen)
