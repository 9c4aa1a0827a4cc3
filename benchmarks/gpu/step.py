"""Sections `step` and `compiled`: whole training steps at two loads, ours beside others', on shared frozen weights.

Contenders take turns in blocks of steps; within a block nothing waits for the device but what a training step itself
waits for. `short` is 16 records of commonsense length, `long` as many as make some 4,096 tokens. Where nothing else
is said, a contender packs without padding, takes logits at targets only and, in `step`, Liger's kernels. `PEFT LoRA as
it comes` pads, takes transformers' own loss, no fused kernels, and DeepSpeed's own look at every gradient.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import Contender, Kind, options_of
from benchmarks.gpu.base import build_base, layer_parameters
from benchmarks.gpu.clock import Kernels, kernels_of, seconds_of
from benchmarks.gpu.facts import product_rate
from benchmarks.gpu.section import Conditions, Report
from benchmarks.kernels import count_operations, named_graph_kernels
from benchmarks.peers import AdaLoRA, FrozenBase
from benchmarks.shapes import SHAPES, records
from launch.data.batches import MicroBatch
from launch.distributed.process import join_processes
from launch.engine.methods.flexlora import FlexLoRA
from launch.engine.methods.peft_lora import PeftLoRA
from launch.model.compiled_blocks import layer_stack
from launch.model.layer_stack import LayerStack

LORA = "PEFT LoRA"
AS_IT_COMES = "PEFT LoRA as it comes"
BASE = "frozen base"
KINDS = (
    Kind(BASE, FrozenBase, packed=True),
    Kind(LORA, PeftLoRA, packed=True),
    Kind("FlexLoRA fixed ranks", FlexLoRA, packed=True),
    Kind("FlexLoRA rank changes", FlexLoRA, packed=True, changes=True),
    Kind("PEFT AdaLoRA", AdaLoRA, packed=True),
    Kind("FlexLoRA padded", FlexLoRA),
    Kind(AS_IT_COMES, PeftLoRA, full_logits=True, stock=True),
)
COMPILED_KINDS = (
    Kind(BASE, FrozenBase, packed=True),
    Kind("frozen base compiled", FrozenBase, packed=True, compiled=True),
    Kind(LORA, PeftLoRA, packed=True),
    Kind("FlexLoRA compiled", FlexLoRA, packed=True, compiled=True),
    Kind("FlexLoRA compiled, rank changes", FlexLoRA, packed=True, changes=True, compiled=True),
    Kind("FlexLoRA replayed", FlexLoRA, packed=True, compiled=True, replayed=True),
)
ONLY_SHORT = ("PEFT AdaLoRA", "FlexLoRA padded", "FlexLoRA replayed", AS_IT_COMES)
UNPROFILED = ("FlexLoRA rank changes", "FlexLoRA padded", "PEFT AdaLoRA", "FlexLoRA compiled, rank changes")
CHANGE_EVERY = 8
"""Steps: one of the timed ones ends in a rank change, where ranks change."""
WARM_UP, BLOCK, ROUNDS = 3, 3, 4
LENGTHS = 20
"""Further steps before the timed ones, in which layers that are replayed meet most of the load's lengths."""
SETTINGS = ((32, "short"), (32, "long"), (8, "short"), (8, "long"))
LOADS = {"short": 16, "long": 42}
"""Records of a step."""


@dataclass
class Measured:
    """One contender at one load."""

    contender: Contender
    static: float
    """Bytes of its own state, the shared base left out."""
    steps: int = 0
    blocks: list[float] = field(default_factory=list)
    """Seconds per step."""
    tokens: list[int] = field(default_factory=list)
    """Tokens per step, padding not counted."""
    peak: float = 0.0
    """Bytes that a step needs beyond what was there before it, recordings left out."""

    @property
    def stack(self) -> LayerStack | None:
        """What replays its layers, if that is what it does."""
        return layer_stack(self.contender.engine.module) if self.contender.kind.replayed else None

    @property
    def recorded(self) -> float:
        """Bytes that recordings hold."""
        recorder = None if self.stack is None else self.stack.recorder
        return 0.0 if recorder is None else float(recorder.taken)


