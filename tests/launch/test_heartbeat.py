"""Signs of life through a store: who falls silent is seen, and so is a store that does not answer."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from launch.distributed import heartbeat
from launch.distributed.heartbeat import Heartbeat
from tests.helpers.processes import run_script


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Heartbeat]]:
    """Two processes of a run, in one, whose store lives as long as the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    both = [Heartbeat(rank, [0, 1], "run") for rank in range(2)]
    for each in both:
        each.interval = 0.05
        each.start()
    yield both
    for each in both:
        each.stop()


def wait_for(condition: Callable[[], bool], *looking: Heartbeat) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        for each in looking:
            each.look()
        time.sleep(0.02)


def test_who_falls_silent_is_seen(pair: list[Heartbeat]) -> None:
    first, second = pair
    second.stop()
    wait_for(lambda: first.silent(1) == [1], first)
    assert not first.is_cut_off(1)


def test_what_one_finds_the_others_hear_and_the_first_counts(pair: list[Heartbeat]) -> None:
    first, second = pair
    first.tell("process 2 is gone", 30)
    wait_for(lambda: second.finding == "process 2 is gone")
    second.tell("process 3 is gone", 30)
    time.sleep(0.2)
    assert first.finding == "" and second.finding == "process 2 is gone"


def test_a_store_out_of_reach_is_not_the_others_silence(
    pair: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = pair

    def fail() -> None:
        raise RuntimeError("no connection")

    monkeypatch.setattr(first, "_connect", fail)
    first._store = None
    wait_for(lambda: first.is_cut_off(0.5), first)
    assert first.silent(0.5) == []


def test_a_process_that_was_frozen_itself_takes_nobody_for_gone(
    pair: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = pair
    now = time.monotonic()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now + 3_600)
    first.look()
    assert not first.is_cut_off(10) and first.silent(10) == []


def test_a_rendezvous_that_has_ended_refuses_and_one_that_hangs_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    heartbeat = Heartbeat(1, [0, 1], "run")
    assert not heartbeat.is_refused()
    heartbeat._store = None  # as after a sign that could not be given
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # its host accepts for it
        monkeypatch.setenv("MASTER_PORT", str(frozen.getsockname()[1]))
        assert not heartbeat.is_refused()
    assert heartbeat.is_refused()


@pytest.mark.parametrize("error", [TimeoutError(), OSError(errno.EHOSTUNREACH, "No route to host")])
def test_a_host_out_of_reach_refuses_nothing(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    heartbeat = Heartbeat(1, [0, 1], "run")
    heartbeat._store = None

    def fail(*where: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert not heartbeat.is_refused()


HANGING = """
import atexit, os, time
import torch.distributed as dist
from launch.distributed.heartbeat import Heartbeat
from launch.distributed.process import end_process

dist.init_process_group("gloo")
atexit.register(print, "registered")
heartbeat = Heartbeat(0, [0, 1], "run")  # waits for the first sign of process 1, of which there is none
heartbeat.interval = 0.0
heartbeat.start()
time.sleep(0.2)
heartbeat.stop()
print("said")
end_process(3)
"""


def test_a_process_ends_with_its_code_while_the_store_hangs() -> None:
    """A thread in the store while the interpreter is torn down would end it by SIGABRT."""
    (result,) = run_script(["-c", HANGING], 1)
    assert (result.returncode, result.stdout) == (3, "said\nregistered\n"), result.stderr


def test_the_last_sign_is_waited_for(pair: list[Heartbeat]) -> None:
    wait_for(lambda: pair[0]._answered > 0, *pair)
    pair[0].stop()
    assert not pair[0]._thread.is_alive()
