"""The learning-rate factor against closed forms, and counted in applied updates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.engine.lr_schedule import build_lr_scheduler, factor, peak_doubt
from launch.options.train_options import LrSchedule, TrainOptions

SCHEDULES: tuple[LrSchedule, ...] = ("linear", "cosine", "constant")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_the_peak(schedule: LrSchedule) -> None:
    rising = [factor(step, 100, 4, schedule=schedule) for step in range(5)]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_linear_and_cosine_meet_their_closed_forms() -> None:
    for step in range(10, 101):
        progress = (step - 10) / 90
        assert factor(step, 100, 10) == pytest.approx(1 - progress)
        cosine = factor(step, 100, 10, schedule="cosine", min_ratio=0.1)
        assert cosine == pytest.approx(0.1 + 0.9 * math.cos(math.pi * progress / 2) ** 2)
        assert factor(step, 100, 10, schedule="constant", min_ratio=0.1) == 1.0


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_every_update_of_a_run_has_a_factor_in_range(
    schedule: LrSchedule, total: int, warmup: int, ratio: float
) -> None:
    values = [factor(step, total, warmup, schedule=schedule, min_ratio=ratio) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    peak = min(warmup, total - 1)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    if schedule != "constant" and warmup < total:
        assert factor(total, total, warmup, schedule=schedule, min_ratio=ratio) == pytest.approx(ratio)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "reached"), [(11, None), (12, "0.00092"), (99, "0.00012")])
def test_a_warm_up_that_never_ends_is_told_of(schedule: LrSchedule, warmup: int, reached: str | None) -> None:
    options = TrainOptions(lr=1e-3, warmup_steps=warmup, lr_schedule=schedule)
    doubt = peak_doubt(options, 12)
    if reached is None:
        assert doubt is None
    else:
        assert doubt is not None and f"the run's 12 steps: lr rises to {reached}, not to 0.001" in doubt


def test_scheduler_scales_every_group_by_its_own_peak() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1e-3}, {"params": [second], "lr": 2e-2}])
    options = TrainOptions(lr=1e-3, warmup_steps=3, lr_schedule="cosine", min_lr_ratio=0.25)
    scheduler = build_lr_scheduler(optimizer, options, total_steps=12)
    for step in range(12):
        expected = factor(step, 12, 3, schedule="cosine", min_ratio=0.25)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [1e-3 * expected, 2e-2 * expected]
        )
        optimizer.step()
        scheduler.step()
