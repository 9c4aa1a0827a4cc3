"""Section `plan`: the peak memory that the dry run predicts, beside what steps of that size take."""

from __future__ import annotations

import tempfile
from typing import Any

import psutil
import torch

from benchmarks.contenders import Contender, Kind, options_of
from benchmarks.gpu.base import build_base
from benchmarks.gpu.section import Conditions, Report
from benchmarks.shapes import SHAPES
from flexlora_ds.base_model.precision import Dtype
from launch.data.examples import IGNORED, Example
from launch.distributed.process import join_processes
from launch.engine.ds_json import read_ds_json
from launch.engine.methods.flexlora import FlexLoRA
from launch.model.skeleton import read_skeleton
from launch.planning.memory_plan import MemoryPlan

RANK = 32
LENGTHS = (128, 256)
RECORDS = 16
STEPS = 3
"""Of each length."""


def run(conditions: Conditions, report: Report) -> None:
    """Micro-batches of 16 records of 128 tokens, then of 256."""
    device = join_processes().device
    process = psutil.Process()
    started = process.memory_info().rss
    base = build_base(conditions.shape, device, tiny=conditions.tiny)
    dtype: Dtype = "fp32" if device.type == "cpu" else "bf16"
    count = 4 if conditions.tiny else RECORDS
    options = options_of(conditions.shape, 2, dtype, RANK, 0.05, False, count)
    contender = Contender(Kind("FlexLoRA", FlexLoRA, packed=True), base, options, 10, device)
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        for done, length in enumerate(LENGTHS):
            planned = options.replace(model=folder, cutoff_len=length)
            skeleton = read_skeleton(folder, planned.target_modules)
            settings = read_ds_json(planned.ds).settings
            predicted = MemoryPlan(planned, dtype, 1, settings, skeleton, False).at(count).total
            measured = peak(contender, length, count, conditions.shape, device, started, done * STEPS + 1)
            place = f"{count} × {length} tokens"
            report.figure(f"{place}: predicted", predicted / 1e9, "GB")
            report.figure(f"{place}: measured", measured / 1e9, "GB")
            report.figure(f"{place}: predicted : measured", predicted / measured, aim="0.85 to 1.15")


def peak(
    contender: Contender,
    length: int,
    count: int,
    shape: str,
    device: torch.device,
    started: int,
    first: int,
) -> float:
    """Bytes at the peak of the steps from `first` on; on a CPU the resident memory beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    highest = 0
    for number in range(first, first + STEPS):
        contender.update(contender.batch_of(rows(length, count, shape), number))
        contender.method.after_step(number)
        highest = max(highest, psutil.Process().memory_info().rss - started)
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else float(highest)


def rows(length: int, count: int, shape: str) -> list[Any]:
    """Records of one length, the answer 7 tokens of it."""
    vocabulary = SHAPES[shape]["vocab_size"]
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(1, vocabulary, (count, length), generator=rng).tolist()
    return [Example(n, row, [IGNORED] * (length - 7) + row[-7:]) for n, row in enumerate(ids)]
