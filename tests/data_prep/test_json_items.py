"""Reading items from files that are damaged, endless, or made to be trouble: one line, in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pytest

import data_prep.json_items as json_items
from data_prep.json_items import iter_objects
from data_prep.records import is_chat, load_entries
from flexlora_ds.errors import UserError

GOOD = b'{"instruction": "q", "output": "a"}'
RECORD = {"instruction": "q", "output": "a"}
DIGITS = b'{"instruction": "q", "output": "a", "id": ' + b"9" * 5000 + b"}"


def write(folder: Path, data: bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def fault_of(path: Path, number: int) -> str:
    """The one line that reading ends with, at this record; those before it come whole."""
    found = []
    with pytest.raises(UserError) as error:
        for item in iter_objects(path):
            found.append(item)
    line = str(error.value)
    assert found == [(place, RECORD) for place in range(1, number)]
    assert f"({path}, record {number})" in line and line.isprintable()
    return line


@pytest.mark.parametrize(("before", "between", "after"), [(b"[", b", ", b"]"), (b"", b"\n", b"\n")])
@pytest.mark.parametrize(("packed", "number"), [(False, 1), (False, 3), (False, 9_000), (True, 1), (True, 3)])
@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b'{"instruction": "caf\xe9", "output": "a"}', "not UTF-8: byte 0xe9 after"),
        (b'{"instruction": "\xc3", "output": "a"}', "not UTF-8: byte 0xc3 after"),
        (b'{"instruction": "\xed\xa0\x80"}', "not UTF-8: byte 0xed after"),
        (DIGITS, "a number has thousands of digits"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"output": "a", "output": "b"}', "the key 'output' stands twice in one object"),
        (b'{"output": "a\tb"}', "Invalid control character"),
        (b'{"output" "a"}', "Expecting ':' delimiter"),
    ],
)
def test_a_fault_is_named_where_it_is(
    tmp_path: Path,
    before: bytes,
    between: bytes,
    after: bytes,
    packed: bool,
    number: int,
    bad: bytes,
    fault: str,
) -> None:
    data = before + between.join([GOOD] * (number - 1) + [bad] + [GOOD] * 3) + after
    path = write(tmp_path, gzip.compress(data) if packed else data)
    assert fault in fault_of(path, number)


def test_another_encoding_is_called_that(tmp_path: Path) -> None:
    assert "not UTF-8: byte 0xff" in fault_of(write(tmp_path, json.dumps([RECORD]).encode("utf-16")), 1)


@pytest.mark.parametrize("form", [b"[%s]", b"%s\n"])
def test_a_record_without_end_is_refused_before_it_is_held(tmp_path: Path, form: bytes) -> None:
    long = b'{"instruction": "%s", "output": "a"}' % (b"word " * 6_000_000)  # 30 MB
    path = write(tmp_path, form % long)
    del long
    tracemalloc.start()
    assert "longer than 4,194,304 characters" in fault_of(path, 1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20
    assert len(list(iter_objects(write(tmp_path, form % (b'{"a": "%s"}' % (b"x" * 4_000_000)))))) == 1


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not an ordinary file"):
            is_chat(path)


def test_a_small_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_items, "_GIB", 1 << 20)
    for filler in (b" ", b"\n", GOOD + b"\n"):
        data = gzip.compress(GOOD + b"\n" + filler * (3_000_000 // len(filler)))
        with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
            load_entries(write(tmp_path, data, "data.jsonl.gz"))


@pytest.mark.parametrize("data", [b" " * 3_000_000, b"\n" * 3_000_000 + GOOD])
def test_white_space_without_end_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match="megabyte of white space"):
        is_chat(write(tmp_path, data))


@pytest.mark.parametrize("key", ["instruction", "output", "answer"])
def test_lone_surrogates_are_no_text(tmp_path: Path, key: str) -> None:
    record = {**RECORD, key: "a \udc80 b"}
    with pytest.raises(UserError, match=f"{key!r} holds a lone surrogate.*record 1"):
        load_entries(write(tmp_path, json.dumps([record]).encode()))


ARRAY = json.dumps([RECORD]).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lzma.compress(ARRAY), "packed with xz, not JSON ({path}); unpack it"),
        (bz2.compress(ARRAY), "packed with bzip2, not JSON ({path}); unpack it"),
        (b"PAR1\x15\x04PAR1", "a Parquet file, not JSON ({path}); make JSON lines of it with datasets"),
        (b"PK\x03\x04\x14", "a zip archive, not JSON ({path}); unpack it"),
        (b"\x28\xb5\x2f\xfd\x04", "packed with zstd, not JSON ({path}); unpack it"),
        (
            b"instruction,output\nq,a\n",
            "record 1); records are an array or one object a line; make that of a CSV",
        ),
        (
            json.dumps(RECORD, indent=2).encode(),
            "record 1); each record stands on one line, or all in one array",
        ),
        (GOOD + b"\n" + GOOD[:-1] + b"\n" + GOOD, "record 2); each record stands on one line"),
        (GOOD + b"\n" + b'{"a" 1}\n', "record 2); correct or remove it"),
        (ARRAY[:-1], "record 2); correct or remove it"),
        (gzip.compress(ARRAY, mtime=0)[:-9], "record 1); the packed file is damaged: copy or make it again"),
        (gzip.compress(ARRAY, mtime=0)[:-8] + b"12345678", "record 1); the packed file is damaged"),
    ],
)
def test_the_remedy_fits_what_the_file_is(tmp_path: Path, data: bytes, said: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(UserError) as error:
        load_entries(path)
    assert said.format(path=path) in str(error.value) and str(error.value).isprintable()
