"""The GPU benchmark on a CPU: every section's code runs, and a run that is slower than an earlier one fails."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.clock import union
from benchmarks.gpu.compare import BASELINES, baseline_of, read_figures, worse
from benchmarks.gpu.proofs.listed import proofs
from benchmarks.gpu.sections import SECTIONS, share_of
from tests.helpers.bare import bare_environment, undeclared_modules
from tests.helpers.processes import ROOT

FAST = "facts,proofs,step,change,plan"
"""`eval` and `study` have tests of their own, and `test_compiled_blocks` compiles what `compiled` does."""
FAST_PROOFS = "bits,in chunks,ones do: sdpa,stage 2 in fp32,stage 2: an empty,"
FAST_PROOFS += "growth leaves,host trains,start from,prices"


def figure(name: str, value: Any, unit: str) -> dict[str, Any]:
    return {"section": "step", "name": name, "value": value, "unit": unit}


def run_command(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_what_setuptools_brings_along_is_not_hidden() -> None:
    """Which it puts on Python's path as soon as a test before has imported it."""
    import setuptools  # noqa: F401

    hidden = undeclared_modules()
    assert "jaraco" not in hidden and "hypothesis" in hidden


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [(FAST, FAST_PROOFS), pytest.param(",".join(SECTIONS), "", marks=pytest.mark.full)],
    ids=["fast", "all"],
)
def test_every_section_runs_without_a_gpu(sections: str, wanted: str, tmp_path: Path) -> None:
    """And with the declared packages only: nothing that a developer has is there."""
    out, asked = tmp_path / "figures.json", [text for text in wanted.split(",") if text]
    bare = bare_environment(tmp_path)
    assert "hypothesis" in (tmp_path / "sitecustomize.py").read_text()
    arguments = ("--tiny", "--sections", sections, "--proofs", wanted, "--json", str(out))
    done = run_command(*arguments, environment=bare)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["figures"]
    assert {row["section"] for row in rows} == set(sections.split(","))
    proven, unproven = ([row for row in rows if row.get(kind)] for kind in ("proof", "unproven"))
    names = [proof.name for proof in proofs() if not asked or any(text in proof.name for text in asked)]
    assert sorted(row["name"] for row in proven + unproven) == sorted(names)
    assert len(proven) >= 10 and all(row["holds"] for row in proven)
    assert f"{len(proven)} hold, 0 fail, {len(unproven)} not run, of {len(names)}" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "**not run**: " in line]
    assert all(any(f" {row['name']} " in line for line in lines) for row in unproven)
    absent = {row["name"] for row in rows if row.get("absent")} - {row["name"] for row in unproven}
    assert absent <= {"study"}, "it was given no model"


def test_every_proof_names_a_test_that_is_there_and_stands_on_the_page() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    named = {proof.test for proof in proofs()}
    for test in named:
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        assert f"`{function}`" in page, test
    assert len({proof.name for proof in proofs()}) == len(proofs())


def test_shares_leave_time_for_all_and_none_for_what_cannot_run() -> None:
    names, left, shares = list(SECTIONS), 465.0, {}
    for number, name in enumerate(names):
        shares[name] = share_of(names[number:], left, model=False)
        left -= shares[name]
    assert left == pytest.approx(0) and shares["study"] < 10 < shares["facts"]
    assert share_of(["study", "facts"], 100, model=True) > 80


def test_a_section_that_outruns_its_share_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, written = tmp_path / "section", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {written}.new\nmv {written}.new {written}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    wait = subprocess.Popen.wait

    def until_the_child_runs(process: Any, timeout: float | None = None) -> int:
        while timeout is not None and not written.exists():
            time.sleep(0.01)
        return wait(process, timeout and 0.01)

    monkeypatch.setattr(subprocess.Popen, "wait", until_the_child_runs)
    args = SimpleNamespace(shape="tiny", tiny=False, proofs=[], model=None, data=None)
    assert gpu.in_a_process("facts", 60, args, tmp_path / "figures") == 124  # type: ignore[arg-type]
    until = time.monotonic() + 60
    while runs(int(written.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(int(written.read_text()))


def runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
        assert any(row.get("unit") == "tokens/s" for row in figures)
        assert worse(figures, figures) == []


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    for arguments, fault in (
        (["--sections", "facts,nothing"], "no 'nothing'"),
        (["--compare", "missing.json"], "no file missing.json"),
        (["--json", "no/folder/x.json"], "no folder no/folder"),
        (["--model", "somewhere"], "--model and --data go together"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 2 and fault in done.stderr.splitlines()[-1]


def test_the_time_in_which_a_kernel_runs_counts_overlaps_once() -> None:
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
