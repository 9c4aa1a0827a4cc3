"""Who is named when processes are lost: whole hosts where every process of one is, else the processes."""

from __future__ import annotations

import pytest

from launch.distributed.members import Member, in_words


def member(rank: int, host: str, address: str = "10.0.0.1", machine: str = "") -> Member:
    return Member(rank, 100 + rank, 0.0, host, address, machine or host)


PAIR = [member(0, "a"), member(1, "a"), member(2, "b", "10.0.0.2"), member(3, "b", "10.0.0.2")]
ALIKE = [member(0, "node", machine="x"), member(1, "node", "10.0.0.2", machine="y")]


@pytest.mark.parametrize(
    ("members", "lost", "words"),
    [
        (PAIR, [2, 3], ["host b (10.0.0.2) with processes 2, 3"]),
        (PAIR, [3], ["process 3 (pid 103) on host b (10.0.0.2)"]),
        (PAIR, [0, 1], ["host a (10.0.0.1), which holds process 0 and the rendezvous,"]),
        (PAIR, [0], ["process 0 (pid 100) on host a (10.0.0.1)"]),
        (
            PAIR,
            [1, 2, 3],
            ["process 1 (pid 101) on host a (10.0.0.1)", "host b (10.0.0.2) with processes 2, 3"],
        ),
        (PAIR[:2], [1], ["process 1 (pid 101)"]),
        (ALIKE, [1], ["host node (10.0.0.2) with process 1"]),
        ([PAIR[0], member(1, "b", "")], [1], ["host b with process 1"]),
    ],
)
def test_the_lost_are_named(members: list[Member], lost: list[int], words: list[str]) -> None:
    assert in_words([members[rank] for rank in lost], members) == words
