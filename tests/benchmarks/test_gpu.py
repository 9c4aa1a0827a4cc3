"""The GPU benchmark on a CPU: every section's code runs, and a run that is slower than an earlier one fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.clock import union
from benchmarks.gpu.compare import BASELINES, baseline_of, read_figures, worse
from tests.helpers.processes import ROOT

SECTIONS = "facts,proofs,step,compiled,change,plan"
FAST_PROOFS = "bits,in chunks,packed sdpa,stage 2 in fp32,stage 2: an empty,growth"


def figure(name: str, value: Any, unit: str) -> dict[str, Any]:
    return {"section": "step", "name": name, "value": value, "unit": unit}


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("proofs", [FAST_PROOFS, pytest.param("", marks=pytest.mark.full)])
def test_every_section_runs_without_a_gpu(proofs: str, tmp_path: Path) -> None:
    """`eval` has a test of its own."""
    out = tmp_path / "figures.json"
    done = run_command("--tiny", "--sections", SECTIONS, "--proofs", proofs, "--json", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(out.read_text())
    rows = report["figures"]
    assert {row["section"] for row in rows} == set(SECTIONS.split(","))
    proven = [row for row in rows if row.get("proof")]
    assert len(proven) >= 6 and all(row["holds"] for row in proven)
    assert all((ROOT / row["test"].split("::")[0]).is_file() for row in proven), (
        "each names its test on a CPU"
    )
    measured = [row for row in rows if row["section"] != "proofs" and row.get("absent")]
    assert not measured, measured


def test_what_is_slower_or_larger_than_before_fails() -> None:
    before = [
        figure("a step", 100.0, "ms"),
        figure("speed", 1000.0, "tokens/s"),
        figure("peak", 30.0, "GB"),
        figure("change : step", 0.1, ""),
        figure("device", "NVIDIA H200", ""),
    ]
    assert worse(before, before) == []
    within = [figure("a step", 114.0, "ms"), figure("speed", 860.0, "tokens/s"), figure("peak", 30.5, "GB")]
    assert worse(within, before) == []
    beyond = [figure("a step", 116.0, "ms"), figure("speed", 840.0, "tokens/s"), figure("peak", 30.7, "GB")]
    assert [line.split(": ")[1] for line in worse(beyond, before)] == ["a step", "speed", "peak"]
    others = [figure("change : step", 9.9, ""), figure("device", "another", ""), figure("new", 1.0, "ms")]
    assert worse(others, before) == []


def test_the_kept_figures_of_each_card_can_be_read() -> None:
    assert baseline_of("NVIDIA H200") == BASELINES / "nvidia-h200.json"
    for path in BASELINES.glob("*.json"):
        figures = read_figures(path)
        assert any(row["unit"] == "tokens/s" for row in figures)
        assert worse(figures, figures) == []


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    for arguments, fault in (
        (["--sections", "facts,nothing"], "no 'nothing'"),
        (["--compare", "missing.json"], "no file missing.json"),
        (["--json", "no/folder/x.json"], "no folder no/folder"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 2 and fault in done.stderr.splitlines()[-1]


def test_the_time_in_which_a_kernel_runs_counts_overlaps_once() -> None:
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
