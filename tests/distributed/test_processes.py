"""The helper that starts processes for other tests: results, failures, time-outs, nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.processes import ProcessError, Processes, run_processes, run_script


def describe(number: int, name: str) -> dict[str, object]:
    print("said by the worker")
    return {"rank": int(os.environ["RANK"]), "world": os.environ["WORLD_SIZE"], "args": [number, name]}


def pid() -> int:
    return os.getpid()


def add_ranks(value: float) -> float:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return float(total)


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        print("printed before the fault")
        raise LookupError("the fault of rank one")
    time.sleep(60)


def hang_with_child(record: str) -> None:
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
    with Path(record).open("a") as file:
        file.write(f"{os.getpid()} {child}\n")
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def runs(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    with Processes(2, timeout=60) as processes:
        yield processes


def test_every_rank_gets_the_arguments_and_its_result_is_returned() -> None:
    first, second = run_processes(describe, 2, 7, "x")
    assert first == {"rank": 0, "world": "2", "args": [7, "x"]}
    assert second == {"rank": 1, "world": "2", "args": [7, "x"]}


def test_the_same_processes_serve_many_calls_and_communicate(pair: Processes) -> None:
    before = pair.run("tests.distributed.test_processes:pid")
    assert pair.run(add_ranks, 1.0) == [3.0, 3.0]
    assert pair.run(add_ranks, 2.0) == [5.0, 5.0]
    assert pair.run(pid) == before
    assert len(set(before)) == 2


def test_the_failing_ranks_traceback_is_raised_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ProcessError, match=r"(?s)rank 1 failed.*LookupError: the fault.*printed before"):
        run_processes(fail_on_rank_one, 2, timeout=60)
    assert time.monotonic() - started < 30


def test_a_death_is_reported_and_the_next_call_starts_anew() -> None:
    with Processes(1, timeout=60) as processes:
        before = processes.run(pid)
        with pytest.raises(ProcessError, match=r"rank 0 died \(exit code -9\)"):
            processes.run(die)
        assert processes.run(pid) != before


def test_a_time_out_kills_the_processes_and_their_children(tmp_path: Path) -> None:
    record = tmp_path / "pids"
    with Processes(2) as processes:
        processes.run(pid)  # started: the time below is the call's alone
        with pytest.raises(ProcessError, match=r"no answer from ranks \[0, 1\]"):
            processes.run(hang_with_child, str(record), timeout=5)
    pids = [int(word) for word in record.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10  # far below the minute that the children would sleep
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, f"still running: {[each for each in pids if runs(each)]}"
        time.sleep(0.05)


def test_a_script_gives_its_exit_code_and_output_per_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(os.environ['RANK'])\nsys.exit(f'bad {sys.argv[1]}')\n")
    results = run_script([str(script), "key"], 2)
    assert [result.stdout for result in results] == ["0\n", "1\n"]
    assert [(result.returncode, result.stderr) for result in results] == [(1, "bad key\n")] * 2
