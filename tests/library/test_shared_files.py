"""The shared ground of what writes files: whole texts, hashes, locks."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.folders import bring_to_disk
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.files.lock import locked, take_lock


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_that_of_the_whole_content(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(min(size, 4096))) * (size // 4096 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_files_and_folders_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda number: flushed.append(Path(f"/proc/self/fd/{number}").readlink())
    )
    (tmp_path / "file").write_text("x")
    bring_to_disk(tmp_path / "file")
    bring_to_disk(tmp_path)
    assert flushed == [tmp_path / "file", tmp_path]


def refuse(holder: str) -> None:
    raise RunError(f"held by {holder}")


def test_a_second_holder_waits_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", refuse):
        started = time.monotonic()
        with (
            pytest.raises(RunError, match=f"held by process {os.getpid()}"),
            locked(tmp_path / ".lock", refuse, patience=0.5),
        ):
            pass
        assert time.monotonic() - started >= 0.5
    with locked(tmp_path / ".lock", refuse) as held:
        assert held


def test_a_folder_can_be_locked_and_names_no_holder(tmp_path: Path) -> None:
    def busy(holder: str) -> None:
        raise UserError(holder)

    one, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        assert take_lock(one, busy)
        with pytest.raises(UserError, match="another process"):
            take_lock(other, busy)
    finally:
        os.close(one)
        os.close(other)
    assert not list(tmp_path.iterdir())
