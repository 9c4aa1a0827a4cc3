"""How the GPU benchmark runs its proofs: lanes side by side, teams that start once, and a count of what came of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from benchmarks.gpu import proofs
from benchmarks.gpu.proofs import listed, programs, teams
from benchmarks.gpu.proofs.proof import Lane, Proof, Verdict
from benchmarks.gpu.section import Conditions, NotRunError, Report
from tests.helpers.processes import ProcessError

CARD = torch.device("cuda", 0)


class Scripted:
    """Stands for processes: each call raises or returns what comes next."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def run(self, function: Any, *args: Any, timeout: float | None = None) -> list[Any]:
        self.asked.append(function)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


def run_proofs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, found: list[Proof], **conditions: Any
) -> list[dict[str, Any]]:
    """As on a card, with these proofs and no processes."""

    @contextmanager
    def none(conditions: Conditions) -> Iterator[None]:
        yield

    monkeypatch.setattr(listed, "proofs", lambda: found)
    monkeypatch.setattr(teams, "teams", none)
    monkeypatch.setattr(Conditions, "device", CARD)
    proofs.run(Conditions("tiny", 100.0, **conditions), Report("proofs", folder / "figures"))
    return [json.loads(line) for line in (folder / "figures").read_text().splitlines()]


def proof(name: str, prove: Callable[[Any, Any], Verdict], lane: Lane = "here", **more: Any) -> Proof:
    return Proof(name, "tests/x.py::test_x", prove, lane, **more)


def test_lanes_run_side_by_side_and_what_came_of_each_proof_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = Barrier(2, timeout=60)

    def meets(conditions: Conditions, teams: Any) -> Verdict:
        both.wait()
        return True, "met"

    def lacks(conditions: Conditions, teams: Any) -> Verdict:
        raise NotRunError("no such card")

    def breaks(conditions: Conditions, teams: Any) -> Verdict:
        raise RuntimeError("out of memory")

    found = [
        proof("a", meets),
        proof("b", meets, "pair"),
        proof("c", lacks, "pair"),
        proof("d", breaks),
        proof("e", lambda conditions, teams: (False, "apart")),
        proof("f", meets, seconds=1000),
    ]
    rows = {row["name"]: row for row in run_proofs(monkeypatch, tmp_path, found)}
    assert {name: rows[name].get("holds") for name in "abcdef"} == {
        **dict.fromkeys("ab", True),
        **dict.fromkeys("cf"),
        **dict.fromkeys("de", False),
    }
    assert rows["c"]["unproven"] and rows["c"]["reason"] == "no such card"
    assert rows["f"]["unproven"] and "no time left" in rows["f"]["reason"]
    assert rows["d"]["detail"] == "RuntimeError: out of memory"
    assert rows["proofs"]["value"] == "2 hold, 2 fail, 2 not run, of 6"


def test_only_the_proofs_asked_for_are_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [proof("stage 2: this", lambda conditions, teams: (True, "")), proof("that", programs.liger)]
    rows = run_proofs(monkeypatch, tmp_path, found, proofs=("stage 2",))
    assert [row["name"] for row in rows] == ["stage 2: this", "proofs"]


def test_a_team_that_cannot_start_is_not_started_again_and_one_that_fails_begins_anew() -> None:
    dead: Any = Scripted(ProcessError("rank 0 died\nno device"))
    team = teams.Team(dead, teams.worker.ready)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no process to prove it in: no device"):
            team.run(len)
    assert dead.asked == [teams.worker.ready]
    falls: Any = Scripted("cpu", ProcessError("rank 0 failed"), "cpu", 7)
    team = teams.Team(falls, teams.worker.ready)
    with pytest.raises(ProcessError):
        team.run(len)
    assert team.run(len) == [7]
    assert falls.asked == [teams.worker.ready, len, teams.worker.ready, len]


def test_only_what_gloo_lacks_excuses_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = Conditions("tiny", 10.0)
    for text, expected in (
        ("rank 1 failed\nRuntimeError: ProcessGroupGloo does not support reduce_scatter", NotRunError),
        ("rank 1 failed\ntorch.OutOfMemoryError: CUDA out of memory", ProcessError),
        ("no answer from ranks [0] after 40 s\nGloo connected", ProcessError),
    ):
        pair = teams.Team(Scripted("cpu", ProcessError(text)), teams.worker.ready)  # type: ignore[arg-type]
        monkeypatch.setattr(teams.Teams, "__init__", lambda self: None)
        found = teams.Teams()  # type: ignore[call-arg]
        found._by_lane, found.steps = {"pair": pair}, 16
        with pytest.raises(expected):
            programs.pair(3, conditions, found)
