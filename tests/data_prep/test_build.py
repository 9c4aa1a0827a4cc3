"""Whole builds from a local folder: bytes, manifest, verdicts, order, options, the command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
from tests.helpers.built_files import FILES, expected
from tests.helpers.raw_rows import WINOGRANDE_PARTS, winogrande, write_raw, write_split


def as_published(texts: dict[str, str]) -> dict[str, Published]:
    return {
        name: Published(len(json.loads(text)), len(text), hashlib.sha256(text.encode()).hexdigest())
        for name, text in texts.items()
    }


def verdicts(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["verdict"] for name, entry in manifest["files"].items()}


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
