"""Whole builds from a local folder: bytes, manifest, verdicts, order, repetition, interruption, bad input."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.convert import encode
from data_prep.published.files import CORPUS, Published
from data_prep.published.order import SEPARATOR, framed
from data_prep.records import load_records
from data_prep.sources import LocalSource
from data_prep.tasks import TASKS, Task
from flexlora_ds.errors import UserError
from tests.helpers.raw_rows import ROWS, WINOGRANDE_PARTS, winogrande, write_raw, write_split

FILES = [*(f"{task}/{kind}.json" for task in TASKS for kind in ("train", "test")), CORPUS]


def expected(parts: tuple[str, ...] = WINOGRANDE_PARTS) -> dict[str, str]:
    """The files' texts by the plain definition: `json.dumps(records, indent=4)` of all rows in order."""
    texts, corpus = {}, []
    for task in TASKS.values():
        train = (
            [row for part in parts for row in winogrande(part)]
            if task.name == "winogrande"
            else ROWS[task.name]
        )
        test = winogrande("validation") if task.name == "winogrande" else ROWS[task.name]
        corpus += [task.record(row) for row in train]
        texts[f"{task.name}/train.json"] = json.dumps([task.record(row) for row in train], indent=4)
        texts[f"{task.name}/test.json"] = json.dumps([task.record(row) for row in test], indent=4)
    return {**texts, CORPUS: json.dumps(corpus, indent=4)}


def as_published(texts: dict[str, str]) -> dict[str, Published]:
    return {
        name: Published(len(json.loads(text)), len(text), hashlib.sha256(text.encode()).hexdigest())
        for name, text in texts.items()
    }


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def verdicts(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["verdict"] for name, entry in manifest["files"].items()}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw")


@pytest.mark.parametrize("packed", [False, True])
def test_every_file_is_the_plain_json_dump(tmp_path: Path, packed: bool) -> None:
    out, texts = tmp_path / "data", expected()
    built = build(
        LocalSource(write_raw(tmp_path / "raw", packed)), out, Options(), published=as_published(texts)
    )
    assert {name: (out / name).read_text() for name in FILES} == texts
    assert set(verdicts(built.manifest).values()) == {"identical"}
    assert {str(path.relative_to(out)) for path in out.rglob("*.json")} == {*FILES, "manifest.json"}
    assert load_records(out / CORPUS, need_answer=True) == json.loads(texts[CORPUS])


def test_the_manifest_says_where_everything_came_from(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "data"
    build(LocalSource(raw), out, Options())
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["files"]) == FILES and manifest["missing"] == []
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        assert entry["records"] == entry["rows"] == len(json.loads(data)) and entry["verdict"] == "partial"
    sources = manifest["files"]["winogrande/train.json"]["sources"]
    assert [Path(source["source"]).name for source in sources] == [
        f"train_{part}.jsonl" for part in WINOGRANDE_PARTS
    ]
    assert [source["rows"] for source in sources] == [2] * 6
    file = raw / "winogrande" / "train_xs.jsonl"
    assert sources[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_unknown_orders_are_found_by_hash(tmp_path: Path, raw: Path) -> None:
    texts = expected(("m", "xs", "debiased", "s", "xl", "l"))
    order = [
        "ARC-Challenge",
        "ARC-Easy",
        "boolq",
        "hellaswag",
        "openbookqa",
        "piqa",
        "social_i_qa",
        "winogrande",
    ]
    corpus = [record for name in order for record in json.loads(texts[f"{name}/train.json"])]
    texts[CORPUS] = json.dumps(corpus, indent=4)
    out = tmp_path / "data"
    built = build(LocalSource(raw), out, Options(), published=as_published(texts))
    files = built.manifest["files"]
    assert set(verdicts(built.manifest).values()) == {"identical"}
    assert files["winogrande/train.json"]["order"].endswith(
        "train_m, train_xs, train_debiased, train_s, train_xl, train_l"
    )
    assert files[CORPUS]["order"].endswith(", ".join(order))
    assert {name: (out / name).read_text() for name in FILES} == texts


def test_where_no_order_fits_the_natural_one_stays_and_that_is_said(tmp_path: Path, raw: Path) -> None:
    texts = expected()
    wanted = as_published(texts)
    wanted["winogrande/train.json"] = wanted["winogrande/train.json"]._replace(sha256="0" * 64)
    built = build(LocalSource(raw), tmp_path / "data", Options(), published=wanted)
    entry = built.manifest["files"]["winogrande/train.json"]
    assert (
        entry["verdict"] == "differs" and "all orders tried" in entry["order"] and "natural" in entry["order"]
    )
    assert (tmp_path / "data/winogrande/train.json").read_text() == texts["winogrande/train.json"]
    assert built.manifest["files"][CORPUS]["verdict"] == "identical"  # the natural order needs no search


def test_a_difference_is_counted_and_shown(tmp_path: Path, raw: Path) -> None:
    texts = expected()
    records = json.loads(texts["piqa/test.json"])
    records[1]["instruction"] = records[1]["instruction"].replace("lamp", "light")
    theirs = tmp_path / "published" / "piqa"
    theirs.mkdir(parents=True)
    texts["piqa/test.json"] = json.dumps(records, indent=4)
    (theirs / "test.json").write_text(texts["piqa/test.json"])
    built = build(
        LocalSource(raw),
        tmp_path / "data",
        Options(published=tmp_path / "published"),
        published=as_published(texts),
    )
    entry = built.manifest["files"]["piqa/test.json"]
    assert entry["verdict"] == "differs"
    assert (
        "1 byte" in entry["detail"]
        and "1 record differs; the first: record 2: 'instruction'" in entry["detail"]
    )
    assert "lamp" in entry["detail"] and "light" in entry["detail"]


def test_a_missing_split_is_left_out_or_an_error(tmp_path: Path, raw: Path) -> None:
    (raw / "winogrande" / "train_xl.jsonl").rename(raw / "winogrande" / "train_extra.jsonl")
    shutil.rmtree(raw / "piqa")
    with pytest.raises(UserError, match=r"piqa/train\.jsonl is not there"):
        build(LocalSource(raw), tmp_path / "data", Options(strict=True))
    assert not (tmp_path / "data").exists()
    built = build(LocalSource(raw), tmp_path / "data", Options())
    assert len(built.manifest["missing"]) == 3
    assert (
        "winogrande/train_xl.jsonl" in built.manifest["missing"][2]
        and "train_extra" in built.manifest["missing"][2]
    )
    files = built.manifest["files"]
    assert "piqa/train.json" not in files and files["winogrande/train.json"]["records"] == 10
    write_split(raw, "winogrande", "train_xl", winogrande("xl"))  # now it is there: rebuilt without --force
    again = build(LocalSource(raw), tmp_path / "data", Options())
    assert not again.unchanged and again.manifest["files"]["winogrande/train.json"]["records"] == 12


def test_tasks_limit_and_seed(tmp_path: Path, raw: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i % 2 == 0} for i in range(50)]
    write_split(raw, "boolq", "train", rows)
    everything = [TASKS["boolq"].record(row) for row in rows]

    def train(name: str, **options: Any) -> list[Any]:
        built = build(LocalSource(raw), tmp_path / name, Options(tasks=("boolq", "winogrande"), **options))
        assert len(built.manifest["files"]) == 5
        found: list[Any] = json.loads((tmp_path / name / "boolq/train.json").read_text())
        return found

    assert train("first", limit=7) == everything[:7]
    drawn = train("drawn", limit=7, seed=1)
    assert drawn == [record for record in everything if record in drawn] and drawn != everything[:7]
    assert train("again", limit=7, seed=1) == drawn and train("other", limit=7, seed=2) != drawn
    assert train("all", limit=100, seed=1) == everything
    assert len(json.loads((tmp_path / "first/winogrande/train.json").read_text())) == 7


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


