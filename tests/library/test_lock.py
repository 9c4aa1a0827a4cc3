"""The lock on a file: refused or waited for, named, and gone with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora_ds.errors import RunError
from flexlora_ds.files.lock import locked

HOLD = """
import pathlib, sys
from flexlora_ds.errors import RunError
from flexlora_ds.files.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def refuse(holder: str) -> None:
    raise RuntimeError(holder)


def test_who_holds_it_is_named_and_a_kill_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        for _ in range(2):  # being refused leaves the name
            with pytest.raises(RuntimeError, match=f"process {holder.pid} on "), locked(path, refuse):
                pass
        waited: list[str] = []

        def wait(name: str) -> None:
            waited.append(name)
            holder.send_signal(signal.SIGKILL)

        with locked(path, wait) as held:
            assert held and len(waited) == 1
    with locked(path, refuse) as held:
        assert held


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_all_go_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", without)
    with locked(tmp_path / "lock", refuse) as held:
        assert not held


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_file_in_the_locks_place_is_named_and_kept(tmp_path: Path, kind: str) -> None:
    path, mine = tmp_path / ".lock", tmp_path / "mine"
    if kind == "link":
        mine.write_text("mine")
    if "link" in kind:
        path.symlink_to(mine)
    else:
        (Path.mkdir if kind == "folder" else os.mkfifo)(path)
    with pytest.raises(RunError, match=r"in the place of a lock file \(.*\.lock\); remove it"), locked(path):
        pass
    assert (mine.read_text() == "mine") if kind == "link" else not mine.exists()
