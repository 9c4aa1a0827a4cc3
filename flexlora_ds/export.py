"""Take an adapter out of a run or a checkpoint: as it is, at one rank for servers or llama.cpp, or in its base.

    python -m flexlora_ds.export --run RUN | --checkpoint DIR --to peft|peft-uniform|gguf-lora|merged --out DIR
                                 [--rank_budget N | --parameters N | --energy SHARE]

Every export is read back and compared with its source, its logits on the base too, before it appears under --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexlora_ds.base_model.fingerprint import other_base_doubt
from flexlora_ds.base_model.loading import load_skeleton
from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.checkpoint.adapter import read_checkpoint_adapter
from flexlora_ds.errors import UserError
from flexlora_ds.exports.checks import Check, check_adapter, check_reading, check_update
from flexlora_ds.exports.gguf_lora import ADAPTER_FILE, check_gguf_lora, write_gguf_lora
from flexlora_ds.exports.merged_model import export_merged
from flexlora_ds.exports.padding import SERVER_RANKS, padded, server_rank
from flexlora_ds.exports.truncation import Size, Truncated, truncate
from flexlora_ds.files.folders import replacing_folder, require_new
from flexlora_ds.peft_format import (
    ADAPTER_FILES,
    CONFIG_FILE,
    AdapterFactors,
    LoraAdapter,
    LoraMatrix,
    require_finite_adapter,
    write_adapter,
    write_peft_adapter,
)
from flexlora_ds.peft_reading.plain import read_peft_adapter
from flexlora_ds.terminal.command import CommandParser, one_line, run_parsed
from flexlora_ds.terminal.counted import counted

__all__ = [
    "AdapterFactors",
    "LoraAdapter",
    "LoraMatrix",
    "export_gguf_lora",
    "export_merged",
    "export_peft",
    "export_uniform",
    "read_peft_adapter",
    "server_rank",
    "write_peft_adapter",
]

_LONGEST_COUNT = 18
"""Digits of a number of directions or parameters."""


def export_peft(adapter: LoraAdapter, out: Path, base: str | None = None) -> tuple[Check, ...]:
    """Write the adapter with each matrix at its own rank; check its tensors, and its logits on the base.

    `base` replaces the name recorded in the adapter, for a model that has moved.

    Raises:
        UserError: the adapter does not fit its base, or that is not there.
        RunError: a check found a difference; `out` is left as it was.
    """
    return _export_adapter(adapter, adapter, out, base)


def export_uniform(adapter: LoraAdapter, out: Path, base: str | None = None) -> tuple[Check, ...]:
    """As `export_peft`, with every matrix zero-padded to the largest rank R, alpha = R, scale folded into B.

    For servers that ignore `rank_pattern` and `alpha_pattern` (SGLang, vLLM before 0.33); ΔW is the same.
    """
    return _export_adapter(adapter, padded(adapter), out, base)


def _export_adapter(
    adapter: LoraAdapter, written: LoraAdapter, out: Path, base: str | None
) -> tuple[Check, ...]:
    with replacing_folder(out, owned=ADAPTER_FILES) as fresh:
        write_adapter(fresh, written)
        checks = check_update(adapter, fresh), check_adapter(adapter, fresh, base or adapter.base_model)
        for check in checks:
            check.require(out)
    return checks


def export_gguf_lora(adapter: LoraAdapter, out: Path, base: str | None = None) -> tuple[Check, ...]:
    """Write `adapter.gguf` for llama.cpp; check its tensors, and the source's logits on the base as PEFT reads it.

    Every matrix is zero-padded to the largest rank, for llama.cpp scales by one alpha and each matrix's own rank.

    Raises:
        UserError: as `export_peft`; or a base that llama.cpp names otherwise. RunError: as there.
    """
    require_new(out, "folder")
    require_finite_adapter(adapter, str(out))
    name = base or adapter.base_model
    checks = (check_reading(adapter, name),) if adapter.folder is not None else ()
    config = load_skeleton(name, adapter.revision).config
    with replacing_folder(out) as fresh:
        write_gguf_lora(fresh / ADAPTER_FILE, adapter, config)
        found = check_gguf_lora(fresh / ADAPTER_FILE, adapter, config), *checks
        for check in found:
            check.require(out)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_parsed(_parser(), lambda options: print(_export(options)), arguments, stoppable=True)


def _parser() -> CommandParser:
    parser = CommandParser("python -m flexlora_ds.export", __doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, help="a run folder, whose adapter/ is exported; or that of a LoRA"
    )
    source.add_argument(
        "--checkpoint", type=Path, help="checkpoints/step_… of a run, checked and exported as of that step"
    )
    parser.add_argument(
        "--to",
        choices=("peft", "peft-uniform", "gguf-lora", "merged"),
        required=True,
        help="an adapter with each matrix at its own rank, one at a single rank for servers, llama.cpp's adapter file, "
        "or a whole model",
    )
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument(
        "--rank_budget", type=_count, help="keep at most this many directions over all matrices"
    )
    smaller.add_argument("--parameters", type=_count, help="keep at most this many parameters")
    smaller.add_argument(
        "--energy", type=_share, help="keep this share of the singular values' squares, such as 0.95"
    )
    parser.add_argument(
        "--min_rank",
        type=_count,
        help="of a smaller adapter: directions that every matrix keeps; 0 may leave matrices out (default 1)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new or empty")
    parser.add_argument("--base", help="the base model, if it is not where the run found it")
    parser.add_argument(
        "--dtype", choices=("auto", *TORCH_DTYPES), default="auto", help="of the merged model"
    )
    return parser


def _export(options: argparse.Namespace) -> str:
    """Do what the options ask; returns what to tell the user."""
    out: Path = options.out
    require_new(out, "--out")
    adapter = _read(options)
    require_finite_adapter(adapter, str(options.run or options.checkpoint))
    _hide_progress_bars()
    smaller = _smaller(adapter, options)
    adapter = adapter if smaller is None else smaller.adapter
    ranks = sorted(matrix.rank for matrix in adapter.matrices.values())
    checks: tuple[Check, ...]
    matrices = counted(len(ranks), "matrix", "matrices")
    lines = [f"wrote {out}: {matrices} of rank {ranks[0]} to {ranks[-1]}"]
    if options.to == "peft":
        checks = export_peft(adapter, out, options.base)
    elif options.to == "peft-uniform":
        checks = export_uniform(adapter, out, options.base)
        lines[0] = f"wrote {out}: {matrices}, all padded to rank {ranks[-1]}"
        allowed = server_rank(ranks[-1])
        lines.append(
            f"rank to allow in the server: --max-lora-rank {allowed}"
            if allowed
            else f"rank {ranks[-1]} is above the {SERVER_RANKS[-1]} that vLLM allows: use --to merged"
        )
    elif options.to == "gguf-lora":
        checks = export_gguf_lora(adapter, out, options.base)
        lines[0] = f"wrote {out / ADAPTER_FILE}: {matrices}, all padded to rank {ranks[-1]}"
        lines.append(f"serve it: llama-server -m BASE.gguf --lora {out / ADAPTER_FILE}")
    else:
        checks = export_merged(adapter, out, options.base, TORCH_DTYPES.get(options.dtype))
        lines[0] = f"wrote {out}: the base model with an update in {matrices}"
    doubts = [*adapter.doubts, *other_base_doubt(adapter.base_model, options.base or adapter.base_model)]
    said = [f"warning: {doubt}" for doubt in doubts] + ([] if smaller is None else [smaller.line()])
    return "\n".join([*lines, *said, *(f"checked: {check}" for check in checks)])


def _read(options: argparse.Namespace) -> LoraAdapter:
    if options.run is not None:
        return read_peft_adapter(_adapter_folder(options.run))
    if not options.checkpoint.is_dir():
        raise UserError(
            f"--checkpoint {options.checkpoint} is no folder", mend="give checkpoints/step_… of a run"
        )
    return read_checkpoint_adapter(options.checkpoint)


def _smaller(adapter: LoraAdapter, options: argparse.Namespace) -> Truncated | None:
    """The adapter at the size that the options ask for; None: as it is."""
    if options.rank_budget is options.parameters is options.energy is None:
        if options.min_rank is not None:
            raise UserError(
                "--min_rank belongs to a smaller adapter",
                "command line",
                "give --rank_budget, --parameters or --energy",
            )
        return None
    least = 1 if options.min_rank is None else options.min_rank
    size = Size(options.rank_budget, options.parameters, options.energy, least)
    smaller = truncate(adapter, size)
    if adapter.folder is not None:  # what comes from a checkpoint is no other program's to read
        check_reading(adapter, options.base or adapter.base_model).require(options.out)
    return smaller


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > _LONGEST_COUNT:
        shown = one_line(text, 40)
        raise argparse.ArgumentTypeError(
            f"{shown!r} is not a whole number of at most {_LONGEST_COUNT} digits"
        )
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r} is not a number above 0 and at most 1")
    return value


def _hide_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _adapter_folder(run: Path) -> Path:
    for folder in (run / "adapter", run):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (run / "model" / "config.json").is_file():
        raise UserError(
            f"--run {run} trained all weights", mend=f"use {run / 'model'}: it is a model already"
        )
    raise UserError(
        f"--run {run} holds no adapter/{CONFIG_FILE}", mend="give the folder of a run that has trained"
    )


if __name__ == "__main__":
    sys.exit(main())
