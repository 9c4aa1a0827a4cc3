"""What the commands say of a machine whose GPUs torch cannot use: one line before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers import training
from tests.helpers.eval_tiny import write_data
from tests.helpers.processes import run_script

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a torch without GPUs refuses")


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str | None]:
    """The environment of a machine with a GPU that torch does not know."""
    command = tmp_path / "driver" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "DS_ACCELERATOR": None, "CUDA_VISIBLE_DEVICES": None}


@pytest.mark.parametrize("command", ["train", "dry run", "eval"])
def test_a_gpu_that_torch_cannot_use_ends_the_command(
    command: str, machine: dict[str, str | None], tmp_path: Path
) -> None:
    place, out = training.make_place(tmp_path), tmp_path / "out"
    write_data(tmp_path / "tests", 2)
    words = {
        "train": ["launch/train.py", *place.arguments(out)],
        "dry run": ["launch/train.py", *place.arguments(out, dry_run=True)],
        "eval": ["-m", "eval", f"--model={place.model}", f"--data={tmp_path / 'tests'}", f"--out={out}"],
    }
    (result,) = run_script(words[command], 1, env=machine)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: 1 GPU here (NVIDIA H100), and torch ")
    assert "set DS_ACCELERATOR=cpu to compute on the CPU" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()
