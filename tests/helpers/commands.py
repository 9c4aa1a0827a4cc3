"""Programs of this repository, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.processes import ROOT


def run_module(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m name words`, in the repository, with one thread; its output as text."""
    return subprocess.run(
        [sys.executable, "-m", name, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
