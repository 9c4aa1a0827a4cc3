"""Threads per process: the cores are shared, and what the user wants is kept, under every launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from launch.distributed import threads
from tests.helpers.processes import ROOT

CORES = 8
NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: CORES)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, CORES),
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_SIZE": "2"}, 4),
        ({"LOCAL_SIZE": "1000"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3", "LOCAL_SIZE": "2"}, 3),
        ({"OMP_NUM_THREADS": "1000"}, CORES),
        ({"OMP_NUM_THREADS": "many"}, CORES),
        # Two torchruns on one machine, each told to leave cores to the other.
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, 1),
        ({"OMP_NUM_THREADS": "4", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, 4),
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 2),
    ],
)
def test_cores_are_shared_and_the_users_wish_is_kept(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert threads.limit_threads() == torch.get_num_threads() == expected
    assert os.environ["OMP_NUM_THREADS"] == str(expected)


LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does where it starts several processes
os.environ.update(LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
code = "from launch.distributed import threads; threads._cores = lambda: 8; print(threads.limit_threads())"
subprocess.run([sys.executable, "-c", code], check=True)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "4"), pytest.param({"OMP_NUM_THREADS": "1"}, "1", marks=pytest.mark.full)],
)
def test_torchruns_own_default_is_no_wish(given: dict[str, str], expected: str) -> None:
    """The same value reaches the process in both cases; the launcher's own environment tells them apart."""
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    command = [sys.executable, "-c", LAUNCHER]
    result = subprocess.run(
        command, env={**environment, **given}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == expected
