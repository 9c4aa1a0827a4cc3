"""The dry run's page: what would be adapted, how large it is, when ranks change, what the loss sees. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flexlora_ds.schedule import adjustment_size, describe, due_steps
from flexlora_ds.terminal.counted import counted
from launch.data.batch_layout import BatchLayout
from launch.engine.methods.adalora_calendar import describe as adalora_calendar
from launch.options.train_options import TrainOptions
from launch.planning.memory_estimate import GIB, MemoryEstimate
from launch.planning.parameters import Shapes, parameters_of, rank_at_start

CALENDAR_LINES = 8
EXAMPLE_CHARACTERS = 1500
LOSS_MARKS = ("⟦", "⟧")


@dataclass(frozen=True)
class ModuleGroup:
    """Adapted layers that differ only in the numbers inside their names."""

    pattern: str
    count: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class DryRunPage:
    """What is known of a run before it begins."""

    options: TrainOptions
    shapes: Shapes
    base_parameters: int
    records: str
    """Training examples and those held out, in words; what was dropped is among the notes."""
    total_steps: int
    layout: BatchLayout
    memory: MemoryEstimate
    trained: int
    """What the optimizer holds before the first step."""
    memory_limit: float | None = None
    """Bytes that a process has, where that is known."""
    example: Sequence[tuple[str, bool]] = ()
    """One example as decoded tokens, each with whether it is in the loss."""
    notes: Sequence[str] = ()
    """Remarks to print as they are, such as how many records were dropped."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Where an adapter begins at another rank than the options'."""


def group_modules(shapes: Shapes) -> list[ModuleGroup]:
    """The adapted layers by pattern (numbers become `*`) and shape, in the order of the model."""
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for name, shape in shapes.items():
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), shape)
        counts[key] = counts.get(key, 0) + 1
    return [ModuleGroup(pattern, count, shape) for (pattern, shape), count in counts.items()]


def render_plan(plan: DryRunPage) -> str:
    """The page, ending in a line break."""
    sections = {
        "Run": _run_lines(plan),
        "Adapted layers": _module_lines(plan),
        "Memory of a process (estimate)": _memory_lines(plan),
        "Rank changes": _calendar_lines(plan),
        "One example": _example_lines(plan.example),
    }
    lines: list[str] = []
    for heading, content in sections.items():
        lines += [heading, *(f"  {line}".rstrip() for line in content), ""]
    return "\n".join(lines)


def _run_lines(plan: DryRunPage) -> Iterator[str]:
    options, layout = plan.options, plan.layout
    yield f"{options.method} on {options.model} -> {options.out}"
    yield (f"{plan.records}, of {options.data}, prompt {options.prompt}, {counted(plan.total_steps, 'step')}")
    yield (
        f"batch {layout.batch_size} = micro-batch {layout.micro_batch_size} × accumulation "
        f"{layout.accumulation_steps} × processes {layout.processes}"
    )
    yield (
        f"lr {options.lr:g}, {options.lr_schedule} after {counted(options.warmup_steps, 'step')} of warm-up; "
        f"dtype {options.dtype}; {options.ds}"
    )
    yield from plan.notes


def _module_lines(plan: DryRunPage) -> Iterator[str]:
    options = plan.options
    total = plan.trained
    if not options.traits.has_rank:
        what = "all weights" if options.traits.trains_base else f"the adapter of {options.peft_config}"
        yield f"{what}: {total:,} trainable parameters"
        return
    count = parameters_of(options.method)
    for group in group_modules(plan.shapes):
        out, into = group.shape
        of_rank = out + into + count.beside_out_and_in
        yield f"{group.count:5} × {group.pattern}  {out:,} × {into:,}, {of_rank:,} parameters a rank"
    ranks = sorted({plan.ranks.get(name, rank_at_start(options)) for name in plan.shapes})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    part = total / max(1, plan.base_parameters + total)
    yield (
        f"{len(plan.shapes)} layers, rank {shown}: {total:,} trainable parameters, {part:.2%} of "
        f"{plan.base_parameters + total:,}"
    )


def _memory_lines(plan: DryRunPage) -> Iterator[str]:
    for what, size in plan.memory.parts():
        if size:
            yield f"{size / GIB:8.2f} GiB  {what}"
    yield f"{plan.memory.total / GIB:8.2f} GiB  in all"
    if plan.memory.host:
        yield f"{plan.memory.host / GIB:8.2f} GiB  more in the host's memory (offloaded)"
    if plan.memory_limit is not None:
        verdict = "fits" if plan.memory.total <= plan.memory_limit else "DOES NOT FIT"
        yield f"{plan.memory_limit / GIB:8.2f} GiB  available: {verdict}"


def _calendar_lines(plan: DryRunPage) -> Iterator[str]:
    config = plan.options.to_flexlora_config()
    if plan.options.method == "adalora":
        yield adalora_calendar(plan.total_steps, plan.options, len(plan.shapes))
        return
    if not plan.options.traits.changes_ranks:
        yield f"none: ranks are fixed with method {plan.options.method}"
        return
    total_rank = sum(plan.ranks.get(name, plan.options.rank) for name in plan.shapes)
    yield describe(plan.total_steps, config, total_rank)
    steps = due_steps(plan.total_steps, config)
    sizes = itertools.groupby(steps, lambda step: adjustment_size(step, plan.total_steps, config))
    stretches = [(size, list(of_size)) for size, of_size in sizes]
    for size, of_size in stretches[:CALENDAR_LINES]:
        span = f"step {of_size[0]:,}" if len(of_size) == 1 else f"steps {of_size[0]:,} to {of_size[-1]:,}"
        yield f"{len(of_size):5} × at most {size}: {span}"
    if len(stretches) > CALENDAR_LINES:
        yield f"      and so on, down to {stretches[-1][0]} at step {steps[-1]:,}"


def _example_lines(example: Sequence[tuple[str, bool]]) -> Iterator[str]:
    if not example:
        yield "none given"
        return
    marked = sum(in_loss for _, in_loss in example)
    yield f"{len(example)} tokens, {marked} of them in the loss, marked {' '.join(LOSS_MARKS)}:"
    text = mark_loss(example)
    if len(text) > EXAMPLE_CHARACTERS:
        half = EXAMPLE_CHARACTERS // 2
        text = f"{text[:half]} […] {text[-half:]}"
    for line in text.splitlines():
        yield f"| {line}"


def mark_loss(example: Sequence[tuple[str, bool]]) -> str:
    """The text of decoded tokens with marks around every stretch that is in the loss."""
    pieces: list[str] = []
    inside = False
    for token, in_loss in example:
        if in_loss != inside:
            pieces.append(LOSS_MARKS[0] if in_loss else LOSS_MARKS[1])
            inside = in_loss
        pieces.append(token)
    return "".join(pieces) + (LOSS_MARKS[1] if inside else "")
