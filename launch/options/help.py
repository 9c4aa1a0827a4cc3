"""Help texts made from the options themselves: `--help`, and the page `docs/options.md`.

`python -m launch.options.help` prints the page.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from flexlora_ds.fields import describe_kind, show
from launch.options.train_options import TrainOptions, by_group

WIDTH = 100

USAGE = (
    "deepspeed [launcher flags] launch/train.py --ds ds_configs/zero2.json [--recipe FILE] [--KEY VALUE ...]"
)

INTRODUCTION = (
    "Fine-tune a causal language model with FlexLoRA under DeepSpeed. Every key below may stand in a recipe "
    "(a YAML file of 'key: value' lines) or on the command line as '--key value' or '--key=value'; the "
    "command line wins. Lists are separated by commas, booleans are true or false, none means not set. "
    "Without --recipe, launch/recipes/llama3_8b_r8.yaml runs. torchrun and plain python (one process) start "
    "it too."
)

EXAMPLES = (
    ("--ds ds_configs/zero2.json --dry_run true", "what would happen, on one page"),
    ("--ds ds_configs/zero2.json --recipe smollm2_135m", "a shipped recipe by its name"),
    ("--ds ds_configs/zero3.json --rank 16 --adjust_size 0", "ZeRO-3, ranks that never change"),
    ("--ds ds_configs/zero2.json --method lora", "the same run with PEFT's LoRA"),
    ("--recipe runs/NAME/options.yaml --out runs/AGAIN", "a run repeated"),
)

SHOWN_DEFAULTS = {"model": "the recipe's", "out": "runs/<recipe name>", "eval_data": "the folder of data"}


@dataclass(frozen=True)
class Entry:
    """What help texts say of one option."""

    key: str
    default: str
    values: str
    meaning: str


def entries() -> Iterator[tuple[str, list[Entry]]]:
    """The headings, each with its options in order."""
    meanings = field_lines(TrainOptions)
    for heading, specs in by_group():
        yield (
            heading.title,
            [
                Entry(
                    spec.name,
                    SHOWN_DEFAULTS.get(spec.name, show(spec.default)),
                    describe_kind(spec.kind),
                    meanings[spec.name],
                )
                for spec in specs
            ],
        )


def field_lines(options_class: type) -> dict[str, str]:
    """The documentation line under each field of a class, inherited ones included, read from the sources."""
    lines: dict[str, str] = {}
    for base in reversed(options_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        lines |= _documented(body)
    return lines


def _documented(body: ast.ClassDef) -> dict[str, str]:
    lines: dict[str, str] = {}
    for statement, follower in zip(body.body, body.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            lines[statement.target.id] = " ".join(str(follower.value.value).split())
    return lines


def help_text() -> str:
    """The whole `--help` page."""
    lines = ["usage: " + USAGE, "", *textwrap.wrap(INTRODUCTION, WIDTH)]
    for heading, group in entries():
        lines += ["", heading]
        for entry in group:
            text = f"{entry.meaning} Takes {entry.values}."
            lines += [f"  --{entry.key} (default {entry.default})"]
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
    lines += ["", "Examples (after deepspeed launch/train.py)"]
    lines += [f"  {arguments}\n      {remark}" for arguments, remark in EXAMPLES]
    return "\n".join(lines) + "\n"


def options_markdown() -> str:
    """The page `docs/options.md`: a table for each group."""
    lines = [
        "# Options of a training run",
        "",
        "Made by `python -m launch.options.help`; a test keeps it in step.",
    ]
    lines += ["", "```", USAGE, "```", "", INTRODUCTION]
    for heading, group in entries():
        lines += ["", f"## {heading}", "", "| key | default | values | meaning |", "|---|---|---|---|"]
        lines += [f"| `{e.key}` | `{e.default}` | {e.values} | {_cell(e.meaning)} |" for e in group]
    lines += ["", "## Examples", ""]
    lines += [f"* `deepspeed launch/train.py {arguments}`: {remark}" for arguments, remark in EXAMPLES]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text for a Markdown table, where `<` would begin a tag and `|` a column."""
    return text.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    print(options_markdown(), end="")
