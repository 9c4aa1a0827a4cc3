"""A lock on a file that the kernel holds (flock), so that no kill can leave it behind.

The package filelock is no replacement: its versions for Python 3.10 empty the file that another process holds, and
where a file system knows no flock it makes a file that outlives its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PAUSE = 0.2  # seconds
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(
    path: Path, busy: Callable[[str], None] = lambda holder: None, *, patience: float = 0.0
) -> Iterator[bool]:
    """Hold the lock of a file, which is made and stays; yields False on a file system without locks.

    Args:
        path: the file; it names its holder, for the messages of others.
        busy: called with the holder's name where another process has the lock: it raises to refuse, or returns to wait.
        patience: seconds to wait before `busy` is called.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield take_lock(descriptor, busy, patience)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, busy: Callable[[str], None], patience: float = 0.0) -> bool:
    """As `locked`, of an open file or folder, until it is closed; a folder names no holder."""
    end = time.monotonic() + patience
    try:
        while not _was_free(descriptor):
            if time.monotonic() >= end:
                busy(_holder(descriptor))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                break
            time.sleep(_PAUSE)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return False
    with contextlib.suppress(OSError):  # a full disk, or a folder; the name is for messages only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return True


def _was_free(descriptor: int) -> bool:
    """Take the lock if it is free; whether it was."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some file systems say the latter
        return False
    return True


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    return "another process"
