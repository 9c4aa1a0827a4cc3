"""The report: what it reads from a run folder, the plots it draws and the page that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from flexlora_ds.errors import CommandError
from flexlora_ds.files.ownership import remove
from launch.report.__main__ import main
from launch.report.birth_table import MOST_DIRECTIONS, births_of
from launch.report.births import line_of, medians_of
from launch.report.build import build_report
from launch.report.page import page
from launch.report.plots import smooth
from launch.report.run_data import OTHERS, group_by_kind, layer_label, read_run
from launch.run_folder.new_directions import NewDirection
from tests.helpers.report_runs import NAMES, Page, rank_change, write_run


def test_a_finished_run_has_four_plots_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "demo")
    index = build_report(tmp_path / "demo")
    assert index == tmp_path / "demo" / "report" / "index.html"
    for name in ("loss.png", "rank_heatmap.png", "singular_values.png", "new_directions.png"):
        pixels = matplotlib.image.imread(index.with_name(name))
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.02  # something is drawn on it
    page = Page(index.read_text())
    assert len(page.images) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert page.links == []
    for text in (
        "finished",
        "<tiny & small>",
        "collapse <b>",
        "step 20: young prunes",
        "24,000",
        "– → 0.5000",
        "+0.0123",
        "+0.0456",
        "3 of 3 directions",
    ):
        assert text in page.text
    assert page.text.count(NAMES[-1]) == 4  # in the sample of spectra, and born at each change
    assert page.text.count("down_proj 2") == 3  # expanded at each change
    assert page.data is not None and page.data["steps"] == [0, 10, 20, 30] and page.inline == []
    moved = page.data["kinds"][1]["rows"][-1]
    assert moved == [NAMES[-1], "2", [4, 5, 6, 7], [None, 0.5, 0.5, 0.5]]


def test_what_a_run_folder_says_is_never_markup(tmp_path: Path) -> None:
    script = "<script>alert('x')</script>"
    run = write_run(tmp_path / script.replace("/", ""), changes=0)
    run.write_options(f'method: lora\nmodel: "{script}"\n')
    change = rank_change(10, dict.fromkeys(NAMES, 4))
    run.log_rank_change(change | {"pruned": [script, script, NAMES[0]], "expanded": [], "warnings": [script]})
    text = page(read_run(run.path), {f"Loss {script}": b"png"})
    shown = Page(text).text
    assert shown.count(script) == 5  # lead, warning, plot, pruned matrix, option
    assert f"{script}  × 2q_proj 0–" in shown.replace("\n", "")


def test_the_history_starts_before_the_first_change(tmp_path: Path) -> None:
    write_run(tmp_path)
    steps, history = read_run(tmp_path).rank_history()
    assert steps == [0, 10, 20, 30]
    assert history[NAMES[0]] == [4, 3, 2, 1]
    assert history[NAMES[1]] == [4, 4, 4, 4]
    assert history[NAMES[-1]] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("changes", "spectra", "plots"),
    [
        (0, True, ["loss.png", "rank_heatmap.png", "singular_values.png"]),
        (0, False, ["loss.png"]),
        (2, False, ["loss.png", "new_directions.png", "rank_heatmap.png"]),
    ],
)
def test_a_run_without_changes_or_spectra_or_still_going_on(
    tmp_path: Path, changes: int, spectra: bool, plots: list[str]
) -> None:
    write_run(tmp_path, changes=changes, spectra=spectra, finished=False)
    index = build_report(tmp_path)
    assert sorted(path.name for path in index.parent.glob("*.png")) == plots
    page = Page(index.read_text())
    assert len(page.images) == len(plots) - ("rank_heatmap.png" in plots and changes == 0)
    assert "still running" in page.text
    assert ("No rank was changed" in page.text) == (changes == 0)


def test_the_command_rebuilds_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", changes=1)
    assert main([str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "report" / "index.html")
    assert main([str(tmp_path / "nothing")]) == 2
    fault = capsys.readouterr().err
    assert fault.startswith("error: no run to report on") and fault.count("\n") == 1
    run.validation.path.write_text("{\n")
    assert main([str(run.path)]) == 1
    assert "validation.jsonl, line 1" in capsys.readouterr().err
    (run.path / "summary.json").write_text("")
    assert main([str(run.path)]) == 1
    assert "summary.json" in capsys.readouterr().err


def test_matrices_are_grouped_by_what_differs_in_numbers_only() -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    groups = group_by_kind([*names, "lm_head"])
    assert groups == {"q_proj": names[::2], "up_proj": names[1::2], OTHERS: ["lm_head"]}
    assert [layer_label(name, "q_proj") for name in groups["q_proj"]] == ["0", "1"]
    assert layer_label("lm_head", OTHERS) == "lm_head"


def test_kinds_of_the_same_last_name_stay_apart() -> None:
    names = [f"{side}.{i}.attn.qkv" for side in ("encoder", "decoder") for i in range(2)]
    assert group_by_kind(names) == {"encoder.*.attn.qkv": names[:2], "decoder.*.attn.qkv": names[2:]}
    experts = [f"layers.{i}.experts.{e}.up" for i in range(2) for e in range(2)]
    assert group_by_kind(experts) == {"up": experts}
    assert [layer_label(name, "up") for name in experts] == ["0.0", "0.1", "1.0", "1.1"]


def test_a_model_of_one_layer_is_one_group() -> None:
    names = ["layers.0.q_proj", "layers.0.up_proj"]
    assert group_by_kind(names) == {OTHERS: names}


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    assert np.allclose(smooth([3.0] * 50), 3.0)
    line = np.arange(600, dtype=float)
    assert np.allclose(smooth(line)[:590], line[:590])
    noisy = np.random.default_rng(0).normal(size=3000)
    assert smooth(noisy)[100:].std() < 0.2
    assert len(smooth([])) == 0


HOSTILE = "</script><script>alert('x')</script>\"'&{{7*7}}{%x%}$5_to_$9|`[a](javascript:b)"
WRONG: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**400,
    1e308,
    "x",
    "\ud800",
    [],
    ["x"],
    [None],
    {},
    {"x": []},
    {"x": "y"},
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside a JSON value."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[: 2 if len(place) == 1 else None]:
        yield from places(item, (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value, or without one (`...`), at a place."""
    if not place:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(place) == 1:
        del copied[place[0]]
    else:
        copied[place[0]] = changed(value[place[0]], place[1:], new)
    return copied


