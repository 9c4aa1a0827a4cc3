"""Fingerprints: whether a model, an adapter or a data file is the one that earlier predictions were made with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from eval.items import TaskItems
from flexlora_ds.home import at_home

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_SUFFIXES = {".safetensors", ".gguf", ".json", ".model"}


def fingerprint_files(place: str) -> str | None:
    """16 hex digits over a file or over a folder's weights and settings; None for a hub id.

    Of a large file 64 evenly spaced samples of 64 KiB are read: training moves all weights, and reading
    16 GB takes a while.
    """
    path = Path(at_home(place))
    if not path.exists():
        return None
    files = (
        [path]
        if path.is_file()
        else sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    )
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for start in _sample_starts(size):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _sample_starts(size: int) -> list[int]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(0, size, _SAMPLE_BYTES))
    return [sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) for sample in range(_SAMPLES)]


def fingerprint_task(task: TaskItems) -> str:
    """16 hex digits over a task's prompts, choices and answers."""
    digest = hashlib.sha256()
    for item in task.items:
        question = item.question
        digest.update("\0".join([question.prompt_hash, *question.answers, question.answer, ""]).encode())
        if question.chat is not None:  # what a chat template makes of it
            digest.update(repr((item.prompt, item.candidates)).encode())
    return digest.hexdigest()[:16]
