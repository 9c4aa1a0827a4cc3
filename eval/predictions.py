"""Predictions on disk: one line each, appended as they come, so that a crash loses none that was written.

`predictions/<task>.jsonl` holds a task's predictions in the order of the test file. While an evaluation runs,
every process appends to a log of its own, `predictions/journal-<process>.jsonl`. The next start, or the end of the
evaluation, merges the logs into the task files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.items import Question, TaskItems
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.lock import locked
from flexlora_ds.files.text import write_json_atomically, write_text_atomically


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
        if self.margin is not None:
            line["margin"] = float(f"{self.margin:.6g}")
        if self.per_token is not None:
            line["per_token"] = self.per_token
        if self.note is not None:
            line["note"] = self.note
        return line

    @classmethod
    def from_json(cls, task: str, line: Mapping[str, Any]) -> Prediction:
        """The reverse of `to_json`; KeyError where a key is missing."""
        return cls(
            task=task,
            index=int(line["index"]),
            prompt_hash=line["prompt_hash"],
            output=line["output"],
            prediction=line["prediction"],
            answer=line["answer"],
            margin=line.get("margin"),
            per_token=line.get("per_token"),
            note=line.get("note"),
        )


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
        """Keep other evaluations out of the folder until this process ends. RunError if another holds it.

        Waits up to `patience` seconds: the processes of a killed evaluation end when their launcher is gone.
        """
        out = self.out

        def refuse(holder: str) -> None:  # no method: the lock must not keep its folder alive
            raise RunError(f"another evaluation is writing here: {holder}", f"--out {out}", "choose another")

        out.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(out / ".lock", refuse, patience=patience))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Record the settings, or check them against those of existing predictions.

        Raises UserError naming what differs: predictions of different settings are never mixed.
        """
        path = self.out / "settings.json"
        if any(self.folder.glob("*.jsonl")):
            remedy = "choose another --out, or remove this one"
            if not path.is_file():
                raise UserError(
                    f"{self.folder} holds predictions of unknown settings",
                    "settings.json is missing",
                    remedy,
                )
            before = _read_json(path)
            for key in {**before, **settings}:
                if before.get(key) != settings.get(key):
                    raise UserError(
                        f"results of other settings are in {self.out}: {key} was {before.get(key)!r} and is "
                        f"{settings.get(key)!r}",
                        "--out",
                        remedy,
                    )
        write_json_atomically(path, dict(settings))

    def merge_logs(self, tasks: Iterable[TaskItems]) -> None:
        """Merge the prediction logs into the task files; one process calls this, while none writes."""
        logs = sorted(self.folder.glob("journal-*.jsonl"))
        found: defaultdict[str, list[Prediction]] = defaultdict(list)
        for log in logs:
            for line in _read_lines(log):
                found[line["task"]].append(Prediction.from_json(line["task"], line))
        for task in tasks:
            known = {item.question.index: item.question.prompt_hash for item in task.items}
            merged = self.read(task.task)
            merged.update({p.index: p for p in found[task.task] if known.get(p.index) == p.prompt_hash})
            lines = [json.dumps(merged[index].to_json()) + "\n" for index in sorted(merged)]
            write_text_atomically(self.folder / f"{task.task}.jsonl", "".join(lines))
        for log in logs:
            log.unlink()

    def read(self, task: str) -> dict[int, Prediction]:
        """The merged predictions of a task by index."""
        path = self.folder / f"{task}.jsonl"
        lines = _read_lines(path) if path.is_file() else []
        return {
            prediction.index: prediction
            for prediction in (Prediction.from_json(task, line) for line in lines)
        }

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
        lines = [json.dumps({"task": p.task, **p.to_json()}) + "\n" for p in predictions]
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(
            f"{path} is no valid JSON", mend="remove its folder or choose another --out"
        ) from None
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file: a kill may have truncated the last one, which is then computed again."""
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            if not {"index", "prompt_hash", "output", "prediction", "answer"} <= set(line):
                raise ValueError
        except ValueError:
            if path.name.startswith("journal-"):
                continue
            raise UserError(
                f"{path}, line {number}, is no prediction", mend="remove the line or the folder"
            ) from None
        lines.append(line)
    return lines
