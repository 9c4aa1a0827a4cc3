"""The training state in a trainer's checkpoints: our own, which no ZeRO stage and no number of processes binds.

checkpoint-500/adapter_model.safetensors, …            the adapter, in PEFT's format
checkpoint-500/training_state/step_00000500/           masters, optimizer, ranks (`flexlora_ds.checkpoint`)
checkpoint-500/trainer_state.json, rng_state*.pth      the Trainer's own
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_utils import get_last_checkpoint

from flexlora_ds.adapter.layer import any_transposed
from flexlora_ds.adapter.running_statistics import buffers_of, write_buffers
from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.adapter import NOTES, adapter_notes
from flexlora_ds.checkpoint.state import Checkpoint, open_checkpoint, set_ranks, take_snapshot
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.fields import OnResume, option_specs
from flexlora_ds.integrations.transformers.model import base_name_of

FOLDER = "training_state"


def save_state(trainer: Any, folder: Path) -> None:
    """Write the training state after the last update into a checkpoint's folder; collective.

    Raises:
        RunError: the disk refuses, on any process; on all of them alike.
    """
    life, root, step = trainer.rank_life, folder / FOLDER, trainer.state.global_step
    _together(lambda: files.begin(root, step) if trainer.args.process_index == 0 else None)
    part = root / f".{files.folder_name(step)}.part"
    snapshot = take_snapshot(
        life.engine,
        step,
        controller=life.controller,
        run=_notes(trainer),
        constants=buffers_of(trainer.model, trainer.modules_to_save),
        scheduler=trainer.lr_scheduler,
    )
    written = _together(lambda: [asdict(entry) for entry in snapshot.write(part)])
    entries = [files.FileEntry(**entry) for share in written for entry in share]
    _together(lambda: files.commit(part, entries) if trainer.args.process_index == 0 else None)


def find_state(resume: str | bool | None, output_dir: str) -> Checkpoint | None:
    """The training state that `resume_from_checkpoint` means; None where nothing is resumed.

    Raises:
        RunError: there is none, or it is not what was written.
    """
    if resume is None or resume is False:
        return None
    folder = get_last_checkpoint(output_dir) if resume is True else resume
    if folder is None:
        raise RunError(
            "there is no checkpoint to resume from", output_dir, "train without resume_from_checkpoint"
        )
    found = files.checkpoints_in(Path(folder) / FOLDER)
    if not found:
        raise RunError(
            "the checkpoint holds no training state of FlexLoRA's",
            str(folder),
            "resume from one that this trainer wrote without save_only_model",
        )
    return open_checkpoint(found[0])


def follow_state(trainer: Any, checkpoint: Checkpoint | None) -> None:
    """Before the model is wrapped: give it the checkpoint's ranks.

    Raises:
        UserError: the options are others. RunError: the model is another.
    """
    if checkpoint is None:
        return
    saved = FlexLoRAConfig.from_dict(checkpoint.run["flexlora"])
    for spec in option_specs(FlexLoRAConfig):
        ours, theirs = getattr(trainer.flexlora, spec.name), getattr(saved, spec.name)
        if spec.on_resume is OnResume.MUST_MATCH and ours != theirs:
            raise UserError(
                f"{spec.name} is {theirs} in the checkpoint and {ours} here",
                str(checkpoint.folder),
                "resume with the options that it was written with",
            )
    set_ranks(trainer.model, checkpoint.ranks)


def restore_state(trainer: Any, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Put a run that begins to where the checkpoint was taken; returns its rank changes so far.

    Raises:
        UserError: another number of steps. RunError: other parameters; nothing has been written then.
    """
    life, total = trainer.rank_life, checkpoint.run["total_steps"]
    if total != trainer.state.max_steps:
        raise UserError(
            f"the checkpoint is of a run of {total} steps, this one has {trainer.state.max_steps}",
            str(checkpoint.folder),
            "resume with the same max_steps, num_train_epochs, data and batch size: the calendar follows from them",
        )
    checkpoint.restore(life.engine, controller=life.controller, scheduler=trainer.lr_scheduler)
    write_buffers(trainer.model, checkpoint.constants())
    changes: list[dict[str, Any]] = checkpoint.run["rank_changes"]
    return changes


def _notes(trainer: Any) -> dict[str, Any]:
    """What a checkpoint says beside the engine's state."""
    life, config = trainer.rank_life, trainer.flexlora
    transposed = any_transposed(life.controller.layers)
    notes = adapter_notes(
        config, base_name_of(trainer.model), None, prompt_date=None, fan_in_fan_out=transposed
    )
    return {
        "flexlora": config.to_dict(),
        "total_steps": trainer.state.max_steps,
        "rank_changes": life.changes,
        NOTES: notes,
    }


def _together(work: Any) -> list[Any]:
    """Each process does its part; the results by process, or the first fault of any, raised on all alike."""
    try:
        answer: dict[str, Any] = {"result": work()}
    except OSError as error:
        answer = {"fault": f"cannot write: {error.strerror or error}", "place": str(error.filename or "")}
    answers = gather_object([answer])
    for one in answers:
        if "fault" in one:
            raise RunError(one["fault"], one["place"], "free some space and resume")
    return [one["result"] for one in answers]
