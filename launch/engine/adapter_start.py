"""`init_adapter`: a run that goes on from a trained LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora_ds.adapter_start import AdapterStart, adapter_fingerprint, read_adapter_start
from flexlora_ds.base_model.fingerprint import is_other_base
from flexlora_ds.errors import UserError
from flexlora_ds.orientation import LayerShape
from flexlora_ds.peft_reading.attach import adapter_folder
from flexlora_ds.terminal.counted import counted
from launch.distributed.agreement import on_rank_zero
from launch.distributed.process import Process
from launch.options.train_options import TrainOptions


def read_start(options: TrainOptions, shapes: Mapping[str, LayerShape]) -> AdapterStart | None:
    """The adapter that the options name, as P, λ and Q of the layers of these shapes; None where they name none.

    Raises:
        UserError: more than plain LoRA, one for another base, or a method that has no P, λ and Q.
    """
    place = options.place("init_adapter")
    if not options.init_adapter:
        if options.init_rank_budget is not None:
            raise UserError(
                "init_rank_budget belongs to init_adapter", options.place("init_rank_budget"), "give both"
            )
        return None
    if not options.traits.changes_ranks:
        raise UserError(f"method {options.method} goes on from no adapter", place, "set method flexlora")
    folder = adapter_folder(options.init_adapter, place)
    start = read_adapter_start(folder, options.to_flexlora_config(), shapes, options.init_rank_budget)
    _require_same_base(start, options.model, place)
    return start


def share_start(
    options: TrainOptions, shapes: Mapping[str, LayerShape], process: Process
) -> AdapterStart | None:
    """`read_start` by process 0; the others get its ranks, without its values. Collective."""
    if not options.init_adapter:
        return None
    found: list[AdapterStart] = []

    def read() -> dict[str, Any]:
        start = read_start(options, shapes)
        assert start is not None, "the options name an adapter"
        found.append(start)
        return {
            "ranks": dict(start.ranks),
            "remarks": list(start.remarks),
            "base_model": start.base_model,
            "prompt": start.prompt,
            "doubts": list(start.doubts),
        }

    said = on_rank_zero(process, read)
    return found[0] if found else AdapterStart(factors={}, **said)


def identify_adapter(options: TrainOptions) -> str | None:
    """The fingerprint of the adapter that the options name. UserError where there is none."""
    if not options.init_adapter:
        return None
    return adapter_fingerprint(adapter_folder(options.init_adapter, options.place("init_adapter")))


def line_of(start: AdapterStart, options: TrainOptions, matrices: Sequence[str]) -> str:
    """What the run begins with."""
    ranks = sorted(start.ranks.values())
    others = len(matrices) - len(ranks)
    lacks = counted(others, "matrix", "matrices")
    anew = f"; it lacks {lacks}, which begin{'s' if others == 1 else ''} anew" if others else ""
    has = counted(len(ranks), "matrix", "matrices")
    return f"goes on from {options.init_adapter}: {has} of rank {ranks[0]} to {ranks[-1]}{anew}"


def doubts_of(start: AdapterStart, options: TrainOptions) -> list[str]:
    """Where the adapter was trained otherwise, in ways that may be meant."""
    doubts = list(start.doubts)
    if start.base_model and start.base_model != options.model and not Path(start.base_model).exists():
        doubts.append(
            f"init_adapter was trained on {start.base_model}, and the base is {options.model}: "
            "its update belongs to the same weights only"
        )
    if start.prompt and start.prompt != options.prompt:
        doubts.append(
            f"init_adapter was trained with the prompt {start.prompt}, and this run's is {options.prompt}"
        )
    return doubts


def _require_same_base(start: AdapterStart, model: str, place: str) -> None:
    """Compare the files of two bases on this disk, where they have two names."""
    if is_other_base(start.base_model, model):
        raise UserError(
            f"the adapter was trained on {start.base_model}, whose weights are not those of {model}",
            place,
            "give its base as model, or another adapter",
        )
