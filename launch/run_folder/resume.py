"""Where a run begins: at a checkpoint, or anew. Process 0 looks and checks, and all get its answer."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.newest import newest_valid
from flexlora_ds.checkpoint.state import Checkpoint, open_checkpoint
from flexlora_ds.errors import RunError, UserError
from launch.distributed.agreement import on_rank_zero
from launch.distributed.process import Process
from launch.options.train_options import TrainOptions
from launch.run_folder.claim import LOGS, claim_run_folder, require_no_other
from launch.run_folder.compatibility import Identity
from launch.run_folder.folder import RunFolder
from launch.run_folder.lock import require_free

NOTES = ("identity", "journal", "guard")
"""What a run says in its checkpoints beside the engine's state (`launch.loop.session.begin`)."""

_MEND_LOG = "restore it; or copy the checkpoint to a place of its own, and resume from there in another out"

OF_THE_END = ("summary.json", "directions.json")
"""What says how an earlier end was, and not how this one will be."""

LOG_SEALS = "logs"
"""What each log holds up to the checkpoint; of runs before it was noted, nothing."""


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what is to be said about it."""

    checkpoint: Checkpoint | None = None
    origin: str | None = None
    """The checkpoint that `resume` named, where one was: a restart of the same command continues, not repeats."""
    messages: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The steps done already."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def constants(self) -> dict[str, Tensor]:
        """What the method keeps from its beginning (`Method.constants`); empty without a checkpoint."""
        return {} if self.checkpoint is None else self.checkpoint.constants()

    @property
    def ranks(self) -> dict[str, int] | None:
        """The ranks to build the model at; None for those of the options."""
        return None if self.checkpoint is None or not self.checkpoint.ranks else self.checkpoint.ranks


def find_start(options: TrainOptions, folder: RunFolder, process: Process, identity: Identity) -> Start:
    """Choose the checkpoint to continue, by `resume`, and compare it with this run; collective.

    Raises:
        UserError: `resume` names no checkpoint, or one that `out` does not go with.
        RunError: every checkpoint is damaged, or the one chosen is of another run.
    """

    def look() -> dict[str, Any]:
        chosen, origin, messages = _look(options, folder, identity)
        return {"folder": chosen and str(chosen.folder), "origin": origin, "messages": messages}

    answer = on_rank_zero(process, look)
    if answer["folder"] is None:
        return Start(messages=answer["messages"])
    checkpoint = open_checkpoint(Path(answer["folder"]), check=False)
    return Start(checkpoint, answer["origin"], answer["messages"])


def continue_files(start: Start, folder: RunFolder, process: Process) -> None:
    """Make the run folder's files those of a run that has just done `start.step` steps; collective.

    Raises:
        RunError: the disk refuses, or a log is damaged.
    """

    def prepare() -> list[str]:
        folder.require_present()
        claim_run_folder(folder.path)
        if start.checkpoint is None:
            folder.start_anew()
            return []
        source = start.checkpoint.folder.parent.parent
        if source.resolve() != folder.path.resolve():
            for name in LOGS:
                (folder.path / name).unlink(missing_ok=True)
                if (source / name).exists():
                    shutil.copyfile(source / name, folder.path / name)
        folder.continue_after(start.step)
        for name in OF_THE_END:
            (folder.path / name).unlink(missing_ok=True)
        return [path.name for path in files.set_aside_after(folder.checkpoints, start.step)]

    aside = on_rank_zero(process, prepare)
    start.messages.extend(f"a later checkpoint is kept as {name}, and not used" for name in aside)


def _require_notes(checkpoint: Checkpoint) -> None:
    lacking = [name for name in NOTES if not isinstance(checkpoint.run.get(name), dict)]
    if lacking:
        raise RunError(
            f"the checkpoint was not written by a training run: its {files.STATE} lacks {lacking[0]}",
            str(checkpoint.folder),
            "give one of a run",
        )


def _require_logs(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Compare the logs beside a checkpoint with what it says of them; what is to be said.

    A checkpoint that was copied somewhere without its run has none beside it: a run from there begins new ones.

    Raises:
        RunError: a log is not the one that the checkpoint goes with. UserError: it is no ordinary file.
    """
    beside = RunFolder(checkpoint.folder.parent.parent)
    seals = checkpoint.run.get(LOG_SEALS, {})
    elsewhere = beside.path.resolve() != out.resolve()
    if elsewhere and not any(os.path.lexists(lines.path) for lines in beside.logs):
        return [f"warning: no logs beside {checkpoint.folder}: those of this run begin after its step"]
    for lines in beside.logs:
        if lines.path.name in seals:
            lines.require(seals[lines.path.name], _MEND_LOG)
        lines.read()
    return []


