"""The directions of a run: their lives in ranks.jsonl, and the groups in which they are weighed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexlora_ds.rank_changes.record import newborn_of
from flexlora_ds.worth import by_birth, together
from launch.loop import worth
from launch.loop.worth import MOST_GROUPS, grouped
from launch.run_folder.new_directions import life_stories, with_last_values
from launch.run_folder.rows import DIRECTIONS, RANK_CHANGE, fault_of
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import CHANGES, make_place, read_lines

BIRTHS = {"a": [(0, 0), (5, 1), (9, 2)], "b": [(0, 0)], "c": [(9, 2)]}


def test_newborn_are_those_born_after_the_start() -> None:
    lambdas = {"a": torch.tensor([1.0, 2.0, 0.5]), "b": torch.tensor([1.0]), "c": torch.tensor([-0.25])}
    assert newborn_of(BIRTHS, lambdas) == {"a": [[5, 2.0], [9, 0.5]], "c": [[9, -0.25]]}
    assert by_birth(BIRTHS) == {5: {"a": [1]}, 9: {"a": [2], "c": [0]}}
    assert together(by_birth(BIRTHS).values()) == {"a": [1, 2], "c": [0]}


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "pruned": [], "expanded": [], "prune_age": [], **values}


def test_a_life_goes_from_birth_to_prune_or_to_the_end() -> None:
    changes = [
        row(5, expanded=["a", "b"], sigma={"a": 2.0}, noise={"a": 0.5}),
        row(8, newborn={"a": [[5, 0.1]], "b": [[5, 0.2]]}, pruned=["b"], prune_age=[3]),
        row(11, newborn={"a": [[5, 0.3]]}, expanded=["b"], pruned=["c"], prune_age=[11]),
    ]
    stories = life_stories(changes, "gradient")
    with_last_values(stories, {"a": [(0, 0), (5, 1)], "b": [(11, 3)]}, {"a": [9.0, 0.4], "b": [-0.5]})
    first, second, third = stories
    assert (first.matrix, first.born, first.how, first.sigma, first.noise) == ("a", 5, "gradient", 2.0, 0.5)
    assert first.lam == [[8, 0.1], [11, 0.3]] and first.lam_end == 0.4 and first.pruned is None
    assert second.how == "zero_impact" and second.pruned == 8 and second.lam == [[8, 0.2]]
    assert second.lam_end is None
    assert (third.matrix, third.born, third.lam, third.lam_end) == ("b", 11, [], -0.5)


def test_rows_of_older_runs_say_less_and_are_no_fault() -> None:
    (story,) = life_stories([row(5, expanded=["a"]), row(8, pruned=["a"], prune_age=[3])], "orthogonal")
    assert (story.how, story.lam, story.pruned) == ("orthogonal", [], 8)


def test_more_changes_than_validations_are_weighed_with_their_neighbours() -> None:
    changes = {step: {"a": [step]} for step in range(1, 101)}
    groups = grouped(changes)
    assert len(groups) <= MOST_GROUPS and [step for group in groups for step in group.born] == list(changes)
    assert all(list(group.born) == group.directions["a"] for group in groups)
    assert [group.born for group in grouped({5: {"a": [1]}, 9: {"b": [0]}})] == [(5,), (9,)]


@pytest.mark.parametrize(
    ("market", "right"),
    [
        (None, True),
        ({"gain": {"a": 1.0}, "loss": {}, "expected_gain": 0.0, "expected_loss": 0.0}, True),
        ({"gain": {"a": 1.0}}, False),
        ([], False),
    ],
)
def test_a_row_may_have_a_market_or_none(market: Any, right: bool) -> None:
    kind = {"step": RANK_CHANGE["step"]}
    assert (fault_of({"step": 1, "market": market, "newborn": {"a": [[1, None]]}}, kind) is None) == right


def train(processes: Processes, arguments: list[str]) -> None:
    (done,) = processes.run(training.command, arguments)
    assert done["code"] == 0, done["stderr"]


def test_a_run_ends_with_what_its_directions_are_worth(tmp_path: Path, one_process: Processes) -> None:
    """Weighing changes no bit of the adapter or of a loss, and a run that had stopped weighs the same."""
    place = make_place(tmp_path)
    for out, options in {
        "weighed": {},
        "not": {"weigh_directions": "false"},
    }.items():
        train(one_process, place.arguments(tmp_path / out, **options))
    runs = {name: tmp_path / name for name in ("weighed", "not")}
    assert_same_run(runs["weighed"], runs["not"])
    weighed, not_weighed = (json.loads((run / "directions.json").read_text()) for run in runs.values())
    assert fault_of(weighed, DIRECTIONS) is None and fault_of(not_weighed, DIRECTIONS) is None
    assert weighed["directions"] == not_weighed["directions"]
    assert weighed["loss"] == read_lines(runs["weighed"] / "validation.jsonl")[-1]["loss"]
    assert {change["born"][0] for change in weighed["changes"]} <= set(CHANGES)
    assert all(isinstance(change["rise"], float) for change in (*weighed["changes"], weighed["together"]))
    assert not_weighed["loss"] is None and {c["rise"] for c in not_weighed["changes"]} == {None}
    changes = read_lines(runs["weighed"] / "ranks.jsonl")
    assert len(weighed["directions"]) == sum(len(change["expanded"]) for change in changes)
    alive = [story for story in weighed["directions"] if story["pruned"] is None]
    assert len(alive) == weighed["together"]["survivors"] > 0
    spectra = json.loads((runs["weighed"] / "spectra.json").read_text())
    assert all(story["lam_end"] in spectra[story["matrix"]] for story in alive)
    # The same command finds the run at its end, and weighs again from what the checkpoint holds.
    (runs["weighed"] / "directions.json").unlink()
    train(one_process, place.arguments(runs["weighed"]))
    assert json.loads((runs["weighed"] / "directions.json").read_text()) == weighed


def assert_same_run(one: Path, other: Path) -> None:
    weights = "adapter/adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    first, second = (read_lines(run / "metrics.jsonl") for run in (one, other))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_a_stop_ends_the_weighing_and_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    losses = iter([1.0, 1.5, math.nan, math.nan])
    monkeypatch.setattr(
        worth, "rises_without", lambda engine, groups, validate, loss: [validate() - loss for _ in groups]
    )

    class Validator:
        last_loss = None

        def __call__(self) -> float:
            return next(losses)

    session: Any = SimpleNamespace(
        method=SimpleNamespace(controller=SimpleNamespace(births=BIRTHS)),
        validator=Validator(),
        options=SimpleNamespace(weigh_directions=True),
        log=SimpleNamespace(progress=SimpleNamespace(message=said.append)),
        engine=None,
    )
    found = worth.weigh(session)
    assert [row["rise"] for row in found["changes"]] == [0.5, pytest.approx(math.nan, nan_ok=True)]
    assert "4 validations" in said[0] and said[1].startswith("1 of 3 rises")
