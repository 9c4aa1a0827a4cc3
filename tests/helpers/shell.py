"""A command of a message, run as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_shell(command: str, folder: Path) -> None:
    """Run a line in a shell inside `folder`, with this Python; nothing else may appear there."""
    before = {entry.name for entry in folder.iterdir()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {entry.name for entry in folder.iterdir()} == before
