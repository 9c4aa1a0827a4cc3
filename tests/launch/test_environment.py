"""What a launcher says in the environment: nothing waits for processes that cannot come."""

from __future__ import annotations

import socket

import pytest
import torch

from eval.workers import Team
from flexlora_ds.errors import UserError
from flexlora_ds.launcher import require_environment, require_rendezvous
from flexlora_ds.terminal.command import is_rank_zero
from launch.distributed.port import port_faults

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def setenv(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for pair in text.split():
        monkeypatch.setenv(*pair.split("=", 1))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=x", "WORLD_SIZE is 'x' (environment); give a whole number of at least 1"),
        ("WORLD_SIZE=0", "WORLD_SIZE is '0' (environment); give a whole number of at least 1"),
        ("WORLD_SIZE=1" + "0" * 5_000, "WORLD_SIZE is '1000"),
        ("MASTER_PORT=99999999", "MASTER_PORT is '99999999' (environment); give a port from 1 to 65,535"),
        ("MASTER_PORT=0", "give a port from 1"),
        (
            "RANK=1",
            "RANK is '1', and WORLD_SIZE is not set (environment); start the processes with deepspeed",
        ),
        ("RANK=2 WORLD_SIZE=2", "RANK is '2', and WORLD_SIZE is 2 (environment)"),
        ("RANK=-1 WORLD_SIZE=2", "RANK is '-1' (environment)"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=gpu0", "LOCAL_RANK is 'gpu0' (environment)"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=7", "LOCAL_RANK is '7', and RANK is 0 (environment)"),
    ],
    ids=lambda text: text[:30],
)
def test_variables_that_name_no_process(monkeypatch: pytest.MonkeyPatch, variables: str, said: str) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        require_environment()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, and RANK is not set (environment)"),
        ("WORLD_SIZE=2 RANK=0 MASTER_PORT=29500", "and MASTER_ADDR is not set"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=127.0.0.1", "and MASTER_PORT is not set"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=no.such.host.invalid MASTER_PORT=29500", "MASTER_ADDR is 'no.such"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a..b MASTER_PORT=29500", "MASTER_ADDR is 'a..b'"),
    ],
)
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, variables: str, said: str) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        require_rendezvous()
    assert said in str(caught.value)


@pytest.mark.parametrize("variables", ["", "RANK=0", "LOCAL_RANK=1", "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1"])
def test_what_launchers_say_passes(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    setenv(monkeypatch, variables)
    assert require_environment() == (4 if "WORLD" in variables else 1)
    setenv(monkeypatch, "MASTER_ADDR=localhost MASTER_PORT=29500")
    require_rendezvous()


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ("", True),
        ("RANK=0 WORLD_SIZE=2", True),
        ("RANK=1 WORLD_SIZE=2", False),
        ("RANK=x WORLD_SIZE=2", True),
        ("RANK=5", True),
        ("RANK=2 WORLD_SIZE=2", True),
        ("RANK=1 WORLD_SIZE=x", True),
    ],
)
def test_a_process_that_is_none_of_the_run_speaks(
    monkeypatch: pytest.MonkeyPatch, variables: str, speaks: bool
) -> None:
    setenv(monkeypatch, variables)
    assert is_rank_zero() is speaks


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=x", "WORLD_SIZE is 'x' (environment)"),
        ("RANK=3", "RANK is '3', and WORLD_SIZE is not set"),
        ("WORLD_SIZE=2 RANK=0", "WORLD_SIZE is 2, and MASTER_ADDR is not set"),
        ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE is '0' (environment); give a whole number of at least 1"),
    ],
)
def test_an_evaluation_asks_the_same_of_them(
    monkeypatch: pytest.MonkeyPatch, variables: str, said: str
) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        Team()
    assert said in str(caught.value)


def test_a_busy_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(UserError, match=rf"^port {port} is in use .*MASTER_PORT.*--master_port"),
            port_faults(),
        ):
            torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
