"""Processes of this machine: found by number and start, seen to have ended before anybody reaps them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from launch.distributed.process_table import find_process, has_ended, launchers_above


def test_a_number_alone_is_not_the_process() -> None:
    started = psutil.Process().create_time()
    found = find_process(os.getpid(), started)
    assert found is not None and not has_ended(found)
    assert find_process(os.getpid(), started - 60) is None


def test_a_killed_process_has_ended_before_it_is_reaped() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = find_process(child.pid, time.time())
        assert process is not None and not has_ended(process)
        child.kill()
        deadline = time.monotonic() + 20
        while not has_ended(process):
            assert time.monotonic() < deadline, "a zombie still counts as running"
            time.sleep(0.02)
        child.wait()
        assert has_ended(process) and find_process(child.pid, process.create_time()) is None


def test_the_parent_is_known_and_above_it_launchers_alone() -> None:
    code = "from launch.distributed.process_table import launchers_above as above; print([p.pid for p in above()])"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert alone.stdout == f"[{os.getpid()}]\n"
    assert launchers_above()[0].pid == os.getppid()