def run(conditions: Conditions, report: Report) -> None:
    """Section `step`: with Liger's kernels where they are installed."""
    liger = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()
    kinds = [replace(kind, liger=liger and kind.name != AS_IT_COMES) for kind in KINDS]
    at_each_load(conditions, report, kinds)


def run_compiled(conditions: Conditions, report: Report) -> None:
    """Section `compiled`: whole decoder layers compiled, without Liger's kernels, which would be in the way."""
    # A compiled layer takes packed examples on a GPU alone.
    packed = conditions.device.type == "cuda"
    with named_graph_kernels():
        at_each_load(conditions, report, [replace(kind, packed=packed) for kind in COMPILED_KINDS])


def at_each_load(conditions: Conditions, report: Report, kinds: list[Kind]) -> None:
    """Rank 32 at both loads, then rank 8 at both, as far as the time goes."""
    device = join_processes().device
    ceiling = product_rate(device, *((256,) * 3 if conditions.tiny else (8192,) * 3))
    report.figure("ceiling", ceiling / 1e12, "TFLOP/s, bf16 product of 8192³")
    base = build_base(conditions.shape, device, tiny=conditions.tiny)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    report.figure("frozen base", weights / 1e9, "GB")
    report.figure("ready after", time.monotonic() - conditions.started, "s of the section")
    for rank, load in SETTINGS[:1] if conditions.tiny else SETTINGS:
        if conditions.left < 20:
            report.absent(f"rank {rank}, {load}", "no time left")
            continue
        with report.attempt(f"rank {rank}, {load}"):
            measure(conditions, report, base, device, kinds, rank, load, ceiling, weights)


