"""Predictions on disk: one line each, appended as they come, so that a crash loses none that was written.

`predictions/<task>.jsonl` holds a task's predictions in the order of the test file. While an evaluation runs,
every process appends to a log of its own, `predictions/journal-<process>.jsonl`. The next start, or the end of the
evaluation, merges the logs into the task files.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.chat_template import as_day
from data_prep.tasks import TASKS
from eval.items import Question, TaskItems
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.lock import locked
from flexlora_ds.files.reading import JSON_FAULTS, MIB, json_fault, open_ordinary, read_json_object
from flexlora_ds.files.text import remove_parts, write_json_atomically, write_text_atomically

_ANOTHER_OUT = "remove its folder or choose another --out"
_LONGEST = 1024 * MIB
_FILES = ("settings.json", "results.json", "table.md")

TEMPLATE_DATE = "template_date"
"""The setting that names the date which the chat template is given."""


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one item.

    `prediction` is None where it is unanswered. `margin` is the gap between the best and the second best: the
    smallest among the tokens' logits, or that of the answers' log-likelihoods. Rounding matters where it is tiny.
    `per_token` is the answer of highest log-likelihood per token (mode score, answers of several lengths).
    `note` is the reason why the model was not asked.
    """

    task: str
    index: int
    prompt_hash: str
    output: str
    prediction: str | None
    answer: str
    margin: float | None = None
    per_token: str | None = None
    note: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the prediction is the item's answer."""
        return self.prediction == self.answer

    def to_json(self) -> dict[str, Any]:
        """The object of a line; optional keys only where they have a value."""
        line: dict[str, Any] = {
            "index": self.index,
            "prompt_hash": self.prompt_hash,
            "output": self.output,
            "prediction": self.prediction,
            "answer": self.answer,
            "correct": self.correct,
        }
        if self.margin is not None and math.isfinite(self.margin):
            line["margin"] = float(f"{self.margin:.6g}")
        if self.per_token is not None:
            line["per_token"] = self.per_token
        if self.note is not None:
            line["note"] = self.note
        return line

    @classmethod
    def from_json(cls, task: str, line: Any) -> Prediction:
        """The reverse of `to_json`; ValueError where a key is missing, or a value of another type."""
        if not isinstance(line, dict):
            raise ValueError("a line is no object")
        if "prediction" not in line:
            raise ValueError("prediction is missing")
        for key, holds in _TYPES.items():
            if not holds(line.get(key)):
                raise ValueError(f"{key} is of another type, or missing")
        return cls(
            task=task,
            index=line["index"],
            prompt_hash=line["prompt_hash"],
            output=line["output"],
            prediction=line["prediction"],
            answer=line["answer"],
            margin=line.get("margin"),
            per_token=line.get("per_token"),
            note=line.get("note"),
        )


def _answers(prediction: Prediction, question: Question | None) -> bool:
    """Whether it is a prediction of this very question."""
    return question is not None and (prediction.prompt_hash, prediction.answer) == (
        question.prompt_hash,
        question.answer,
    )


def _are_settings(path: Path) -> bool:
    """Whether a file holds what `check_settings` records, of this version or another."""
    try:
        return {"model", "protocol", "prompt"} <= read_json_object(path).keys()
    except UserError:  # it is not there, or is another's
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _may_be_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "index": lambda value: type(value) is int and 0 <= value < 1 << 53,
    "prompt_hash": _is_text,
    "output": _is_text,
    "prediction": _may_be_text,
    "answer": _is_text,
    "margin": lambda value: value is None or (type(value) in (int, float) and abs(value) < 1e300),
    "per_token": _may_be_text,
    "note": _may_be_text,
}


def unanswered(question: Question, note: str) -> Prediction:
    """A prediction for an item that the model was not asked."""
    return Prediction(
        question.task, question.index, question.prompt_hash, "", None, question.answer, note=note
    )