def mutations(path: Path) -> Iterator[tuple[str, str]]:
    """What was changed in a JSON or JSON-lines file, and its text then."""
    first, *rest = path.read_text().split("\n")
    for place in places(json.loads(first)):
        for new in [..., *WRONG] if place else WRONG:
            text = "\n".join([json.dumps(changed(json.loads(first), place, new)), *rest])
            yield f"{path.name} {place} {new!r:.20}", text


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.full)])
def test_a_report_on_files_of_other_types_is_made_or_refused_in_one_line(tmp_path: Path, every: int) -> None:
    run = write_run(tmp_path / "run")
    run.metrics.path.write_text("\n".join(run.metrics.path.read_text().split("\n")[:2]) + "\n")
    tried = refused = 0
    files = ("summary.json", "spectra.json", "directions.json")
    for name in (*files, "metrics.jsonl", "ranks.jsonl", "validation.jsonl"):
        path = run.path / name
        whole = path.read_text()
        path.write_text(json.dumps(json.loads(whole)) if name.endswith("n") else whole)
        for what, text in list(mutations(path))[::every]:
            path.write_text(text)
            tried += 1
            try:
                page(read_run(run.path), {})
            except CommandError as error:
                refused += 1
                assert name in str(error) and len(str(error)) < 500, what
        path.write_text(whole)
    assert tried > 800 / every and refused > tried / 2


BAD_TEXTS = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"1" * 5_000,
    b"null\n",
    b"!!python/object:os.system x: 1\n",
]


@pytest.mark.parametrize(
    "name",
    ["summary.json", "spectra.json", "directions.json", "options.yaml", "metrics.jsonl", "ranks.jsonl"],
)
def test_what_is_no_such_file_is_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    run.metrics.path.write_text(run.metrics.path.read_text().split("\n")[0] + "\n")  # quick to draw
    for text in BAD_TEXTS:
        (run.path / name).write_bytes(text + b"\n")
        try:
            page(read_run(run.path), {})
        except CommandError as error:
            assert name in str(error) or "metrics.jsonl is missing or empty" in str(error), text[:20]
            assert len(str(error)) < 500
        else:
            assert text == b"" and name == "options.yaml"
    (run.path / name).unlink()
    for make in (os.mkfifo, Path.mkdir):
        make(run.path / name)
        assert main([str(run.path)]) in (1, 2)
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1 and "--debug" not in said
        remove(run.path / name)


