"""What is said of a rendezvous that answers no more: its process has ended, or its host cannot be reached."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from launch.distributed import heartbeat, peers
from launch.distributed.members import Member
from launch.distributed.peers import Peers
from launch.distributed.process import Process

PATIENCE = 0.5
MEMBERS = [Member(0, 100, 0.0, "a", "10.0.0.1", "a"), Member(1, 101, 0.0, "b", "10.0.0.2", "b")]
FIRST = "host a (10.0.0.1), which holds process 0 and the rendezvous"
AGAIN = "start the run again: it resumes from its last checkpoint"


@pytest.fixture
def second_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    """Process 1 of two, each on a host of its own, that cannot reach the rendezvous any more."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(peers, "gather_members", lambda process: MEMBERS)
    monkeypatch.setattr(peers, "gather", lambda process, value: [value] * 2)
    monkeypatch.setattr(heartbeat, "_CONNECT", heartbeat.timedelta(seconds=1))
    watching = Peers(Process(1, 2, torch.device("cpu"), 1), PATIENCE)
    watching._heartbeat._store = None
    yield watching
    watching.leave()


def loss_of(watching: Peers) -> str:
    deadline = time.monotonic() + 60
    while not (loss := watching.loss()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return loss


def test_a_rendezvous_that_has_ended_is_gone_before_a_connection_is_seen_to_break(
    second_host: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))  # bound, and nobody listens
        assert loss_of(second_host) == f"{FIRST}, is gone; {AGAIN}"


def test_a_rendezvous_that_hangs_gives_no_sign_of_life(
    second_host: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        monkeypatch.setenv("MASTER_PORT", str(frozen.getsockname()[1]))
        assert loss_of(second_host) == (
            f"no sign of life for 0.5 s from {FIRST}; look there and at the network between, then {AGAIN}"
        )
