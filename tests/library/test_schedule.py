"""The calendar of rank changes against its definition, step by step."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_ds.config import CHOICES, FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.schedule import (
    Calendar,
    adjustment_size,
    describe,
    due_steps,
    require_countable,
    resolve_calendar,
)


def defined_size(
    step: int, total: int, start: int, freeze: int, interval: int, schedule: str, b0: int
) -> int:
    """b(t) from the definition, in 60 decimal digits."""
    if not start < step < total - freeze or (step - start) % interval != 0:
        return 0
    with localcontext() as context:
        context.prec = 60
        p = Decimal(step - start) / Decimal(total - freeze - start)
        value = {
            "cubic": b0 * (1 - p**3),
            "cubic_fast": b0 * (1 - p) ** 3,
            "linear": b0 * (1 - p),
            "exponential": b0 * (-5 * p).exp(),
            "constant": Decimal(b0),
        }[schedule]
        return int(value.quantize(Decimal(1), rounding=ROUND_HALF_UP))


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 400),
    start=st.integers(0, 200),
    freeze=st.integers(0, 200),
    interval=st.integers(1, 60),
    schedule=st.sampled_from(CHOICES["schedule"]),
    size=st.sampled_from([1, 2, 4, 8, 16, 64]),
)
def test_sizes_follow_the_definition(
    total: int, start: int, freeze: int, interval: int, schedule: str, size: int
) -> None:
    config = FlexLoRAConfig(
        adjust_start=start,
        adjust_freeze=freeze,
        adjust_interval=interval,
        schedule=schedule,  # type: ignore[arg-type]
        adjust_size=size,
    )
    if total - freeze < start:
        with pytest.raises(UserError, match="freeze"):
            adjustment_size(1, total, config)
        return
    expected = [
        defined_size(step, total, start, freeze, interval, schedule, size) for step in range(1, total + 1)
    ]
    assert [adjustment_size(step, total, config) for step in range(1, total + 1)] == expected
    due = due_steps(total, config)
    assert {step for step, value in enumerate(expected, start=1) if value > 0} <= set(due)
    assert all(start < step < total - freeze and (step - start) % interval == 0 for step in due)
    assert len(due) == max(0, math.ceil((total - freeze - start) / interval) - 1)


def test_halves_round_up_exactly() -> None:
    # From 3, half-way through a linear fall: 1.5; at a sixth: 2.5. No rounding of floats may decide.
    config = FlexLoRAConfig(
        adjust_start=0, adjust_freeze=0, adjust_interval=1, schedule="linear", adjust_size=3
    )
    assert [adjustment_size(step, 6, config) for step in range(1, 6)] == [3, 2, 2, 1, 1]


def test_auto_gives_the_papers_calendar_at_the_papers_length() -> None:
    assert resolve_calendar(31_931, FlexLoRAConfig()) == Calendar(5000, 5000, 1000, 31_931)
    assert "21 changes, at most 63 of 1,280 directions" in describe(31_931, FlexLoRAConfig(), 1280)


@pytest.mark.parametrize("total", [30, 60, 200, 1000, 5000, 100_000])
def test_auto_keeps_its_proportions(total: int) -> None:
    calendar = resolve_calendar(total, FlexLoRAConfig())
    assert calendar.start == calendar.freeze
    assert abs(calendar.start - 0.1566 * total) <= 0.5 + 1e-4 * total
    assert calendar.interval == max(20, math.floor(0.0313178 * total + 0.5))
    assert len(due_steps(total, FlexLoRAConfig())) >= (19 if total > 640 else (total * 0.68) // 20 - 1)
    if total == 200:
        assert due_steps(200, FlexLoRAConfig()) == [51, 71, 91, 111, 131, 151]


def test_the_shortest_runs_have_a_calendar_without_error() -> None:
    for total in range(1, 30):
        assert all(1 <= step < total for step in due_steps(total, FlexLoRAConfig()))


def test_size_zero_means_no_change_and_no_error() -> None:
    config = FlexLoRAConfig(adjust_size=0, adjust_start=90, adjust_freeze=90)
    assert due_steps(100, config) == []
    assert [adjustment_size(step, 100, config) for step in range(1, 101)] == [0] * 100
    assert describe(100, config, 80).startswith("no rank changes")


def test_errors_and_the_empty_calendar_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"step 10, before the start at step 60 .*adjust_freeze"):
        resolve_calendar(100, FlexLoRAConfig(adjust_start=60, adjust_freeze=90))
    with pytest.raises(UserError, match="at least 1"):
        resolve_calendar(0, FlexLoRAConfig())
    with pytest.raises(UserError, match=r"999,990 rank changes are more than 100,000 \(key adjust_interval"):
        require_countable(10**6, FlexLoRAConfig(adjust_start=5, adjust_freeze=5, adjust_interval=1))
    require_countable(10**6, FlexLoRAConfig(adjust_size=0, adjust_interval=1))
    empty = FlexLoRAConfig(adjust_start=10, adjust_freeze=10, adjust_interval=500)
    assert due_steps(100, empty) == []
    assert describe(100, empty, 80).startswith("no rank changes") and "500" in describe(100, empty, 80)


def test_describe_counts_changes_and_directions() -> None:
    config = FlexLoRAConfig(
        adjust_start=10, adjust_freeze=10, adjust_interval=20, schedule="constant", adjust_size=3
    )
    assert (
        describe(100, config, 1000)
        == "3 changes, at most 9 of 1,000 directions (every 20 steps from step 30 to 70)"
    )


def test_a_number_of_steps_that_is_not_whole_is_refused() -> None:
    for total in (100.0, 37.5, math.nan):
        for ask in (due_steps, require_countable, lambda total, config: adjustment_size(40, total, config)):
            with pytest.raises(UserError, match=r"is no whole number of steps \(total steps\); round it"):
                ask(total, FlexLoRAConfig())  # type: ignore[operator]
