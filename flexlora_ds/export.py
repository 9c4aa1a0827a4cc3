"""Take an adapter out of a run or a checkpoint: as it is, at one uniform rank for servers, or merged into its base.

    python -m flexlora_ds.export --run RUN | --checkpoint DIR --to peft|peft-uniform|merged --out DIR

Every export is read back and compared with its source before the command reports success.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer, native_dtype
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.adapter import read_checkpoint_adapter
from flexlora_ds.command import CommandParser, run_parsed
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.folders import replacing_folder, require_new
from flexlora_ds.merging import merge
from flexlora_ds.orientation import is_transposed
from flexlora_ds.peft_format import (
    CONFIG_FILE,
    AdapterFactors,
    LoraAdapter,
    LoraMatrix,
    finite,
    max_relative_difference,
    read_peft_adapter,
    write_adapter,
    write_peft_adapter,
)
from flexlora_ds.probe import adapted_logits, logits_apart, most_apart, probe_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AdapterFactors",
    "LoraAdapter",
    "LoraMatrix",
    "export_merged",
    "export_peft",
    "export_uniform",
    "read_peft_adapter",
    "server_rank",
    "write_peft_adapter",
]

SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for `max_lora_rank`."""

_UPDATE_TOLERANCE = 1e-5  # of max |ΔW|: fp32 products of the same numbers, summed in another order


@dataclass(frozen=True)
class Check:
    """What reading an export back showed: `figure` must not exceed `limit`."""

    meaning: str
    figure: float
    limit: float
    mend: str = "the disk or memory may be faulty, export again"

    def require(self, folder: Path) -> None:
        """Raise RunError if the export is not what it was made from."""
        if not self.figure <= self.limit:
            raise RunError(f"{folder}: {self}", mend=self.mend)

    def __str__(self) -> str:
        return f"{self.meaning}: {self.figure:.2g} (limit {self.limit:.2g})"


def export_peft(adapter: LoraAdapter, out: Path) -> Check:
    """Write the adapter with each matrix at its own rank, and check it."""
    write_adapter(out, adapter)
    return _check_update(adapter, out)


def export_uniform(adapter: LoraAdapter, out: Path) -> Check:
    """Write the adapter with every matrix zero-padded to the largest rank R, alpha = R, scale folded into B.

    For servers that ignore `rank_pattern` and `alpha_pattern` (vLLM among them); ΔW is the same.
    """
    pad = nn.functional.pad
    rank = max(matrix.rank for matrix in adapter.matrices.values())
    padded = {
        name: LoraMatrix(
            pad(m.scale * m.B.float(), (0, rank - m.rank)), pad(m.A.float(), (0, 0, 0, rank - m.rank)), 1.0
        )
        for name, m in adapter.matrices.items()
    }
    write_adapter(out, replace(adapter, matrices=padded, default_rank=rank, default_alpha=float(rank)))
    return _check_update(adapter, out)


def _check_update(adapter: LoraAdapter, out: Path) -> Check:
    figure = max_relative_difference(adapter, read_peft_adapter(out))
    check = Check("the largest relative difference of an update read back", figure, _UPDATE_TOLERANCE)
    check.require(out)
    return check


def server_rank(rank: int) -> int | None:
    """The smallest rank a server can be set to allow that holds `rank`; None above the largest."""
    return next((allowed for allowed in SERVER_RANKS if allowed >= rank), None)


def export_merged(
    adapter: LoraAdapter, out: Path, base: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Check, Check]:
    """Write base + ΔW as a plain model with its tokenizer; check every tensor, and the logits against PEFT's.

    ΔW is added in fp32 and rounded once to `dtype` (default: the base's own; fp32 for a GGUF). `base`
    replaces the name recorded in the adapter, for a model that has moved. Holds two models in memory while
    it checks.

    Raises:
        UserError: the adapter does not fit the base, or changes a weight that other layers share; `out` holds
            anything, of which a model's files would become a part.
        RunError: a check found a difference; `out` is left as it was.
    """
    require_new(out, "folder")
    name = base or adapter.base_model
    dtype = dtype or native_dtype(name, adapter.revision)
    with replacing_folder(out) as fresh:
        model = load_causal_lm(name, dtype=dtype, revision=adapter.revision)
        merge(model, adapter)
        model.save_pretrained(fresh)
        del model
        load_tokenizer(name, adapter.revision).save_pretrained(fresh)
        before = load_causal_lm(name, dtype=dtype, revision=adapter.revision)
        after = load_causal_lm(fresh, dtype=dtype)
        tensors = _check_merged(before, after, adapter, dtype)
        tensors.require(out)
        logits = _check_logits(before, after, adapter, dtype)
        logits.require(out)
    return tensors, logits


