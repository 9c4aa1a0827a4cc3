"""Files from outside: what is no ordinary file, no UTF-8 or no JSON ends in one line, soon and in little memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexlora_ds.errors import UserError
from flexlora_ds.files.reading import open_ordinary, read_json, read_json_object, read_text


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": ["λ", 1.5, null]}', encoding="utf-8")
    assert read_json(path) == {"a": ["λ", 1.5, None]}
    assert read_json_object(path) == {"a": ["λ", 1.5, None]}
    assert read_text(path) == '{"a": ["λ", 1.5, null]}'


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "missing", "null", "loop"])
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = {"device": Path("/dev/zero"), "null": Path("a\0b")}.get(kind, tmp_path / kind)
    with pytest.raises(UserError, match=r"(ordinary|no such|no file can|cannot be read).*; give another"):
        open_ordinary(path, "give another")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", r"not valid JSON: Expecting.* \(.*a.json, line 1\)"),
        (b'{"a": 1,\n"b": }', "line 2"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": "\xe9"}', r"not UTF-8: .* at byte 7"),
        (b"", "not valid JSON"),
        (b" " * 3000, "longer than 0 MiB"),
    ],
    ids=["open", "second line", "arrays", "objects", "digits", "latin-1", "empty", "long"],
)
def test_whatever_the_json_library_raises_is_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        read_json(path, limit=2_000 if len(content) == 3000 else 1 << 22)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"a"'])
def test_another_value_than_an_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="where an object is expected"):
        read_json_object(tmp_path / "a.json")
