"""DeepSpeed's compiled extension, ready before a run starts.

On the CPU `deepspeed.init_distributed` compiles `deepspeed_shm_comm` at run time (DeepSpeed 0.19.8,
deepspeed/comm/torch.py): about a minute, and torch before 2.14 marks the folder with a file `lock` while it compiles
(torch/utils/file_baton.py). A compiling process that is killed leaves that file behind, and every later start
waits for it without end. `prepare_extensions` compiles into the virtual environment beforehand and removes
such a file; `python -m flexlora_ds.extensions` does so from the command line. In a script of one's own it comes before
whatever begins communication: `deepspeed.initialize`, or the Trainer's `TrainingArguments(deepspeed=…)`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.lock import locked
from flexlora_ds.terminal.command import exit_code_of

EXTENSION = "deepspeed_shm_comm"
LOCK = "lock"
ABANDONED_AFTER = 900.0  # seconds without a change in a folder whose builder cannot be looked up
POLL = 0.2  # seconds


def prepare_extensions() -> Path | None:
    """Have the communication extension compiled and loaded; its folder, or None where no CPU needs it.

    A line on stderr says when it has to be compiled, which takes about a minute.
    Sets TORCH_EXTENSIONS_DIR to the environment's `torch_extensions` when it is unset, and puts the
    environment's programs first on PATH. One process at a time compiles; the others wait for it.
    Raises UserError without a C++ compiler, RunError when compiling fails.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_default_root())))
    _prefer_own_programs()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return None
    folder = root / EXTENSION
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".prepare") as alone:  # False on a file system without locks
        if lock_files_block():
            release_abandoned_lock(folder, trust_processes=alone)
        if not (folder / f"{EXTENSION}.so").exists():
            _require_compiler()
            print(
                f"compiling DeepSpeed's {EXTENSION}, once: about a minute ({folder})",
                file=sys.stderr,
                flush=True,
            )
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as fault:
            raise RunError(
                f"DeepSpeed's {EXTENSION} does not compile or load",
                f"{folder}: {_first_line(fault)}",
                "remove that folder and run `python -m flexlora_ds.extensions`",
            ) from fault
    return folder


def lock_files_block() -> bool:
    """Whether this torch waits for the file to go, and not, as from 2.14 on, for a lock that ends with its owner.

    The file then stays for ever, and says nothing.
    """
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


def release_abandoned_lock(
    folder: Path, *, trust_processes: bool = True, abandoned_after: float = ABANDONED_AFTER
) -> bool:
    """Wait while somebody compiles in `folder`; then remove the lock if its owner left it. True if removed.

    The owner keeps the file open, and the compiler it started works in the folder: a lock that no process stands
    behind is seen at once. Where processes cannot show it (`trust_processes` False: another machine may be
    compiling in a shared folder), the lock counts as left when nothing in the folder changed for
    `abandoned_after` seconds.
    """
    lock = folder / LOCK
    while lock.exists():
        if not _held_open(lock):
            gone = trust_processes and not _worked_in(folder)
            if gone or _idle_seconds(folder) > abandoned_after:
                lock.unlink(missing_ok=True)
                return True
        time.sleep(POLL)
    return False


@contextlib.contextmanager
def without_shared_buffers() -> Iterator[None]:
    """While communication begins: keep the extension from making its buffers in /dev/shm.

    Where all processes are on one machine it makes one of 69 MB for each, and never removes them (DeepSpeed 0.19.8,
    csrc/cpu/comm/shm.cpp). Only the all-reduce of tensor-parallel layers uses them, and such layers are refused here.
    """
    local_size = os.environ.pop("LOCAL_SIZE", None)  # what tells the extension that all are on one machine
    try:
        yield
    finally:
        if local_size is not None:
            os.environ["LOCAL_SIZE"] = local_size


def _default_root() -> Path:
    own = Path(sys.prefix)
    if sys.prefix != sys.base_prefix and os.access(own, os.W_OK):
        return own / "torch_extensions"
    version = f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch.__version__}"
    return Path.home() / ".cache" / "flexlora" / "torch_extensions" / version


def _prefer_own_programs() -> None:
    # The same ninja every time, activated environment or not: another version compiles all anew, because
    # it does not trust the first one's log.
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if path[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, *path])


def _held_open(lock: Path) -> bool:
    path = str(lock.resolve())
    return any(file.path == path for process in psutil.process_iter() for file in _open_files(process))


def _worked_in(folder: Path) -> bool:
    path = str(folder.resolve())
    return any(_working_folder(process) == path for process in psutil.process_iter())


def _open_files(process: psutil.Process) -> list[Any]:
    # Another user's process, or one that ended just now, shows nothing.
    with contextlib.suppress(psutil.Error, OSError):
        return list(process.open_files())
    return []


def _working_folder(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.cwd())
    return None


def _idle_seconds(folder: Path) -> float:
    return time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise UserError(
            "no C++ compiler, which DeepSpeed needs once on a CPU",
            f"`{compiler}` is not on PATH",
            "install g++ (Debian: apt-get install g++) or set CXX",
        )


def _first_line(fault: BaseException) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0]


def main() -> int:
    """Compile now; the exit code."""
    return exit_code_of(_compile)


def _compile() -> None:
    started = time.monotonic()
    folder = prepare_extensions()
    if folder is None:
        print("no extension to compile for this accelerator")
    else:
        print(f"{EXTENSION}: ready in {folder} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