def test_hostile_text_in_every_field_of_every_file_is_never_markup(tmp_path: Path) -> None:
    """Where a field holds text, the page shows it; where it holds something else, the file is refused."""
    run = write_run(tmp_path / "run", changes=1)
    run.write_options(
        "".join(f"{key}: {json.dumps(HOSTILE)}\n" for key in ("method", "model", "data", "rank"))
    )
    shown = 0
    for name in (
        "summary.json",
        "spectra.json",
        "directions.json",
        "ranks.jsonl",
        "metrics.jsonl",
        "validation.jsonl",
    ):
        path = run.path / name
        whole = path.read_text()
        first, *rest = [json.dumps(json.loads(whole))] if name.endswith("n") else whole.split("\n")
        for place in places(json.loads(first)):
            path.write_text("\n".join([json.dumps(changed(json.loads(first), place, HOSTILE)), *rest]))
            try:
                text = page(read_run(run.path), {HOSTILE: b""})
            except CommandError:
                continue
            assert Page(text).inline == []
            shown += HOSTILE in Page(text).text
        path.write_text(whole)
    assert shown >= 6  # state, warning, version; pruned and expanded matrices, warnings of a change


def test_a_run_still_going_on_shows_the_lives_of_its_directions_so_far(tmp_path: Path) -> None:
    run = write_run(tmp_path, finished=False, spectra=False)
    found = births_of(read_run(run.path))
    assert found is not None and found.loss == "–"
    assert [row["born at step"] for row in found.changes] == ["10", "20", "30"]
    assert [row["last λ"] for row in found.directions] == ["0.2000", "0.1000", "–"]
    assert {row["rise of the loss without"] for row in found.changes} == {"–"}


def test_lines_go_from_the_birth_to_the_end_and_medians_are_of_what_is_seen() -> None:
    story = NewDirection("a", 10, "gradient", lam=[[20, -0.5], [30, None]], lam_end=0.75)
    assert line_of(story, 40) == [(10, 0.0), (20, 0.5), (40, 0.75)]
    assert medians_of([[(10, 0.0), (20, 1.0)], [(10, 0.0), (20, 2.0), (30, 4.0)]]) == [
        (10, 0.0),
        (20, 1.5),
        (30, 4.0),
    ]


def test_the_table_of_single_directions_is_bounded_by_the_largest(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path).path)
    births = [NewDirection("a", 10, "gradient", lam_end=i / 1000) for i in range(MOST_DIRECTIONS + 50)]
    found = births_of(replace(run, births=births, worth={}))
    assert found is not None and len(found.directions) == MOST_DIRECTIONS
    assert found.total == MOST_DIRECTIONS + 50 and found.directions[0]["last λ"] == "0.2490"
    assert found.changes[0]["|λ| of these, median"] == "0.12"


def test_a_market_that_traded_nothing_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path, changes=1)
    market = {
        "gain": {"a": 0.002, "b": 0.001},
        "loss": {"a": 0.05, "b": 0.03},
        "expected_gain": 0.0,
        "expected_loss": 0.0,
    }
    ranks = dict.fromkeys(NAMES, 4)
    run.log_rank_change(rank_change(20, ranks) | {"market": market, "pruned": [], "expanded": []})
    run.log_rank_change(rank_change(30, ranks) | {"market": market | {"expected_gain": 0.2}})
    shown = Page(page(read_run(run.path), {})).text
    assert "traded nothing: best gain 0.002 against cheapest loss 0.03" in shown
    assert "expected gain 0.2 for loss 0" in shown


NAMES_OF_FOLDERS = ["$", "_run", "a $\\frac$ b", "caf\udce9", "x\ny", "%s {0} #"]


@pytest.mark.parametrize(
    "name", ["cost_$5_to_$9", *(pytest.param(name, marks=pytest.mark.full) for name in NAMES_OF_FOLDERS)]
)
def test_a_folders_name_is_no_markup(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / name)
    index = build_report(run.path)
    assert len(Page(index.read_text()).images) == 4
    assert name in Page(index.read_text()).text or not name.isprintable()


def test_a_file_in_the_place_of_the_report_is_no_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run.path / "report").write_text("mine")
    assert main([str(run.path)]) == 1
    assert f"File exists ({run.path}/report); see what is there" in capsys.readouterr().err
    assert (run.path / "report").read_text() == "mine"


def test_signs_that_the_font_lacks_are_no_remarks(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = write_run(tmp_path / "漢字")
    build_report(run.path)
    assert any("missing from" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    assert main([str(run.path)]) == 0
    assert not list(recwarn)


def test_names_of_matrices_are_no_mathematics(tmp_path: Path) -> None:
    names = {name: f"model.$x_{name}^$" for name in NAMES}
    run = write_run(tmp_path / "run")
    for path in run.path.glob("*.json*"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        path.write_text(text)
    assert len(Page(build_report(run.path).read_text()).images) == 4
