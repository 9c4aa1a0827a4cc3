"""Whole training steps through DeepSpeed, ours beside others', interleaved in one process.

    python -m benchmarks.training [--shape smollm2|llama3-8b-layer|llama3-8b|tiny] [--stage 0..3] [--device cpu|cuda]
                                  [--rank 32] [--batch_size 8] [--rounds 11] [--dropouts 0,0.05]
                                  [--train_on_inputs false,true] [--change_every 5] [--json FILE] [--chart FILE]

In every round each contender takes one step on the same records, in an order that rotates. All have the same frozen
weights (shared), DeepSpeed configuration, precision, dropout, loss tokens and trainable parameters (ours r more per
matrix: λ). A step is everything from the records to the end of what follows the update. Ratios are medians over the
rounds of contender / PEFT LoRA in the same round, with 95 % intervals by the bootstrap. `--memory true` adds each
contender's peak memory, measured in a process of its own: on a GPU what torch allocated at most, on a CPU how far the
resident memory rose above what it was before the model was built. `kernels` counts those of one more step: what a GPU
starts, on a CPU torch's operations that compute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.contenders import KINDS, LORA, Contender, options_of
from benchmarks.intervals import paired_ratio
from benchmarks.kernels import count_kernels
from benchmarks.shapes import SHAPES, random_model, records
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.files.markdown import markdown_table
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.distributed.process import join_processes
from launch.model.packed_attention import register_packed_sdpa

WARM_UP = 2  # uncounted rounds
MEMORY_STEPS = 3
HEAD = ("", "s per step", "tokens/s", "time : LoRA (95 %)", "CPU time : LoRA (95 %)", "peak memory", "kernels",
        "after update", "input share")  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line; lists are comma-separated."""
    parser = CommandParser("python -m benchmarks.training", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--stage", type=int, choices=range(4), default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=TORCH_DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dropouts", default="0,0.05")
    parser.add_argument("--train_on_inputs", default="false,true")
    parser.add_argument("--change_every", type=int, default=5)
    parser.add_argument(
        "--contenders", default="all", help="names, comma-separated; PEFT LoRA is always there"
    )
    parser.add_argument("--memory", choices=("true", "false"), default="true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path, help="a PNG of the ratios")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = [kind.name for kind in KINDS]
    unknown = [name for name in args.contenders.split(",") if name not in (*known, "all")]
    if unknown:
        parser.error(f"--contenders: no {unknown[0]!r}; there are {', '.join(known)}")
    return args


def main() -> int:
    """Compare; the exit code."""
    return exit_code_of(compare)


def compare() -> None:
    """Measure every setting, print its table, write what was asked for."""
    args = parse()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = join_processes().device
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if args.memory_of:
        print(json.dumps(peak_memory(args, device)))
        return
    base = build(args, device)
    found = []
    for inputs, dropout in itertools.product(args.train_on_inputs.split(","), args.dropouts.split(",")):
        setting = {"train_on_inputs": inputs == "true", "dropout": float(dropout)}
        rows = measure(args, base, device, **setting)
        if args.memory == "true":
            add_memory(args, rows, inputs, dropout)
        found.append({**setting, "contenders": rows})
        print(table(found[-1], args, device), end="", flush=True)
    report = {
        "command": sys.argv[1:],
        "machine": machine(device),
        "arguments": plain(args),
        "settings": found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        draw(found, args)


def build(args: argparse.Namespace, device: torch.device) -> Any:
    """The frozen base, with an attention that serves padded and packed batches alike."""
    return random_model(args.shape, TORCH_DTYPES[args.dtype], register_packed_sdpa()).to(device)


def chosen(args: argparse.Namespace) -> list[Any]:
    """The contenders asked for; PEFT LoRA, which ratios refer to, among them."""
    return [
        kind for kind in KINDS if args.contenders == "all" or kind.name in (*args.contenders.split(","), LORA)
    ]


def measure(
    args: argparse.Namespace, base: Any, device: torch.device, *, dropout: float, train_on_inputs: bool
) -> list[dict[str, Any]]:
    """Interleaved rounds of one setting; what each contender took."""
    options = options_of(
        args.shape, args.stage, args.dtype, args.rank, dropout, train_on_inputs, args.batch_size
    )
    contenders = [Contender(kind, base, options, args.change_every, device) for kind in chosen(args)]
    vocabulary = SHAPES[args.shape]["vocab_size"]
    for number in range(1, WARM_UP + args.rounds + 1):
        rows = records(args.batch_size, vocabulary, train_on_inputs=train_on_inputs, seed=number)
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            contender.step(number, rows, counted=number > WARM_UP)
    lora = next(c for c in contenders if c.kind.name == LORA)
    summaries = [summary(contender, lora) for contender in contenders]
    for contender, row in zip(contenders, summaries, strict=True):
        step = partial(contender.step, WARM_UP + args.rounds + 1, rows, counted=False)
        row["kernels"] = count_kernels(step, device)
    for contender in contenders:
        contender.engine.destroy()
    return summaries


def summary(contender: Contender, lora: Contender) -> dict[str, Any]:
    """Medians, ratios and everything that was timed."""
    took, reference = contender.took, lora.took
    return {
        "name": contender.kind.name,
        "trainable_parameters": contender.trainable,
        "seconds": sorted(took.seconds)[len(took.seconds) // 2],
        "tokens_per_s": sum(took.tokens) / sum(took.seconds),
        "time_ratio": paired_ratio(took.seconds, reference.seconds).to_dict(),
        "cpu_time_ratio": paired_ratio(took.cpu_seconds, reference.cpu_seconds).to_dict(),
        "input_share": sum(took.input) / sum(took.seconds),
        "after_update_share": sum(took.after_update) / sum(took.seconds),
        "all": vars(took),
    }


def add_memory(args: argparse.Namespace, rows: list[dict[str, Any]], inputs: str, dropout: str) -> None:
    """Ask a process of its own for each contender's peak."""
    for row in rows:
        command = [
            sys.executable,
            "-m",
            "benchmarks.training",
            "--memory_of",
            row["name"],
            "--memory",
            "false",
        ]
        for key in ("shape", "stage", "dtype", "rank", "batch_size", "change_every"):
            command += [f"--{key}", str(getattr(args, key))]
        command += ["--train_on_inputs", inputs, "--dropouts", dropout]
        command += ["--device", args.device] if args.device else []
        environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        row["peak_bytes"] = json.loads(done.stdout.strip().splitlines()[-1])
    reference = next(row["peak_bytes"] for row in rows if row["name"] == LORA)
    for row in rows:
        row["memory_ratio"] = row["peak_bytes"] / reference


def peak_memory(args: argparse.Namespace, device: torch.device) -> int:
    """Bytes at the peak of a few steps of one contender."""
    process = psutil.Process()
    before = process.memory_info().rss
    kind = next(kind for kind in KINDS if kind.name == args.memory_of)
    inputs = args.train_on_inputs == "true"
    options = options_of(
        args.shape, args.stage, args.dtype, args.rank, float(args.dropouts), inputs, args.batch_size
    )
    contender = Contender(kind, build(args, device), options, args.change_every, device)
    for number in range(1, MEMORY_STEPS + 1):
        rows = records(args.batch_size, SHAPES[args.shape]["vocab_size"], train_on_inputs=inputs, seed=number)
        contender.step(number, rows, counted=False)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return int(peak - before)


def table(setting: dict[str, Any], args: argparse.Namespace, device: torch.device) -> str:
    """Markdown."""
    lines = [
        f"\n{args.shape}, rank {args.rank}, batch {args.batch_size}, ZeRO-{args.stage}, {args.dtype}, {device}, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds, dropout {setting['dropout']:g}, "
        f"train_on_inputs {str(setting['train_on_inputs']).lower()}",
        "",
    ]
    rows = []
    for row in setting["contenders"]:
        memory = (
            f"{row['peak_bytes'] / 2**20:,.0f} MiB, {row['memory_ratio']:.3f}" if "peak_bytes" in row else ""
        )
        ratios = (row["time_ratio"], row["cpu_time_ratio"])
        cells = [f"{r['median']:.3f} ({r['low']:.3f}–{r['high']:.3f})" for r in ratios]
        rows.append(
            [
                row["name"],
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_s']:,.0f}",
                *cells,
                memory,
                f"{row['kernels']:,}",
                f"{row['after_update_share']:.1%}",
                f"{row['input_share']:.3%}",
            ]
        )
    lines.append(markdown_table(HEAD, rows))
    return "\n".join(lines) + "\n".join(changes_line(setting["contenders"]))


def changes_line(rows: list[dict[str, Any]]) -> list[str]:
    """What a rank change takes, in median steps of the same contender."""
    lines = []
    for row in rows:
        changes = sorted(row["all"]["changes"])
        if changes:
            median = changes[len(changes) // 2]
            lines.append(
                f"\nA rank change: {median:.3f} s, {median / row['seconds']:.2f} of a step (of {len(changes)})."
            )
    return lines


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def draw(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Bars of the time ratios, one panel a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        rows = setting["contenders"][::-1]
        ratios = [row["time_ratio"] for row in rows]
        middle = [r["median"] for r in ratios]
        error = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        colours = ["#2a6f97" if row["name"].startswith("FlexLoRA") else "#a9a9a9" for row in rows]
        axes.barh([row["name"] for row in rows], middle, xerr=error, color=colours)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("time per step : PEFT LoRA")
        axes.set_title(
            f"dropout {setting['dropout']:g}, train_on_inputs {str(setting['train_on_inputs']).lower()}"
        )
    figure.suptitle(f"{args.shape}, rank {args.rank}, ZeRO-{args.stage}")
    figure.savefig(args.chart, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