def measure(
    conditions: Conditions,
    report: Report,
    base: Any,
    device: torch.device,
    kinds: list[Kind],
    rank: int,
    load: str,
    ceiling: float,
    weights: float,
) -> None:
    """All contenders at one rank and load."""
    count = 4 if conditions.tiny else LOADS[load]
    dtype = "fp32" if device.type == "cpu" else "bf16"
    options = options_of(conditions.shape, 2, dtype, rank, 0.05, False, count)
    place = f"rank {rank}, {load}"
    rows: list[Measured] = []
    for kind in kinds:
        if load == "long" and kind.name in ONLY_SHORT:
            continue
        with report.attempt(f"{place}: {kind.name}"):
            began = time.monotonic()
            row = start(kind, base, options, device)
            built = time.monotonic() - began
            warm_up(row, conditions, count, device)
            report.figure(
                f"{place}: {kind.name}: first steps", time.monotonic() - began - built, "s", built=built
            )
            rows.append(row)
    graphs = compiled_graphs()
    for number in range(2 if conditions.tiny else ROUNDS):
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            advance(row, conditions, count, device)
    show(report, place, rows, ceiling, weights, conditions)
    if graphs:
        report.figure(f"{place}: graphs compiled", graphs)
        report.figure(f"{place}: graphs compiled in the timed steps", compiled_graphs() - graphs, aim="0")
    for row in rows:
        if (stack := row.stack) is not None:
            name = f"{place}: {row.contender.kind.name}"
            report.figure(f"{name}: replayed", stack.replays / row.steps, "of all steps")
            report.figure(f"{name}: recordings", stack.recordings, seconds=stack.recording_seconds)
            report.figure(f"{name}: memory of recordings", row.recorded / 1e9, "GB")
        if row.contender.kind.name not in UNPROFILED and conditions.left > 15:
            with report.attempt(f"{place}: kernels of {row.contender.kind.name}"):
                profile_step(report, place, row, conditions, count, device)
    while rows:
        rows.pop().contender.engine.destroy()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compiled_graphs() -> int:
    """How many graphs torch's compiler has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def start(kind: Kind, base: Any, options: Any, device: torch.device) -> Measured:
    """Build a contender."""
    before = allocated(device)
    contender = Contender(kind, base, options, CHANGE_EVERY, device)
    return Measured(contender, allocated(device) - before)


def allocated(device: torch.device) -> float:
    """Bytes that torch holds on a GPU."""
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0.0


def batches(row: Measured, conditions: Conditions, count: int, steps: int) -> list[MicroBatch]:
    """The next batches of a contender, made beforehand: a training run makes them beside the steps."""
    vocabulary = SHAPES[conditions.shape]["vocab_size"]
    numbers = range(row.steps + 1, row.steps + steps + 1)
    made = [
        row.contender.batch_of(records(count, vocabulary, train_on_inputs=False, seed=n), n) for n in numbers
    ]
    return [batch.pinned() for batch in made] if row.contender.device.type == "cuda" else made


def train(row: Measured, todo: list[MicroBatch]) -> None:
    """A step on each batch."""
    for batch in todo:
        row.steps += 1
        row.contender.update(batch)
        row.contender.method.after_step(row.steps)


def warm_up(row: Measured, conditions: Conditions, count: int, device: torch.device) -> None:
    """The first steps; the last of them says what a step needs at its peak."""
    more = LENGTHS if row.contender.kind.replayed and not conditions.tiny else 0
    train(row, batches(row, conditions, count, WARM_UP - 1 + more))
    (last,) = batches(row, conditions, count, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = allocated(device)
    train(row, [last])
    row.peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0.0


def advance(row: Measured, conditions: Conditions, count: int, device: torch.device) -> None:
    """One timed block."""
    steps = 1 if conditions.tiny else BLOCK
    todo = batches(row, conditions, count, steps)
    row.blocks.append(seconds_of(lambda: train(row, todo), device) / steps)
    row.tokens.append(round(statistics.mean(batch.tokens for batch in todo)))


def show(
    report: Report, place: str, rows: list[Measured], ceiling: float, weights: float, conditions: Conditions
) -> None:
    """Seconds, tokens, use of the card, memory, and ratios to LoRA and the frozen base in the same round."""
    by_name = {row.contender.kind.name: row for row in rows}
    aims = {LORA: "0.90", BASE: "1.10"} if "short" in place else {}
    for name, row in by_name.items():
        seconds = statistics.median(row.blocks)
        rate = sum(row.tokens) / sum(row.blocks)
        used = 4 * layer_parameters(conditions.shape) * rate / ceiling
        report.figure(f"{place}: {name}: step", seconds * 1e3, "ms", blocks=row.blocks, tokens=row.tokens)
        report.figure(f"{place}: {name}: speed", rate, "tokens/s", aim="14,000" if "long" in place else "")
        report.figure(
            f"{place}: {name}: MFU of the measured ceiling", used, aim="0.45" if "long" in place else ""
        )
        peak = weights + row.static + row.peak + row.recorded
        report.figure(f"{place}: {name}: peak", peak / 1e9, "GB", aim="38.0")
        for other in (LORA, BASE, AS_IT_COMES):
            if other in by_name and other != name:
                pairs = zip(row.blocks, by_name[other].blocks, strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                aim = aims.get(other, "") if name.startswith("FlexLoRA") else ""
                report.figure(f"{place}: {name} : {other}", ratio, aim=aim)


def profile_step(
    report: Report, place: str, row: Measured, conditions: Conditions, count: int, device: torch.device
) -> None:
    """Kernels of one step, and the share of the step's time in which one runs."""
    name = row.contender.kind.name
    work = partial(train, row, batches(row, conditions, count, 1))
    if device.type != "cuda":
        report.figure(f"{place}: {name}: operations", count_operations(work))
        return
    found: Kernels = kernels_of(work, device)
    busy = found.busy / statistics.median(row.blocks)
    report.figure(f"{place}: {name}: kernels", found.count, longest=found.longest[:25], host=found.host[:40])
    report.figure(f"{place}: {name}: GPU busy", busy, "of the step", aim="0.95" if "short" in place else "")
