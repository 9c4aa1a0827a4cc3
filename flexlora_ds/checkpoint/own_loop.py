"""Checkpoints of a loop of one's own: written, found again and continued from.

    checkpoint = find_checkpoint("checkpoints")        # None: the run begins
    inject_adapters(model, config)
    if checkpoint:
        set_ranks(model, checkpoint.ranks)             # before the engine is built
    engine, controller = …
    done = checkpoint.step if checkpoint else 0
    if checkpoint:
        restore_checkpoint(checkpoint, engine, controller)
    for step in range(done + 1, total_steps + 1):
        …
        controller.after_step(step)
        save_checkpoint(engine, "checkpoints", controller)

They hold what `launch/train.py` and the Trainer save: no ZeRO stage and no number of processes binds them. The frozen
base is not in them, nor is the position in the caller's data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_ds.adapter.layer import any_transposed
from flexlora_ds.adapter.running_statistics import buffers_of, write_buffers
from flexlora_ds.agreement import gather_writes
from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.adapter import NOTES, adapter_notes
from flexlora_ds.checkpoint.newest import newest_valid
from flexlora_ds.checkpoint.state import Checkpoint, take_snapshot
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.fields import OnResume, option_specs

_CONFIG, _TOTAL_STEPS = "flexlora", "total_steps"
"""Names under which a checkpoint says what it is of."""


def save_checkpoint(
    engine: Any,
    root: str | Path,
    controller: Any,
    *,
    base_model: str = "",
    run: Mapping[str, Any] | None = None,
    keep: int | None = None,
    scheduler: Any = None,
    modules_to_save: Sequence[str] = (),
) -> Path:
    """Write the state after the last update; collective, between two updates. It appears whole, or not at all.

    Args:
        engine: DeepSpeed's, or a `TorchEngine`.
        root: of all checkpoints; the same folder for every process.
        controller: the run's `RankController`; its `step` names the checkpoint.
        base_model: what the adapter is for, which `flexlora_ds.export --checkpoint` asks.
        run: what the caller wants back in `Checkpoint.run`, JSON; of process 0, under the same names on all.
        keep: how many of the newest stay; None keeps all.
        scheduler: of the learning rate, where it is not the engine's own.
        modules_to_save: as in `inject_adapters`: their batch normalisation's statistics go along.

    Returns:
        The checkpoint's folder, `root/step_00000500`.

    Raises:
        UserError: `run` has a name that is taken. RunError: the disk refuses on any process, or `run` is no JSON; on
            all of them alike, and earlier checkpoints stay.
    """
    constants = buffers_of(engine.module, modules_to_save)
    notes = notes_of(controller, base_model)
    if taken := sorted(notes.keys() & (run or {}).keys()):
        raise UserError(f"{taken[0]!r} is a name that the checkpoint uses itself", "run", "choose another")
    notes |= run or {}
    folder = write_checkpoint(
        engine, Path(root), controller.step, controller, notes, constants=constants, scheduler=scheduler
    )
    if keep is not None:
        _by_first(engine, lambda: files.keep_newest(Path(root), keep))
    return folder


def find_checkpoint(root: str | Path) -> Checkpoint | None:
    """The newest checkpoint below `root`, every byte checked; None where there never was one.

    A warning names a damaged one that is passed over. No communication: every process looks for itself.

    Raises:
        RunError: all that were completed here are damaged or gone.
    """
    if not files.ever_held_one(Path(root)):
        return None
    checkpoint, damage = newest_valid(Path(root), "restore one, or choose another folder")
    for error in damage:
        warnings.warn(f"damaged checkpoint, the one before is taken: {error}", stacklevel=2)
    return checkpoint


def restore_checkpoint(
    checkpoint: Checkpoint, engine: Any, controller: Any, *, scheduler: Any = None
) -> None:
    """Put an engine that has taken no step, and its controller, to where the checkpoint was taken.

    The model's adapters must have the checkpoint's ranks (`set_ranks`). The next update is `checkpoint.step + 1`.

    Raises:
        UserError: another configuration, or number of steps. RunError: other parameters, ranks or optimizer states.
            Nothing has been written then.
    """
    require_same_run(
        checkpoint,
        controller.config,
        controller.total_steps,
        "give RankController the same total_steps: the calendar follows from it",
    )
    checkpoint.restore(engine, controller=controller, scheduler=scheduler)
    write_buffers(engine.module, checkpoint.constants())


def notes_of(controller: Any, base_model: str) -> dict[str, Any]:
    """What a checkpoint says of its run, for a resume and for an export of its adapter; JSON."""
    config, transposed = controller.config, any_transposed(controller.layers)
    return {
        _CONFIG: config.to_dict(),
        _TOTAL_STEPS: controller.total_steps,
        NOTES: adapter_notes(config, base_model, None, prompt_date=None, fan_in_fan_out=transposed),
    }


def require_same_run(checkpoint: Checkpoint, config: FlexLoRAConfig, total_steps: int, mend: str) -> None:
    """Compare a run that goes on with that of a checkpoint.

    Args:
        mend: what to do where the number of steps is another.

    Raises:
        UserError: an option is another that a resume may not change, or the number of steps is.
    """
    require_same_options(checkpoint, config)
    total = checkpoint.run[_TOTAL_STEPS]
    if total != total_steps:
        raise UserError(
            f"the checkpoint is of a run of {total} steps, this one has {total_steps}",
            str(checkpoint.folder),
            mend,
        )


def require_same_options(checkpoint: Checkpoint, config: FlexLoRAConfig) -> None:
    """As `require_same_run`, of the options alone."""
    saved = FlexLoRAConfig.from_dict(checkpoint.run[_CONFIG])
    for spec in option_specs(FlexLoRAConfig):
        ours, theirs = getattr(config, spec.name), getattr(saved, spec.name)
        if spec.on_resume is OnResume.MUST_MATCH and ours != theirs:
            raise UserError(
                f"{spec.name} is {theirs} in the checkpoint and {ours} here",
                str(checkpoint.folder),
                "resume with the options that it was written with",
            )


def write_checkpoint(
    engine: Any,
    root: Path,
    step: int,
    controller: Any,
    run: Mapping[str, Any],
    *,
    constants: Mapping[str, Tensor],
    scheduler: Any = None,
) -> Path:
    """Every process writes its share into a scratch folder, which becomes a checkpoint when all have; collective.

    Raises:
        RunError: the disk refuses on any process; on all of them alike.
    """
    part = root / f".{files.folder_name(step)}.part"
    _by_first(engine, lambda: files.begin(root, step))
    snapshot = take_snapshot(
        engine, step, controller=controller, run=run, constants=constants, scheduler=scheduler
    )
    try:
        written = _gather(engine, lambda: [asdict(entry) for entry in snapshot.write(part)])
        entries = [files.FileEntry(**entry) for share in written for entry in share]
        _by_first(engine, lambda: files.commit(part, entries))
    except Exception:
        files.discard(part)
        raise
    return root / files.folder_name(step)


def _by_first(engine: Any, work: Callable[[], object]) -> None:
    """Process 0 does something to the folder; the others wait for it."""

    def part() -> None:
        if int(engine.global_rank) == 0:
            work()

    _gather(engine, part)


def _gather(engine: Any, work: Callable[[], Any]) -> list[Any]:
    return gather_writes(work, engine.device, alone=int(engine.world_size) == 1)
