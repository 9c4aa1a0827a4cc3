"""The files of a run folder (the README's contract), each written so that a crash leaves it whole and
readable.

JSON and YAML files appear by rename; the JSON-lines files grow line by line and are shortened to a
checkpoint's step on resume. Every number that is not finite is written as `null`, for `NaN` is no JSON.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexlora_ds import __version__
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.folders import bring_to_disk
from flexlora_ds.files.ownership import MARKER, remove_entries
from flexlora_ds.files.text import write_text_atomically
from launch.options.parameter_match import ParameterMatch
from launch.run_folder.claim import WRITTEN, require_no_other
from launch.run_folder.json_files import JsonLines, to_json
from launch.run_folder.lock import LOCK_FILE
from launch.run_folder.rows import ACCURACY, METRICS, RANK_CHANGE, VALIDATION

_LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. `loss` is the task loss of the step over all processes; times in seconds."""

    step: int
    epoch: float
    loss: float | None
    orth: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_s: float
    step_s: float
    peak_mem_gb: float
    total_rank: int
    skipped: bool = False


@dataclass(frozen=True)
class Summary:
    """What summary.json says at the end. `state` is finished or stopped; `tokens` leave the padding out."""

    state: str
    steps: int
    final_loss: float | None
    wall_seconds: float
    tokens: int
    tokens_per_s: float
    peak_mem_gb: float
    trainable_params_final: int
    trainable_params_mean: float
    rank_changes: int
    warnings: Sequence[str] = ()
    match: ParameterMatch | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    frozen_params: int | None = None
    """The base's frozen weights without embeddings and head, from which the report counts operations."""

    def to_dict(self) -> dict[str, Any]:
        """Return the object of summary.json: `trainable_params` is {final, mean}, `match_params` where asked for."""
        values = asdict(self)
        match = values.pop("match")
        matched = (
            {}
            if match is None
            else {"match_params": {"asked": match["asked"], "parameters": match["wanted"]}}
        )
        final, mean = values.pop("trainable_params_final"), values.pop("trainable_params_mean")
        rank_changes, warnings = values.pop("rank_changes"), list(values.pop("warnings"))
        versions, frozen = values.pop("versions"), values.pop("frozen_params")
        return values | {
            "trainable_params": {"final": final, "mean": mean},
            **matched,
            **({} if frozen is None else {"frozen_params": frozen}),
            "rank_changes": rank_changes,
            "warnings": warnings,
            "versions": versions,
        }


