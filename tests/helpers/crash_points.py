"""Saves that are killed at each of their operations on files, one child process for each.

    python -m tests.helpers.crash_points FOLDER

leaves what each kill left below FOLDER, by number, and prints how many there were.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from flexlora_ds.checkpoint import files
from tests.helpers.checkpoint_samples import save_checkpoint

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed_at(count: int, root: Path) -> bool:
    """Save step 7 beside the one of step 4, keep one; whether the kill before operation `count` came."""
    child = os.fork()
    if child == 0:
        _watch(count, str(root))
        save_checkpoint(root, 7)
        files.keep_newest(root, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _watch(count: int, root: str) -> None:
    seen = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        # Removal of trees names its files relative to a folder that it has opened.
        if event in EVENTS and (root in str(args[0]) or not str(args[0]).startswith("/")):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def main() -> None:
    """Try every operation until the saves come to their end."""
    base = Path(sys.argv[1])
    count = 1
    while True:
        root = base / str(count)
        save_checkpoint(root, 4)
        if not killed_at(count, root):
            shutil.rmtree(root)
            break
        count += 1
    print(count - 1)


if __name__ == "__main__":
    main()
