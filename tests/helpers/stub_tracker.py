"""A package with wandb's name that fails at a chosen moment: what the tests of failing trackers put on the path."""

from __future__ import annotations

from pathlib import Path

_MODULE = """
import os, signal, time

class Settings:
    def __init__(self, **settings): pass

class Image:
    def __init__(self, path): pass

class Run:
    id, rows = "stub", 0

    def define_metric(self, *names, **axes): pass

    def log(self, row):
        self.rows += 1
        if self.rows == 3:
            {log}

    def finish(self, exit_code):
        {finish}

def init(**settings):
    {init}
    return Run()

{load}
"""

FAULTS = {
    "import": {"load": "raise ImportError('no such library')"},
    "start": {"init": "raise RuntimeError('no API key')"},
    "middle": {"log": "raise ConnectionError('the service is gone')"},
    "killed": {"log": "os.kill(os.getpid(), signal.SIGKILL)"},
    "hangs": {"finish": "time.sleep(1000)"},
}
"""When it fails, and how."""


def write_stub(root: Path, fault: str) -> Path:
    """The folder to put on the path."""
    (root / "wandb").mkdir(parents=True)
    pieces = dict.fromkeys(("load", "init", "log", "finish"), "pass") | FAULTS[fault]
    text = _MODULE
    for name, piece in pieces.items():
        text = text.replace("{" + name + "}", piece)
    (root / "wandb" / "__init__.py").write_text(text)
    return root