@torch.no_grad()
def _check_merged(
    before: PreTrainedModel, after: PreTrainedModel, adapter: LoraAdapter, dtype: torch.dtype
) -> Check:
    """The largest error of a merged weight in units of the dtype's rounding; other tensors must be equal."""
    merged = dict(after.state_dict())
    worst = 0.0
    for key, old in before.state_dict().items():
        matrix = adapter.matrices.get(key.removesuffix(".weight"))
        new = merged.pop(key, None)
        if new is None or new.shape != old.shape:
            worst = math.inf
        elif matrix is None:
            worst = worst if torch.equal(new, old) else math.inf
        else:
            turned = is_transposed(before.get_submodule(key.removesuffix(".weight")))
            expected = old.double() + (matrix.delta().t() if turned else matrix.delta()).double()
            worst = max(
                worst, float(((new.double() - expected).abs() / _rounding(expected, old, dtype)).max())
            )
    if merged:
        worst = math.inf
    return Check(f"the largest error of a merged weight, in units of the rounding of {dtype}", worst, 1.0)


def _check_logits(
    before: PreTrainedModel, after: PreTrainedModel, adapter: LoraAdapter, dtype: torch.dtype
) -> Check:
    """The logits of the merged model beside those of the base with the adapter, which PEFT attaches to it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = adapter.folder or Path(scratch) / "adapter"
        if adapter.folder is None:
            write_adapter(folder, adapter)
        expected = adapted_logits(before, folder)
    return Check(
        "the largest difference of logits from those of the unmerged adapter, as a share of their norm",
        logits_apart(probe_logits(after), expected, dtype),
        most_apart(dtype),
        "it is more than LoRA as read here: merge it with PEFT itself",
    )


def _rounding(expected: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` at each expected value, plus that of fp32 at the two terms of the sum."""
    terms = old.abs().double() + (expected - old.double()).abs().max()
    spacing = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * terms
    return spacing.clamp_min(torch.finfo(dtype).tiny)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_parsed(_parser(), lambda options: print(_export(options)), arguments, stoppable=True)


def _parser() -> CommandParser:
    parser = CommandParser("python -m flexlora_ds.export", __doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a run folder: its adapter/ is exported")
    source.add_argument(
        "--checkpoint", type=Path, help="checkpoints/step_… of a run, checked and exported as of that step"
    )
    parser.add_argument(
        "--to",
        choices=("peft", "peft-uniform", "merged"),
        required=True,
        help="an adapter with each matrix at its own rank, one at a single rank for servers, or a whole model",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new or empty")
    parser.add_argument("--base", help="the base model, if it is not where the run found it (merged only)")
    parser.add_argument(
        "--dtype", choices=("auto", *TORCH_DTYPES), default="auto", help="of the merged model"
    )
    return parser


def _export(options: argparse.Namespace) -> str:
    """Do what the options ask; returns what to tell the user."""
    out: Path = options.out
    require_new(out, "--out")
    adapter = _read(options)
    if not finite(adapter):
        raise RunError(
            f"the adapter of {options.run or options.checkpoint} holds numbers that are not finite",
            mend="its training diverged",
        )
    ranks = sorted(matrix.rank for matrix in adapter.matrices.values())
    checks: tuple[Check, ...]
    lines = [f"wrote {out}: {len(ranks)} matrices of rank {ranks[0]} to {ranks[-1]}"]
    if options.to == "peft":
        checks = (export_peft(adapter, out),)
    elif options.to == "peft-uniform":
        checks = (export_uniform(adapter, out),)
        lines[0] = f"wrote {out}: {len(ranks)} matrices, all padded to rank {ranks[-1]}"
        allowed = server_rank(ranks[-1])
        lines.append(
            f"rank to allow in the server: --max-lora-rank {allowed}"
            if allowed
            else f"rank {ranks[-1]} is above the {SERVER_RANKS[-1]} that vLLM allows: use --to merged"
        )
    else:
        _hide_progress_bars()
        checks = export_merged(adapter, out, options.base, TORCH_DTYPES.get(options.dtype))
        lines[0] = f"wrote {out}: the base model with {len(ranks)} updated matrices"
    return "\n".join([*lines, *(f"checked: {check}" for check in checks)])


def _read(options: argparse.Namespace) -> LoraAdapter:
    if options.run is not None:
        return read_peft_adapter(_adapter_folder(options.run))
    if not options.checkpoint.is_dir():
        raise UserError(
            f"--checkpoint {options.checkpoint} is no folder", mend="give checkpoints/step_… of a run"
        )
    return read_checkpoint_adapter(options.checkpoint)


def _hide_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _adapter_folder(run: Path) -> Path:
    for folder in (run / "adapter", run):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"--run {run} holds no adapter/{CONFIG_FILE}", mend="give the folder of a run that has trained"
    )


if __name__ == "__main__":
    sys.exit(main())