class PredictionFolder:
    """The predictions under `--out`, and the settings they were made with."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / "predictions"
        self._lock = ExitStack()

    def lock(self, patience: float = 20.0) -> None:
        """Keep other evaluations out of the folder until this process ends; remove what a killed one left unfinished.

        Raises RunError if another evaluation holds it.

        Waits up to `patience` seconds: the processes of a killed evaluation end when their launcher is gone.
        """
        out = self.out

        def refuse(holder: str) -> None:  # no method: the lock must not keep its folder alive
            raise RunError(f"another evaluation is writing here: {holder}", f"--out {out}", "choose another")

        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the folder: {error.strerror}", f"--out {out}", "choose another"
            ) from None
        if self._lock.enter_context(locked(out / ".lock", refuse, patience=patience)):
            remove_parts(out, _FILES)
            remove_parts(self.folder, [f"{task}.jsonl" for task in TASKS])

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Record the settings, or check them against those of existing predictions.

        Raises UserError naming what differs: predictions of different settings are never mixed. So it does where a
        file of this name is another's: it would be written over.
        """
        path = self.out / "settings.json"
        if not any(self.folder.glob("*.jsonl")):
            self._require_own_files()
        else:
            remedy = "choose another --out, or remove this one"
            if not path.is_file():
                raise UserError(
                    f"{self.folder} holds predictions of unknown settings",
                    "settings.json is missing",
                    remedy,
                )
            before = read_json_object(path, _ANOTHER_OUT)
            for key in {**before, **settings}:
                if before.get(key) != settings.get(key):
                    raise UserError(
                        f"results of other settings are in {self.out}: {key} was {before.get(key)!r} and is "
                        f"{settings.get(key)!r}",
                        "--out",
                        remedy,
                    )
        write_json_atomically(path, dict(settings))

    def _require_own_files(self) -> None:
        """Raises UserError where `--out` holds a file of ours by name, but no settings of an evaluation beside it."""
        found = [name for name in _FILES if (self.out / name).is_file()]
        if found and not _are_settings(self.out / "settings.json"):
            raise UserError(
                f"{self.out} holds a {found[0]} that no evaluation wrote",
                "--out",
                "choose another --out, or move that file",
            )

    def template_date(self) -> str | None:
        """The date that the chat template was given in the evaluation which is here; None without one."""
        path = self.out / "settings.json"
        known = read_json_object(path, _ANOTHER_OUT) if path.is_file() else {}
        return as_day(known.get(TEMPLATE_DATE))

    def merge_logs(self, tasks: Iterable[TaskItems]) -> None:
        """Merge the prediction logs into the task files; one process calls this, while none writes.

        What is of none of the items is left out, and its item is asked again: a file may have been edited.
        """
        logs = sorted(self.folder.glob("journal-*.jsonl"))
        found: defaultdict[str, list[Prediction]] = defaultdict(list)
        for log in logs:
            for task_name, prediction in _read_log(log):
                found[task_name].append(prediction)
        for task in tasks:
            asked = {item.question.index: item.question for item in task.items}
            every = [*self.read(task.task).values(), *found[task.task]]
            merged = {p.index: p for p in every if _answers(p, asked.get(p.index))}
            lines = [_line(merged[index].to_json()) for index in sorted(merged)]
            write_text_atomically(self.folder / f"{task.task}.jsonl", "".join(lines))
        for log in logs:
            log.unlink()

    def read(self, task: str) -> dict[int, Prediction]:
        """The merged predictions of a task by index. UserError names the line that is none."""
        path = self.folder / f"{task}.jsonl"
        if not path.exists():
            return {}
        found = {}
        for number, text in _lines(path):
            try:
                prediction = Prediction.from_json(task, _value(text))
            except JSON_FAULTS as error:
                place = f"{path}, line {number}"
                raise UserError(
                    f"no prediction: {json_fault(error)}", place, "remove the line or the folder"
                ) from None
            found[prediction.index] = prediction
        return found

    def prediction_log(self, process: int) -> PredictionLog:
        """The log that one process writes its predictions to."""
        return PredictionLog(self.folder / f"journal-{process}.jsonl")


class PredictionLog:
    """An append-only file; a batch of predictions is one write."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Append predictions. RunError where they cannot be written."""
        lines = [_line({"task": p.task, **p.to_json()}) for p in predictions]
        data = memoryview("".join(lines).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise RunError(
                f"cannot write predictions ({error.strerror})", mend="free some space and start again"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold anything, numbered from 1."""
    with open_ordinary(path, "remove it, or choose another --out") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise UserError(f"longer than {_LONGEST // MIB} MiB", str(path), "remove it, or choose another --out")
    return ((number, text) for number, text in enumerate(data.split(b"\n"), 1) if text)


def _value(text: bytes) -> Any:
    """A line's JSON; NaN and infinity are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _read_log(path: Path) -> Iterator[tuple[str, Prediction]]:
    """The predictions of a log with their tasks. What is none is computed again: a kill may have cut the last line."""
    for _, text in _lines(path):
        with contextlib.suppress(*JSON_FAULTS):
            line = _value(text)
            task = line.get("task") if isinstance(line, dict) else None
            if isinstance(task, str):
                yield task, Prediction.from_json(task, line)
