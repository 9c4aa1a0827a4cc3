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
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flexlora_ds.errors import RunError

_NO_LOCK_FILE = "a link, or something else than an ordinary file, in the place of a lock file"
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

    Raises:
        RunError: a link, or something else than an ordinary file, is in its place. OSError: it cannot be opened.
    """
    descriptor = _open_lock(path)
    try:
        yield take_lock(descriptor, busy, patience)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """The file itself: what a link in its place leads to would lose its content to the holder's name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise RunError(_NO_LOCK_FILE, str(path), "remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError(_NO_LOCK_FILE, str(path), "remove it")
    return descriptor


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
