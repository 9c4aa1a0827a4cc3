"""The compiled extension: abandoned locks are removed, live ones waited for."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexlora_ds import extensions
from flexlora_ds.errors import UserError
from flexlora_ds.extensions import EXTENSION, lock_files_block, prepare_extensions, release_abandoned_lock
from tests.helpers.processes import run_script

HOLD = (
    "import sys; from torch.utils.file_baton import FileBaton; FileBaton(sys.argv[1]).try_acquire(); input()"
)
COMPILE = """
import sys
from torch.utils.cpp_extension import load
load("tiny", [sys.argv[1] + "/tiny.cpp"], build_directory=sys.argv[2], is_python_module=False)
print("loaded")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / EXTENSION
    folder.mkdir()
    return folder


@contextmanager
def python(code: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_nothing_to_do_without_a_lock(folder: Path) -> None:
    assert release_abandoned_lock(folder) is False


def test_a_lock_without_its_owner_is_removed(folder: Path) -> None:
    (folder / "lock").touch()
    assert release_abandoned_lock(folder) is True
    assert not (folder / "lock").exists()


def test_a_lock_that_torch_holds_is_kept_until_its_owner_is_killed(folder: Path) -> None:
    lock = folder / "lock"
    with python(HOLD, str(lock)) as owner:
        wait_for(lock)
        released: list[bool] = []
        waiter = threading.Thread(
            target=lambda: released.append(release_abandoned_lock(folder, abandoned_after=0))
        )
        waiter.start()
        waiter.join(1.0)
        assert waiter.is_alive()
        assert lock.exists()
        owner.kill()
        owner.wait()
        waiter.join(10)
    assert released == [True]
    assert not lock.exists()


def test_a_compiler_that_outlived_its_owner_is_waited_for(folder: Path) -> None:
    (folder / "lock").touch()
    started = time.monotonic()
    with subprocess.Popen(["sleep", "1"], cwd=folder):
        assert release_abandoned_lock(folder) is True
    assert time.monotonic() - started >= 0.9


def test_where_processes_cannot_show_it_age_decides(folder: Path) -> None:
    lock = folder / "lock"
    lock.touch()
    waiter = threading.Thread(
        target=release_abandoned_lock, args=(folder,), kwargs={"trust_processes": False}
    )
    waiter.start()
    waiter.join(0.6)
    assert waiter.is_alive()
    for path in (lock, folder):
        os.utime(path, (1, 1))
    waiter.join(10)
    assert not waiter.is_alive()
    assert not lock.exists()


def test_a_build_killed_half_way_no_longer_blocks_the_next(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tiny.cpp").write_text("int answer() { return 42; }\n")
    slow = tmp_path / "slow-c++"
    slow.write_text('#!/bin/sh\ncase "$*" in *-c*) sleep 2;; esac\nexec c++ "$@"\n')
    slow.chmod(0o755)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    arguments = (COMPILE, str(tmp_path), str(folder))
    with python(*arguments, CXX=str(slow), PATH=programs) as killed:
        wait_for(folder / "build.ninja")
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert (folder / "lock").exists()
    assert release_abandoned_lock(folder) is True
    with python(*arguments, PATH=programs) as again:
        assert again.communicate(timeout=60)[0] == "loaded\n"
    assert (folder / "lock").exists() is not lock_files_block()


def test_a_file_that_stays_and_holds_nothing_is_not_waited_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch from 2.14 on; on a file system without locks its file was waited for, up to a quarter of an hour."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
    monkeypatch.setattr(extensions, "locked", lambda path: contextlib.nullcontext(False))
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    monkeypatch.setattr(type(builder), "load", lambda self, verbose: None)
    for name in ("lock", f"{EXTENSION}.so"):
        (folder / name).touch()
    assert prepare_extensions() == folder
    assert (folder / "lock").exists()


def test_without_a_compiler_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    with pytest.raises(UserError, match=r"`no-such-compiler` is not on PATH.*install g\+\+"):
        prepare_extensions()


def test_it_says_that_it_compiles_and_what_to_do_when_that_fails(tmp_path: Path) -> None:
    """As a script of one's own asks for it, with the lock of an interrupted start in the way."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / EXTENSION).mkdir()
    (tmp_path / EXTENSION / "lock").touch()
    # In a process of its own: DeepSpeed compiles nothing where a test before has loaded the extension.
    script = "import flexlora_ds; flexlora_ds.prepare_extensions()"
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": str(compiler), "DS_ACCELERATOR": "cpu"}
    (result,) = run_script(["-c", script], 1, env=variables)
    assert f"compiling DeepSpeed's {EXTENSION}, once: about a minute" in result.stderr
    assert "RunError: DeepSpeed's deepspeed_shm_comm does not compile or load" in result.stderr
    assert "remove that folder and run `python -m flexlora_ds.extensions`" in result.stderr


def test_the_environments_own_ninja_is_used_whatever_is_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    with pytest.raises(UserError):
        prepare_extensions()
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")


def test_the_command_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    (result,) = run_script(["-m", "flexlora_ds.extensions"], 1, env=variables)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: no C++ compiler")
    assert "Traceback" not in result.stderr
