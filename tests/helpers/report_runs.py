"""Run folders to report on, and the page of a report as a reader without a browser sees it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from launch.report import page as report_page
from launch.run_folder.folder import RunFolder, StepMetrics, Summary
from launch.run_folder.new_directions import life_stories

OWN_SCRIPT = Path(report_page.__file__).with_name("history.js").read_text(encoding="utf-8")
KINDS = ("self_attn.q_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in KINDS]


def write_run(path: Path, *, changes: int = 3, spectra: bool = True, finished: bool = True) -> RunFolder:
    """A run of 40 steps whose changes move one direction each from the first matrix to the last."""
    run = RunFolder(path)
    run.prepare("auto")
    run.write_options("method: flexlora\nmodel: <tiny & small>\nrank: 4\n")
    ranks = dict.fromkeys(NAMES, 4)
    for step in range(1, 41):
        loss = math.nan if step == 7 else 2 * 0.9**step
        run.log_step(
            StepMetrics(step, step / 20, loss, 0.0, 1e-3, 1.0, 100, 50.0, 2.0, 0.5, 24, skipped=step == 7)
        )
    for number in range(1, changes + 1):
        step = 10 * number
        ranks[NAMES[0]] -= 1
        ranks[NAMES[-1]] += 1
        run.log_validation(step, 0.5)
        run.log_rank_change(rank_change(step, ranks))
    if finished and changes:
        run.write_directions(worth(run.rank_changes.read()))
    if spectra:
        run.write_spectra({name: np.linspace(-1, 1, rank).tolist() for name, rank in ranks.items()})
    if finished:
        run.write_summary(
            Summary("finished", 40, 0.03, 80.0, 4000, 50.0, 0.5, 24_000, 23_999.5, changes, ["collapse <b>"])
        )
    return run


def worth(changes: list[dict[str, Any]]) -> dict[str, Any]:
    """directions.json of a run with these changes."""
    stories = life_stories(changes, "orthogonal")
    for story in stories:
        story.lam_end = 0.25
    weighed = [{"born": [story.born], "survivors": 1, "rise": 0.0123} for story in stories]
    every = {"born": [story.born for story in stories], "survivors": len(stories), "rise": 0.0456}
    return {
        "loss": 0.5,
        "changes": weighed,
        "together": every,
        "directions": [asdict(story) for story in stories],
    }


def rank_change(step: int, ranks: dict[str, int]) -> dict[str, Any]:
    return {
        "step": step,
        "adjust_size": 1,
        "importance": dict.fromkeys(NAMES, 0.5),
        "score_margin": None,
        "pruned": [NAMES[0]],
        "expanded": [NAMES[-1]],
        "prune_age": [step],
        "ranks": dict(ranks),
        "total_rank": 24,
        "trainable_params": 24_000,
        "loss_before": None,
        "loss_after": 0.5,
        "spectrum_error": 0.001,
        "seconds": 0.25,
        "newborn": {NAMES[-1]: [[born, 0.01 * (step - born)] for born in range(10, step, 10)]},
        "warnings": ["young prunes"] if step == 20 else [],
    }


class Page(HTMLParser):
    """A page's visible text, images, data and outside references.

    Its tags are closed, and the only script that can run is the project's own.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.images: list[str | None] = []
        self.links: list[str | None] = []
        self.data: dict[str, Any] | None = None
        """What the script reads; None where the page has none."""
        self.inline: list[str] = []
        """The attributes that run as a script: none should be there."""
        self._open: list[str] = []
        self._kind: str | None = None
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [value for key, value in attrs if key in ("href", "src") and "base64" not in str(value)]
        self.inline += [key for key in values if key.startswith("on")]
        self._kind = values.get("type")
        if tag not in ("img", "meta", "br", "wbr", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script" and self._kind == "application/json":
            self.data = json.loads(data, parse_constant=_refuse)
        elif inside == "script":
            assert data == OWN_SCRIPT
        elif inside != "style":
            self.text += data


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
