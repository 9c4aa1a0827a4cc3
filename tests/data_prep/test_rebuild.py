"""Builds over what is there: repeated, out of date, interrupted, killed, beside files of others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.published.files import CORPUS
from data_prep.records import load_records
from data_prep.sources import LocalSource
from flexlora_ds.errors import UserError
from tests.helpers.built_files import FILES, snapshot
from tests.helpers.raw_rows import ROWS, write_raw, write_split


def test_a_second_run_does_nothing(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "data"
    assert not build(LocalSource(raw), out, Options()).unchanged
    before = snapshot(out)
    assert "up to date: 17 files" in build(LocalSource(raw), out, Options()).unchanged
    assert snapshot(out) == before
    assert not build(LocalSource(raw), out, Options(force=True)).unchanged
    after = snapshot(out)
    assert {name: data for name, (data, _) in after.items()} == {
        name: data for name, (data, _) in before.items()
    }
    assert all(after[name][1] != before[name][1] for name in FILES)


@pytest.mark.parametrize("damage", ["changed", "gone", "source", "manifest"])
def test_what_is_out_of_date_is_rebuilt(tmp_path: Path, raw: Path, damage: str) -> None:
    out = tmp_path / "data"
    build(LocalSource(raw), out, Options())
    if damage == "changed":
        (out / CORPUS).write_text("[]")
    elif damage == "gone":
        (out / "piqa/test.json").unlink()
    elif damage == "source":
        write_split(raw, "boolq", "train", ROWS["boolq"][:1])
    else:
        (out / "manifest.json").write_text("{")
        with pytest.raises(UserError, match="was not built by this command"):
            build(LocalSource(raw), out, Options())
    assert not build(LocalSource(raw), out, Options(force=damage == "manifest")).unchanged
    assert build(LocalSource(raw), out, Options()).unchanged
    assert len(load_records(out / "boolq/train.json")) == (1 if damage == "source" else 2)


def test_other_builds_and_foreign_files_are_not_overwritten(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "data"
    (out / "piqa").mkdir(parents=True)
    (out / "piqa/train.json").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    with pytest.raises(UserError, match=r"piqa/train\.json is already there.*--force"):
        build(LocalSource(raw), out, Options())
    assert sorted(snapshot(out)) == ["notes.txt", "piqa/train.json"]
    build(LocalSource(raw), out, Options(force=True))
    with pytest.raises(UserError, match=r"other settings.*--force"):
        build(LocalSource(raw), out, Options(tasks=("boolq",)))
    build(
        LocalSource(raw), out, Options(tasks=("boolq",), force=True)
    )  # the other tasks' files go with the old build
    assert sorted(snapshot(out)) == sorted(
        ["boolq/test.json", "boolq/train.json", CORPUS, "manifest.json", "notes.txt"]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"goal": "g", "sol1": "a", "label": 0}, r"'sol2' is missing \(.*piqa/train\.jsonl, row 3\)"),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": 9}, r"label 9 .*row 3"),
        ([1], r"a list where a row"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path: Path, raw: Path, row: Any, message: str) -> None:
    write_split(raw, "piqa", "train", [*ROWS["piqa"], row])
    with pytest.raises(UserError, match=message):
        build(LocalSource(raw), tmp_path / "new", Options())
    assert not (tmp_path / "new").exists()


def test_an_empty_split_is_an_error_and_an_old_build_stays(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "data"
    build(LocalSource(raw), out, Options())
    before = snapshot(out)
    (raw / "boolq/validation.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty \(.*boolq/validation\.jsonl\)"):
        build(LocalSource(raw), out, Options())
    assert snapshot(out) == before


def test_a_stop_request_leaves_nothing(
    tmp_path: Path,
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs, and the tests with them, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for number in (signal.SIGTERM, signal.SIGINT):
        opened: list[Any] = []

        def stopped(*args: Any, number: int = number, opened: list[Any] = opened) -> Any:
            opened.append(args)
            if len(opened) == 9:
                os.kill(os.getpid(), number)
            return LocalSource.open(*args)

        monkeypatch.setattr("data_prep.__main__.LocalSource", type("S", (LocalSource,), {"open": stopped}))
        assert main(["--source", str(raw), "--out", str(tmp_path / "data")]) == 128 + number
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: interrupted")
        assert not (tmp_path / "data").exists() and signal.getsignal(signal.SIGTERM) == handler


def test_one_build_at_a_time(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "data"
    faults = []

    def meanwhile(text: str) -> None:
        with pytest.raises(UserError, match="another build is writing") as error:
            build(LocalSource(raw), out, Options())
        faults.append(error)

    build(LocalSource(raw), out, Options(), log=meanwhile)
    assert faults and len(snapshot(out)) == 18


class _Killed:
    """Kills its own process at the n-th call: what `kill -9` does, at a chosen moment."""

    def __init__(self, call: Callable[..., Any], moment: int) -> None:
        self.call, self.left = call, moment

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.call(*args)


def _build_and_die(raw: Path, out: Path, where: str, moment: int) -> None:
    source = LocalSource(raw)
    if where == "reading":
        source.open = _Killed(source.open, moment)  # type: ignore[method-assign]
    else:
        killed = _Killed(Path.replace, moment)
        Path.replace = lambda *args: killed(*args)  # type: ignore[method-assign]
    build(source, out, Options(force=True))


@pytest.mark.parametrize(
    ("where", "moment"), [("reading", 0), ("reading", 9), ("moving", 0), ("moving", 8), ("moving", 17)]
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_killed_build_leaves_the_old_or_the_new(
    tmp_path: Path, raw: Path, where: str, moment: int, fresh: bool
) -> None:
    out = tmp_path / "data"
    if not fresh:
        build(LocalSource(raw), out, Options())
        write_split(raw, "boolq", "train", ROWS["boolq"][:1])
    for _ in range(2):  # a run that clears up after a killed one may be killed itself
        process = multiprocessing.get_context("fork").Process(
            target=_build_and_die, args=(raw, out, where, moment)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    if where == "reading":  # nothing of the new build shows
        names = {name for name in snapshot(out) if not name.startswith(".building/")}
        assert names == (set() if fresh else {*FILES, "manifest.json"})
    again = build(LocalSource(raw), out, Options())  # no --force: it knows what was interrupted
    assert bool(again.unchanged) == (where == "moving")  # there, only the moves had to be finished
    assert set(snapshot(out)) == {*FILES, "manifest.json"}
    build(LocalSource(raw), tmp_path / "clean", Options())
    assert {name: data for name, (data, _) in snapshot(out).items()} == {
        name: data for name, (data, _) in snapshot(tmp_path / "clean").items()
    }


@pytest.mark.parametrize("name", [".building", ".ready"])
def test_a_scratch_folder_that_no_build_wrote_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    raw, mine = tmp_path / "raw", tmp_path / "out" / name / "mine"
    write_raw(raw)
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"holds \{name}, which no build of this version wrote"):
        build(LocalSource(raw), tmp_path / "out", Options(force=True))
    assert mine.read_text() == "mine"


def test_a_file_that_an_earlier_build_did_not_write_stays(tmp_path: Path) -> None:
    """A manifest of somebody else lists a file; a file of ours was changed by hand: neither is removed."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw)
    build(LocalSource(raw), out, Options(tasks=("boolq", "piqa")))
    (out / "piqa" / "train.json").write_text("mine")
    (out / "thesis.tex").write_text("mine")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["thesis.tex"] = {"sha256": "0"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    build(LocalSource(raw), out, Options(tasks=("boolq",), force=True))
    assert (out / "piqa" / "train.json").read_text() == (out / "thesis.tex").read_text() == "mine"
    assert not (out / "piqa" / "test.json").exists(), "this one was as the build wrote it"
