"""Two hosts and what happens between them: a link that breaks, a host that is switched off, processes that die.

The hosts are network namespaces joined by one link, so the tests need root; they skip where that is not allowed.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import training
from tests.helpers.launched import held, lines
from tests.helpers.nursery import Nursery
from tests.helpers.processes import (
    Processes,
    kill_group,
    rank_environments,
    scratch_file,
    start_process,
    text_of,
)
from tests.helpers.resumed_runs import assert_same_run, run_training, saving_arguments
from tests.helpers.training import Place
from tests.helpers.two_hosts import TwoHosts, two_hosts

END_SECONDS = 90
FIRST = "host first (10.77.0.1), which holds process 0 and the rendezvous"
SILENT = "error: no sign of life for 10 s from "
LOOK = (
    "; look there and at the network between, then start the run again: it resumes from its last checkpoint"
)
GONE = " is gone; start the run again: it resumes from its last checkpoint"
Harm = Callable[[TwoHosts], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


def words_of(place: Place, out: Path, stage: int, **options: Any) -> list[str]:
    given = {"max_steps": 4_000, "save_every": 3, "adjust_size": 0, "timeout": 10, **options}
    return saving_arguments(place, out, f"zero{stage}", **given)


def wait_for_steps(hosts: TwoHosts, out: Path, steps: int) -> None:
    hosts.run.wait_for(lambda: lines(out / "metrics.jsonl") >= steps)


def errors_after(
    harm: Harm, place: Place, out: Path, nursery: Nursery, stage: int, per_host: int
) -> list[str]:
    """What each host says, in one line, after something has happened in the middle of a run; it ends with code 1."""
    with two_hosts(nursery, words_of(place, out, stage), per_host) as hosts:
        wait_for_steps(hosts, out, 4)
        harm(hosts)
        codes = hosts.run.wait(END_SECONDS)
        assert set(codes) <= {1, -signal.SIGKILL}, codes
        said = [hosts.errors(host) for host in range(2)]
        killed = [all(codes[rank] < 0 for rank in hosts.ranks(host)) for host in range(2)]
        assert [len(each) for each in said] == [0 if dead else 1 for dead in killed], said
        return ["".join(each) for each in said]


CUT = [f"{SILENT}host second (10.77.0.2) with process 1{LOOK}", f"{SILENT}{FIRST}{LOOK}"]


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.full), 3])
def test_a_link_that_breaks_is_said_on_both_hosts(
    stage: int, place: Place, tmp_path: Path, nursery: Nursery
) -> None:
    assert errors_after(TwoHosts.cut_link, place, tmp_path / "run", nursery, stage, 1) == CUT


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("off", [0, 1])
def test_a_host_that_is_switched_off_is_named_by_the_other(
    off: int, stage: int, place: Place, tmp_path: Path, nursery: Nursery
) -> None:
    said = errors_after(lambda hosts: hosts.switch_off(off), place, tmp_path / "run", nursery, stage, 2)
    name = "host second (10.77.0.2) with processes 2, 3" if off else FIRST
    assert said[1 - off] == f"{SILENT}{name}{LOOK}"


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_process_that_dies_is_named_on_both_hosts(
    killed: int, stage: int, place: Place, tmp_path: Path, nursery: Nursery
) -> None:
    """Not process 0, which holds the rendezvous here."""
    pids = []

    def kill(hosts: TwoHosts) -> None:
        pids.append(hosts.run.processes[killed].pid)
        hosts.run.send(signal.SIGKILL, killed)

    said = errors_after(kill, place, tmp_path / "run", nursery, stage, 2)
    host = ("first (10.77.0.1)", "second (10.77.0.2)")[killed // 2]
    assert said == [f"error: process {killed} (pid {pids[0]}) on host {host}{GONE}"] * 2


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_both_hosts_speak_when_process_0_dies(
    stage: int, place: Place, tmp_path: Path, nursery: Nursery
) -> None:
    """Its own host knows the process; the other has lost the rendezvous with it."""
    pids = []

    def kill(hosts: TwoHosts) -> None:
        pids.append(hosts.run.processes[0].pid)
        hosts.run.send(signal.SIGKILL, 0)

    said = errors_after(kill, place, tmp_path / "run", nursery, stage, 2)
    assert said == [
        f"error: process 0 (pid {pids[0]}) on host first (10.77.0.1){GONE}",
        f"error: {FIRST},{GONE}",
    ]


@pytest.mark.full
@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_process_is_named_on_both_hosts(
    frozen: int, place: Place, tmp_path: Path, nursery: Nursery
) -> None:
    """The lowest process of its host may be the frozen one: then the next one speaks."""

    def freeze(hosts: TwoHosts) -> None:
        hosts.run.send(signal.SIGSTOP, frozen)
        hosts.run.wait_for(
            lambda: all(p.poll() is not None for r, p in enumerate(hosts.run.processes) if r != frozen)
        )
        hosts.run.send(signal.SIGKILL, frozen)

    said = errors_after(freeze, place, tmp_path / "run", nursery, 3, 2)
    assert said[0] == said[1]
    assert f"10 s from process {frozen} (pid " in said[0] and said[0].endswith(LOOK)


def assert_undisturbed(
    harm: Harm, place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    """The run goes on after the harm, and is the run that nothing disturbed, bit for bit."""
    options = {"max_steps": 60, "save_every": 20, "adjust_size": 3, "timeout": 30}
    run_training(two_processes, words_of(place, tmp_path / "whole", 2, **options))
    out = tmp_path / "run"
    with two_hosts(nursery, words_of(place, out, 2, **options)) as hosts:
        wait_for_steps(hosts, out, 4)
        harm(hosts)
        assert lines(out / "metrics.jsonl") < 60, "ended before it was disturbed"
        assert hosts.run.wait(END_SECONDS) == [0, 0], hosts.said(0)
    assert_same_run(out, tmp_path / "whole", last=60)


def test_a_link_that_is_down_for_a_moment_is_survived(
    place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    def disturb(hosts: TwoHosts) -> None:
        hosts.cut_link()
        time.sleep(4)
        hosts.mend_link()

    assert_undisturbed(disturb, place, tmp_path, two_processes, nursery)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_is_frozen_for_a_moment_is_survived(
    frozen: int, place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    def disturb(hosts: TwoHosts) -> None:
        hosts.run.send(signal.SIGSTOP, frozen)
        time.sleep(8)
        hosts.run.send(signal.SIGCONT, frozen)

    assert_undisturbed(disturb, place, tmp_path, two_processes, nursery)


@pytest.mark.full
def test_a_run_whose_link_broke_resumes_as_if_nothing_had_been(
    place: Place, tmp_path: Path, two_processes: Processes, nursery: Nursery
) -> None:
    options = {"max_steps": 40, "save_every": 3, "adjust_size": 3}
    run_training(two_processes, words_of(place, tmp_path / "whole", 3, **options))
    out = tmp_path / "run"
    words = words_of(place, out, 3, **options)
    with two_hosts(nursery, words) as hosts:
        wait_for_steps(hosts, out, 8)
        hosts.cut_link()
        assert hosts.run.wait(END_SECONDS) == [1, 1], hosts.said(0)
    run_training(two_processes, words)
    assert_same_run(out, tmp_path / "whole", last=40)


@pytest.mark.full
def test_the_data_may_take_longer_than_the_time_out(place: Place, tmp_path: Path, nursery: Nursery) -> None:
    """One process works for a minute, as if it tokenised, and gives signs of life: nobody is taken for gone."""
    words = words_of(place, tmp_path / "run", 2, max_steps=4)
    with held(nursery, words, 2, "data", 0, tmp_path / "notes") as started:
        time.sleep(60)  # more than the time-out and what collectives get on top of it
        assert [process.poll() for process in started.run.processes] == [None, None]
        started.let_go()
        assert started.run.wait(END_SECONDS) == [0, 0], started.run.said()


@pytest.mark.full
def test_a_process_that_hangs_in_a_step_ends_the_run(place: Place, tmp_path: Path, nursery: Nursery) -> None:
    """It lives and gives signs of life: its collective's time-out finds it."""
    with held(nursery, words_of(place, tmp_path / "run", 3), 2, "step 6", 1, tmp_path / "notes") as started:
        started.run.wait_for(lambda: started.run.processes[0].poll() is not None)
        said = started.run.said(0)
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert "error: the processes wait for each other: all give signs of life, and one hangs" in said


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_the_others_do_not_find_says_so(rank: int, place: Place, tmp_path: Path) -> None:
    """The other one never starts; a process that is alone with its error says it, whatever its rank."""
    *_, variables = rank_environments(2, {"DEEPSPEED_TIMEOUT": "0", "LOCAL_WORLD_SIZE": "1"})
    variables |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    with scratch_file() as output:
        words = [sys.executable, "launch/train.py", *words_of(place, tmp_path / "run", 2)]
        process = start_process(words, variables, stdout=output, stderr=output)
        try:
            assert process.wait(END_SECONDS) == 1
        finally:
            kill_group(process)
        said = text_of(output)
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert "error: the processes did not all find each other" in said
    assert f"(127.0.0.1:{variables['MASTER_PORT']})" in said
