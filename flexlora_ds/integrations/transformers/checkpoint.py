"""The training state in a trainer's checkpoints: our own, which no ZeRO stage and no number of processes binds.

checkpoint-500/adapter_model.safetensors, …            the adapter, in PEFT's format
checkpoint-500/training_state/step_00000500/           masters, optimizer, ranks (`flexlora_ds.checkpoint`)
checkpoint-500/trainer_state.json, rng_state*.pth      the Trainer's own
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from flexlora_ds.adapter.running_statistics import buffers_of, write_buffers
from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.own_loop import notes_of, require_same_options, require_same_run, write_checkpoint
from flexlora_ds.checkpoint.state import Checkpoint, open_checkpoint, set_ranks
from flexlora_ds.errors import RunError
from flexlora_ds.integrations.transformers.model import base_name_of

FOLDER = "training_state"


def save_state(trainer: Any, folder: Path) -> None:
    """Write the training state after the last update into a checkpoint's folder; collective.

    Raises:
        RunError: the disk refuses, on any process; on all of them alike.
    """
    life = trainer.rank_life
    write_checkpoint(
        life.engine,
        folder / FOLDER,
        trainer.state.global_step,
        life.controller,
        {**notes_of(life.controller, base_name_of(trainer.model)), "rank_changes": life.changes},
        constants=buffers_of(trainer.model, trainer.modules_to_save),
        scheduler=trainer.lr_scheduler,
    )


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
    require_same_options(checkpoint, trainer.flexlora)
    set_ranks(trainer.model, checkpoint.ranks)


def restore_state(trainer: Any, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Put a run that begins to where the checkpoint was taken; returns its rank changes so far.

    Raises:
        UserError: another number of steps. RunError: other parameters; nothing has been written then.
    """
    life = trainer.rank_life
    require_same_run(
        checkpoint,
        trainer.flexlora,
        trainer.state.max_steps,
        "resume with the same max_steps, num_train_epochs, data and batch size: the calendar follows from them",
    )
    checkpoint.restore(life.engine, controller=life.controller, scheduler=trainer.lr_scheduler)
    write_buffers(trainer.model, checkpoint.constants())
    changes: list[dict[str, Any]] = checkpoint.run["rank_changes"]
    return changes