@given(
    st.lists(
        st.builds(dict, **{key: st.text() for key in ("instruction", "input", "output", "answer")}),
        min_size=1,
    )
)
def test_any_text_is_encoded_as_json_does(records: list[Any]) -> None:
    encoded = b"".join(framed([SEPARATOR.join(encode(record).encode() for record in records)]))
    assert encoded.decode() == json.dumps(records, indent=4)


def test_a_ninth_task_is_one_definition(tmp_path: Path) -> None:
    def convert(row: Any) -> tuple[str, str]:
        return f"Is {row['n']} even?\n\nAnswer format: yes/no", "no" if row["n"] % 2 else "yes"

    test = TASKS["openbookqa"].test
    parity = Task("parity", convert, "yes|no", hub=(), test=test, version=3, in_corpus=False)
    for split in ("train", "test"):
        write_split(tmp_path / "raw", "parity", split, [{"n": n} for n in range(4)])
    built = build(
        LocalSource(tmp_path / "raw"), tmp_path / "data", Options(tasks=("parity",)), tasks={"parity": parity}
    )
    assert verdicts(built.manifest) == {"parity/train.json": "unpublished", "parity/test.json": "unpublished"}
    assert built.manifest["request"]["tasks"] == {"parity": 3}
    records = load_records(tmp_path / "data/parity/test.json")
    assert [record["answer"] for record in records] == ["yes", "no", "yes", "no"]
    assert parity.answers(records[0]) == ["yes", "no"]


def test_the_command(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(raw), "--out", str(tmp_path / "data")]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert (
        "boolq/train.json" in first
        and "partial" in first
        and "2 of 9,427 records" in first
        and "wrote" in first
    )
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "boolqq"], "did you mean boolq?"),
        (["--tasks", ","], "names no task"),
        (["--limit", "0"], "'0' is not a whole number above 0"),
        (["--sauce", "x"], "unknown option '--sauce' (command line); did you mean --source?"),
        (["--source", "no/such/folder"], "no such folder (no/such/folder)"),
        (["--demo", "--source", "x"], "--demo and --source exclude each other"),
    ],
)
def test_the_command_explains_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "data").exists()


REAL_ROWS = Path(os.environ.get("FLEXLORA_RAW_DATA") or Path(__file__).parents[3] / "shared" / "data" / "raw")


@pytest.mark.skipif(
    not REAL_ROWS.is_dir(), reason="no real rows at ../shared/data/raw or in $FLEXLORA_RAW_DATA"
)
def test_real_rows_give_the_published_files(tmp_path: Path) -> None:
    built = build(LocalSource(REAL_ROWS), tmp_path / "data", Options())
    identical = {name for name, verdict in verdicts(built.manifest).items() if verdict == "identical"}
    assert identical >= {
        f"{task}/train.json" for task in ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
    }
    assert "differs" not in verdicts(built.manifest).values()


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
