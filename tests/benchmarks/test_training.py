"""The training benchmark runs, compares what it says, and writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


def test_a_tiny_comparison(tmp_path: Path) -> None:
    """Two contenders, two rounds: same records, hence the same tokens; ratios are to PEFT LoRA."""
    out = tmp_path / "tiny.json"
    words = ["--shape", "tiny", "--rounds", "2", "--memory", "false", "--contenders", "FlexLoRA rank changes"]
    words += ["--dropouts", "0.05", "--train_on_inputs", "false", "--change_every", "1", "--json", str(out)]
    command = [sys.executable, "-m", "benchmarks.training", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\n| PEFT LoRA " in done.stdout and "A rank change:" in done.stdout
    (setting,) = json.loads(out.read_text())["settings"]
    lora, ours = setting["contenders"]
    assert (lora["name"], ours["name"]) == ("PEFT LoRA", "FlexLoRA rank changes")
    assert lora["time_ratio"]["median"] == 1 and ours["time_ratio"]["median"] > 0
    assert lora["all"]["tokens"] == ours["all"]["tokens"]
    assert len(ours["all"]["changes"]) == 2
