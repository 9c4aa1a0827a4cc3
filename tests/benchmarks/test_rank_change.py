"""The rank-change benchmark runs in real processes, counts what a change moves, and refuses what makes no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rank_change import main, parse
from flexlora_ds.errors import UserError
from tests.helpers.processes import ROOT


def test_a_tiny_sweep(tmp_path: Path) -> None:
    """Two processes at stage 3: bytes move; what they are bounded by is known from the shapes."""
    out = tmp_path / "tiny.json"
    words = ["--shape", "tiny", "--ranks", "4", "--processes", "2", "--stages", "3", "--changes", "2"]
    words += ["--block", "1", "--batch_size", "2", "--memory_changes", "10", "--memory_shape", "tiny"]
    words += ["--memory_rank", "4", "--device", "cpu", "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rank_change", *words],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    ((timed,), (memory,)) = report["timed"], report["memory"]
    shapes = [(64, 64), (32, 64), (32, 64), (160, 64), (64, 160)] * 2  # q, k, v, up, down of two layers
    trainable = sum(4 * (a + b + 1) for a, b in shapes)
    assert timed["trainable"] == memory["trainable"] == trainable
    for process in timed["processes"]:
        assert [len(process[key]) for key in ("change_seconds", "steps_with", "steps_without")] == [2, 2, 2]
        assert all(
            a[0] > change for a, change in zip(process["steps_with"], process["change_seconds"], strict=True)
        )
        # λ of all, and four states of what was touched, at most all: each process sends half of what it gets whole.
        assert 4 * 4 * 10 / 2 < process["sent_bytes"] <= 4 * (4 + 1) * 1.3 * trainable / 2
    assert timed["collectives"] <= 1 + 4
    assert len(memory["processes"][0]["resident_mib"]) == 10
    assert memory["grown_mib"] == pytest.approx(memory["resident_mib"][1] - memory["resident_mib"][0])
    assert done.stdout.count("\n| tiny |") == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--stages", "4"], "--stages"),
        (["--ranks", "8,x"], "'x'"),
        (["--shape", "smol"], "smollm2-layers"),
        (["--memory_changes", "5"], "at least 10"),
        (["--json", "/nowhere/at/all.json"], "--json"),
        (["--rank", "8"], "--rank"),
    ],
)
def test_bad_input_is_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=named):
        parse(words)
    assert not capsys.readouterr().err


def test_a_rank_above_a_layers_limit_is_the_workers_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "tiny", "--ranks", "99", "--processes", "1", "--stages", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rank_change", *words])
    assert main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "rank 99 exceeds" in lines[0] and "tiny, rank 99, stage 0" in lines[0]
