"""What dropping one layer's input costs on a CPU: the pass in C, the written mask, torch's own dropout, in turn.

    OMP_NUM_THREADS=2 python -m benchmarks.dropout [--rows 1200] [--features 576 1536] [--p 0.05] [--dtype fp32]
                                                   [--rounds 40]

Medians over the rounds, in milliseconds, after one uncounted round. The first two give the same bits, which is checked.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.dropout.apply import FusedMasking, SeededDropout
from flexlora_ds.dropout.cpu_kernel import HostKernel
from flexlora_ds.terminal.command import CommandParser, exit_code_of


def contenders(rows: int, features: int, p: float, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Ways to drop elements of the same values [rows, features]."""
    torch.manual_seed(0)
    values = torch.randn(rows, features).to(dtype)
    drop, kernel = SeededDropout(torch.randint(-(2**62), 2**62, (rows,)), 1, p), HostKernel()
    return {
        "pass in C": lambda: FusedMasking(drop, kernel).apply(values),
        "written mask": lambda: values * drop.mask(features, dtype),
        "torch's dropout": lambda: F.dropout(values, p),
    }


def medians(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of each way; they take turns."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                took[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in took.items()}


def compare() -> None:
    """Print the table."""
    parser = CommandParser("python -m benchmarks.dropout", __doc__)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--features", type=int, nargs="+", default=[576, 1536])
    parser.add_argument("--p", type=float, default=0.05)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    for features in args.features:
        ways = contenders(args.rows, features, args.p, TORCH_DTYPES[args.dtype])
        assert torch.equal(ways["pass in C"](), ways["written mask"]()), "other bits"
        found = medians(ways, args.rounds)
        cells = ", ".join(f"{name} {ms:.3f} ms ({ms / found['pass in C']:.1f})" for name, ms in found.items())
        print(f"{args.rows} x {features}, {args.dtype}, {torch.get_num_threads()} threads: {cells}")


def main() -> int:
    """Compare; the exit code."""
    return exit_code_of(compare)


if __name__ == "__main__":
    sys.exit(main())
