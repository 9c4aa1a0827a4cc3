"""A learning-rate schedule in a checkpoint.

Of a LambdaLR the count of updates is enough, for its rates follow from that; so a run may go on with other groups of
parameters. Of any other of torch's schedules its own state is kept, and what it has set in the groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import MultiplicativeLR

from flexlora_ds.errors import RunError, UserError

_SET = ("lr", "betas")
"""What schedules set in a group of parameters: rates, and some a momentum (OneCycleLR)."""


def updates_of(scheduler: Any) -> int | None:
    """How many updates a schedule has counted that is a function of them alone; None for another, or for none."""
    return int(scheduler.last_epoch) if _follows_count(scheduler) else None


def state_of(scheduler: Any) -> dict[str, Any] | None:
    """The state of a schedule that is no function of its count alone, as JSON; None for another, or for none.

    Raises:
        UserError: it has none that can be written.
    """
    if scheduler is None or _follows_count(scheduler):
        return None
    kind = type(scheduler).__name__
    try:
        own = scheduler.state_dict()
        groups = [{key: group[key] for key in _SET} for group in scheduler.optimizer.param_groups]
        found: dict[str, Any] = json.loads(
            json.dumps({"kind": kind, "own": own, "groups": groups}, allow_nan=False)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"cannot carry the state of a {kind}", mend="use torch's LambdaLR") from None
    return found


def continue_schedule(scheduler: Any, updates: int | None, state: Mapping[str, Any] | None) -> None:
    """Set a schedule to where it was when `updates_of` and `state_of` gave these.

    Raises:
        RunError: it is of another kind.
    """
    if scheduler is None:
        return
    if _follows_count(scheduler) and updates is not None:
        _set_count(scheduler, updates)
    elif updates is not None or state is not None:
        kind = "LambdaLR" if state is None else state["kind"]
        if type(scheduler).__name__ != kind or state is None:
            raise RunError(
                f"the checkpoint's schedule is a {kind}, this one a {type(scheduler).__name__}",
                mend="resume with the schedule that it was written with",
            )
        scheduler.load_state_dict(state["own"])
        for group, saved in zip(scheduler.optimizer.param_groups, state["groups"], strict=True):
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})


def _follows_count(scheduler: Any) -> bool:
    # MultiplicativeLR has functions of that name too, and multiplies the rate that there is.
    return hasattr(scheduler, "lr_lambdas") and not isinstance(scheduler, MultiplicativeLR)


def _set_count(scheduler: Any, updates: int) -> None:
    scheduler.last_epoch, scheduler._step_count = updates, updates + 1
    rates = [base * f(updates) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    assert all(math.isfinite(rate) for rate in rates), "a learning rate that is not finite"
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
