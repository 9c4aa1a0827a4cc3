"""What a section of `benchmarks.gpu` is given, and how it reports: each figure at once, as a line and as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import torch

Value: TypeAlias = bool | int | float | str | None


class NotRunError(Exception):
    """What cannot be measured or shown here, and why: said and counted, no failure."""


@dataclass(frozen=True)
class Conditions:
    """What a section runs under."""

    shape: str
    """A name of `benchmarks.shapes.SHAPES`."""
    seconds: float
    """The section's share of the time, from its first line of Python."""
    tiny: bool = False
    """Every path of the code, with sizes for a CPU."""
    model: str | None = None
    """For `study`: a model to train."""
    data: str | None = None
    """For `study`: records to train on."""
    proofs: tuple[str, ...] = ()
    """Only proofs whose names contain one of these; all where there is none."""
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU; a CPU where there is none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def wants(self, proof: str) -> bool:
        """Whether a proof was asked for."""
        return not self.proofs or any(text in proof for text in self.proofs)

    @property
    def left(self) -> float:
        """Seconds until the share is spent; a section begins nothing new that would not fit. Endless if `tiny`."""
        return math.inf if self.tiny else self.seconds - (time.monotonic() - self.started)


class Report:
    """Where figures go: standard output for people, a file of JSON lines for the command that started the section."""

    def __init__(self, section: str, path: Path | None) -> None:
        self.section, self.path = section, path
        self._lock = Lock()

    def figure(self, name: str, value: Value, unit: str = "", *, aim: str = "", **details: Any) -> None:
        """A measured value; `aim` says what was hoped for, `details` go into the JSON alone."""
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
        text = f"{name}: {shown}{' ' + unit if unit else ''}{f' (aim {aim})' if aim else ''}"
        self._put(text, {"name": name, "value": value, "unit": unit, "aim": aim, **details})

    def proof(self, name: str, holds: bool, detail: str = "", *, test: str = "") -> None:
        """Whether a guarantee holds; `test` names the test that shows the same on a CPU."""
        text = f"{'holds' if holds else 'FAILS'}: {name}{f' ({detail})' if detail else ''}"
        self._put(text, {"name": name, "proof": True, "holds": holds, "detail": detail, "test": test})

    def absent(self, name: str, reason: str, *, proof: bool = False) -> None:
        """What could not be measured or shown, and why: never silently."""
        what = "not run" if proof else "not measured"
        row = {"name": name, "absent": True, "reason": reason}
        self._put(f"{what}: {name} ({reason})", row | ({"unproven": True} if proof else {}))

    @contextmanager
    def attempt(self, name: str, *, proof: bool = False) -> Iterator[None]:
        """Go on after a failure inside, with what it was as a figure; a proof that fails to run does not hold."""
        try:
            yield
        except Exception as error:  # whatever it is, the other figures are worth having
            import traceback

            traceback.print_exc()
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
            self.proof(name, False, reason) if proof else self.absent(name, reason)

    def _put(self, text: str, row: dict[str, Any]) -> None:
        with self._lock:  # proofs report from several threads
            print(f"[{self.section}] {text}", flush=True)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"section": self.section, **row}) + "\n")


Section: TypeAlias = Callable[[Conditions, Report], None]