def expect_start(options: TrainOptions, identity: Identity) -> list[str]:
    """What a run would say of where it begins, without writing to its folder: for a dry run.

    Raises:
        UserError, RunError: as `find_start`, and where the folder cannot be made or written to, or another run
            holds it.
    """
    folder = RunFolder(options.out)
    folder.require_unused(options.resume)
    require_no_other(folder.path)
    folder.require_writable()
    require_free(folder.path)
    _, _, messages = _look(options, folder, identity)
    return messages


def _look(
    options: TrainOptions, folder: RunFolder, identity: Identity
) -> tuple[Checkpoint | None, str | None, list[str]]:
    """The checkpoint to continue, compared with this run; the one that `resume` named; what is to be said."""
    chosen, origin, messages = _choose(options, folder)
    if chosen is not None:
        _require_notes(chosen)
        differences = identity.compare(chosen)
        messages = [*messages, f"continuing after step {chosen.step} ({chosen.folder})"]
        messages += _require_logs(chosen, folder.path)
        messages += [f"warning: other options than before: {', '.join(differences)}"] if differences else []
    return chosen, origin, messages


def _require_folder(path: Path, options: TrainOptions) -> None:
    if not options.resume.strip() or not path.is_dir():
        fault = f"no checkpoint at {path}" if options.resume.strip() else "resume is empty"
        raise UserError(fault, options.place("resume"), "give auto, none or its folder")


def _choose(options: TrainOptions, folder: RunFolder) -> tuple[Checkpoint | None, str | None, list[str]]:
    root = folder.checkpoints
    if options.resume in ("auto", "none"):
        if not files.ever_held_one(root):
            anew = folder.metrics.path.exists() or folder.options.exists()
            said = ["no checkpoint was ever completed here: starting anew"] if anew else []
            return None, None, said
        chosen, messages = _newest(root)
        return chosen, chosen.run.get("origin"), messages
    return _named(Path(options.resume), options, root)


def _newest(root: Path) -> tuple[Checkpoint, list[str]]:
    """The newest valid checkpoint, and what was found damaged on the way to it."""
    checkpoint, damage = newest_valid(root, "restore one, or choose another out")
    return checkpoint, [f"warning: damaged checkpoint, trying the one before: {error}" for error in damage]


def _named(path: Path, options: TrainOptions, root: Path) -> tuple[Checkpoint, str, list[str]]:
    """The checkpoint that `resume` names, or the newest one in `out` that came of it."""
    _require_folder(path, options)
    origin = str(path.resolve())
    if files.checkpoints_in(root):
        newest, messages = _newest(root)
        if newest.run.get("origin") == origin:
            return newest, origin, [*messages, f"already continued from {path}"]
        if path.resolve().parent != root.resolve():
            raise UserError(
                f"{options.out} holds checkpoints of its own, which did not start from {path}",
                options.place("resume"),
                "choose another out",
            )
    inner = path if (path / files.MANIFEST).exists() else path / "checkpoints"
    if files.checkpoints_in(inner):
        found, messages = _newest(inner)
        return found, origin, messages
    try:
        files.step_of(path)
    except UserError as error:
        raise UserError(f"{error.fault}: {path}", options.place("resume"), error.mend) from None
    return open_checkpoint(path), origin, []