class RunFolder:
    """The run folder `path`; every process may hold one, only that of process 0 touches files."""

    def __init__(self, path: str | Path, *, is_rank_zero: bool = True) -> None:
        self.path = Path(path)
        self.is_rank_zero = is_rank_zero
        self.metrics = JsonLines(self.path / "metrics.jsonl", is_rank_zero, METRICS)
        self.rank_changes = JsonLines(self.path / "ranks.jsonl", is_rank_zero, RANK_CHANGE)
        self.validation = JsonLines(self.path / "validation.jsonl", is_rank_zero, VALIDATION)
        self.accuracy = JsonLines(self.path / "accuracy.jsonl", is_rank_zero, ACCURACY)
        self.fault: RunError | None = None
        """Why a log could not be written; the processes agree on it between two steps (`StopAgreement.before_step`)."""
        self.require_present: Callable[[], None] = lambda: None
        """Raises RunError where the folder is no more the one in which the run took its lock."""
        self._validated: int | None = None

    @property
    def logs(self) -> tuple[JsonLines, ...]:
        """The files that grow line by line."""
        return self.metrics, self.rank_changes, self.validation, self.accuracy

    def seals(self) -> dict[str, Any]:
        """By name, what each log holds so far: a part of a checkpoint."""
        return {lines.path.name: lines.seal() for lines in self.logs}

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Where the trained model goes, in transformers' format, of a method that trains all weights."""
        return self.path / "model"

    @property
    def options(self) -> Path:
        """The resolved options; there from a run's first step on."""
        return self.path / "options.yaml"

    def prepare(self, resume: str) -> None:
        """Create the folder and prove that it and its checkpoints' folder can be written to.

        Raises UserError where it cannot, where `resume` is "none" and the folder holds anything, or where a run would
        write over what no run wrote.
        """
        if not self.is_rank_zero:
            return
        try:
            self.require_unused(resume)
            require_no_other(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            for place in (self.path, self.checkpoints):
                if place.exists():  # and not only at the first save, hours later
                    with tempfile.TemporaryFile(dir=place):
                        pass
        except OSError as error:
            raise self._cannot_write(error.strerror) from error

    def require_writable(self) -> None:
        """Raise UserError, in the words of `prepare`, where the folder cannot be made or written to; write nothing."""
        nearest = next(place for place in (self.path, *self.path.parents) if os.access(place, os.F_OK))
        if not nearest.is_dir():
            raise self._cannot_write(os.strerror(errno.EEXIST if nearest == self.path else errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._cannot_write(os.strerror(errno.EACCES))

    def _cannot_write(self, why: str | None) -> UserError:
        return UserError(f"cannot write to the run folder: {why}", str(self.path), "choose another out")

    def require_unused(self, resume: str) -> None:
        """Raise UserError where `resume` is "none" and the folder holds anything; write nothing."""
        held = (
            [p for p in self.path.iterdir() if p.name not in (LOCK_FILE, MARKER)]
            if self.path.is_dir()
            else []
        )
        if resume == "none" and held:
            raise UserError(
                "the run folder is not empty", str(self.path), "choose another out or set resume auto"
            )

    def start_anew(self) -> None:
        """Remove the files of an earlier run that completed no checkpoint: nothing of it gets mixed in."""
        if self.is_rank_zero:
            remove_entries(self.path, [name for name in WRITTEN if name != "options.yaml"])
        for lines in self.logs:
            lines.start_anew()

    def continue_after(self, step: int) -> None:
        """Shorten the JSON-lines files to `step`: the steps after it will be run, and written, again."""
        for lines in self.logs:
            lines.truncate_after(step)

    def raise_fault(self) -> None:
        """Raise the RunError of a log that could not be written, where there is one."""
        if self.fault is not None:
            raise self.fault

    def sync(self) -> None:
        """Bring the JSON-lines files to the disk: they must not end before a checkpoint that continues them.

        Raises:
            RunError: one of them lacks a line, or the folder is another now. OSError: the disk refuses.
        """
        self.raise_fault()
        self.require_present()
        for lines in self.logs:
            if self.is_rank_zero and lines.path.exists():
                bring_to_disk(lines.path)

    def write_options(self, text: str) -> None:
        """Write options.yaml: every resolved option, as `TrainOptions.to_yaml` puts it."""
        self._write("options.yaml", text)

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        self._write("summary.json", to_json(summary.to_dict(), indent=2) + "\n")

    def write_spectra(self, spectra: Mapping[str, Sequence[float]]) -> None:
        """Write spectra.json, the λ of every matrix at the end by its name: the report's third plot."""
        self._write("spectra.json", to_json(spectra) + "\n")

    def write_directions(self, directions: Mapping[str, Any]) -> None:
        """Write directions.json: every direction born after the start, and what the survivors are worth."""
        self._write("directions.json", to_json(directions) + "\n")

    def log_step(self, metrics: StepMetrics) -> None:
        """Append a line to metrics.jsonl."""
        self._log(self.metrics, asdict(metrics))

    def log_validation(self, step: int, loss: float) -> None:
        """Append a line to validation.jsonl, one for a step: several causes may fall on the same."""
        if step != self._validated:
            self._log(self.validation, {"step": step, "loss": loss})
        self._validated = step

    def log_accuracy(self, row: Mapping[str, Any]) -> None:
        """Append a line to accuracy.jsonl."""
        self._log(self.accuracy, row)

    def log_rank_change(self, change: Mapping[str, Any]) -> None:
        """Append a line to ranks.jsonl: its keys in their order, then what else there is."""
        self._log(self.rank_changes, {key: change[key] for key in RANK_CHANGE} | dict(change))

    def _log(self, lines: JsonLines, row: Mapping[str, Any]) -> None:
        """Append a line; after one that failed none follows, so that no log has a gap."""
        if self.fault is None:
            try:
                self.require_present()
                lines.append(row)
            except RunError as error:
                self.fault = error

    def _write(self, name: str, text: str) -> None:
        if self.is_rank_zero:
            self.require_present()
            write_text_atomically(self.path / name, text)


def trainable_params_mean(initial: int, changes: Sequence[Mapping[str, Any]], steps: int) -> float:
    """Return the trainable parameters averaged over the steps; a change at t counts from t + 1 on."""
    total, current, since = 0, initial, 0
    for change in changes:
        total += current * (change["step"] - since)
        current, since = change["trainable_params"], change["step"]
    return (total + current * (steps - since)) / steps if steps else float(initial)


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries a run depends on."""
    versions = {"python": platform.python_version(), "flexlora": __version__}
    return versions | {name: _version(name) for name in _LIBRARIES}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
