"""The comparison of ways to drop an input runs, and says in a line what it cannot read."""

from __future__ import annotations

from tests.helpers.commands import run_module


def test_it_times_every_way() -> None:
    done = run_module("benchmarks.dropout", "--rows", "8", "--features", "30", "64", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("8 x ")]
    assert len(lines) == 2
    assert all(
        f"{way} " in line for line in lines for way in ("pass in C", "written mask", "torch's dropout")
    )


def test_a_width_that_is_no_number_is_named() -> None:
    done = run_module("benchmarks.dropout", "--features", "wide")
    assert done.returncode == 2
    assert "invalid int value: 'wide'" in done.stderr and "Traceback" not in done.stderr
