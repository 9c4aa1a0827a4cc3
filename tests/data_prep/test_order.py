"""The order search against itertools.permutations, on synthetic sections."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from data_prep.published.order import find_order, framed

PARTS = [f"part {i}".encode() * (i + 1) for i in range(6)]


def sha256_of(order: tuple[int, ...]) -> str:
    return hashlib.sha256(b"[\n" + b",\n".join(PARTS[i] for i in order) + b"\n]").hexdigest()


@pytest.mark.parametrize("index", [0, 1, 119, 500, 719])
def test_any_of_the_720_orders_is_found(index: int) -> None:
    order = list(itertools.permutations(range(6)))[index]
    result = find_order(PARTS, sha256_of(order))
    assert result.order == order and result.tried == index + 1


def test_guesses_come_first() -> None:
    result = find_order(PARTS, sha256_of((5, 4, 3, 2, 1, 0)), [range(6), (5, 4, 3, 2, 1, 0)])
    assert result.order == (5, 4, 3, 2, 1, 0) and result.tried == 2


def test_no_order_is_said_after_all_were_tried() -> None:
    result = find_order(PARTS, "0" * 64)
    assert (result.order, result.tried, result.complete) == (None, 720, True)


def test_the_time_is_bounded() -> None:
    result = find_order(PARTS, sha256_of((5, 4, 3, 2, 1, 0)), seconds=0.0)
    assert result.order is None and result.tried < 720 and not result.complete


def test_framed_is_a_json_array() -> None:
    assert b"".join(framed([b"1", b"2"])) == b"[\n1,\n2\n]"
