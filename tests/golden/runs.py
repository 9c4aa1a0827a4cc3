"""Golden losses: forty steps of a tiny model through the training command, kept to the last digit.

Dropout is on and ranks change eleven times. So a loss that is equal to the last bit says that the order of the data,
the masks, the decisions, the new directions and the optimizer are what they were. `losses.json` holds the losses, the
validation losses and the steps at which ranks changed, for ZeRO stages 0 and 3 in one and in two processes.

The bits depend on more than our code, and `environment` in that file says on what: the versions of torch, transformers
and DeepSpeed, the vector instructions that torch uses (its CPU capability), and the processor's name, by which the
matrix products choose their kernels. Every process computes with one thread. Where all of these agree, the losses must
be equal bit for bit; where one differs, within `TOLERANCE`.

The base, its tokenizer and the records are made from seeds by the tests' helpers; a change there changes every loss.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.helpers import training
from tests.helpers.training import Place

FILE = Path(__file__).with_name("losses.json")
TOLERANCE = 1e-5
"""The largest relative difference in another environment; between AVX2 and AVX-512 it is 2e-7."""

STEPS = 40
OPTIONS: dict[str, Any] = {
    "rank": 4,
    "dropout": 0.2,
    "adjust_size": 3,
    "adjust_start": 2,
    "adjust_freeze": 4,
    "adjust_interval": 3,
    "schedule": "constant",
    "max_steps": STEPS,
    "batch_size": 8,
    "micro_batch_size": 2,
    "lr": 5e-3,
    "warmup_steps": 3,
    "val_size": 5,
    "val_every": 10,
    "log_every": 1,
    "save_every": STEPS,
    "cutoff_len": 200,
    "dtype": "fp32",
    "seed": 42,
    "init": "gaussian",
}
CASES = {
    f"stage {stage}, {processes} process{'es' if processes > 1 else ''}": (stage, processes)
    for stage in (0, 3)
    for processes in (1, 2)
}


def environment() -> dict[str, str]:
    """What the last bits of a loss depend on beside our code."""
    import torch

    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "deepspeed": version("deepspeed"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
    }


def train_case(place: Place, case: str) -> dict[str, Any]:
    """Run one case through the command in real processes; its losses as `losses.json` keeps them."""
    stage, processes = CASES[case]
    out = place.root / f"stage_{stage}_processes_{processes}"
    place.train(out, processes, stage, **OPTIONS)
    return {
        "losses": training.losses(out),
        "validation_losses": [row["loss"] for row in training.read_lines(out / "validation.jsonl")],
        "rank_change_steps": [row["step"] for row in training.read_lines(out / "ranks.jsonl")],
    }


def load_golden() -> dict[str, Any]:
    """The kept losses and the environment they were made in."""
    golden: dict[str, Any] = json.loads(FILE.read_text())
    return golden


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.processor())
