"""What rank changes presuppose of the program around them: an engine, its optimizer, and steps one after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from operator import index
from typing import Any

from torch import nn

from flexlora_ds.adapter.layer import AdaptedLinear
from flexlora_ds.adapter.parameter_groups import lambda_factor
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.optimizer import FlexLoRAAdamW
from flexlora_ds.partitions import trainable_groups

_BUILD = "give the engine build_optimizer(model, config) of this model"


def require_trained(engine: Any, layers: Mapping[str, AdaptedLinear]) -> None:
    """Look whether the engine's optimizer holds what is to be trained.

    Raises:
        UserError: an adapter's parameter is in no group of it, or is not in memory. A warning names what else asks for
            gradients that no group holds.
    """
    held = _held(engine)
    for name, layer in layers.items():
        for part, p in (("P", layer.P), ("λ", layer.lam), ("Q", layer.Q)):
            if p.is_meta:
                raise UserError(f"{part} of {name} is not in memory", "device meta", "load the model whole")
            if p not in held:
                raise UserError(f"{part} of {name} is in no group of the engine's optimizer", mend=_BUILD)
    left = [name for name, p in engine.module.named_parameters() if p.requires_grad and p not in held]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"{left[0]}{more} would get gradients and no update: give them to build_optimizer in extra_groups",
            stacklevel=3,
        )


def _held(engine: Any) -> set[nn.Parameter]:
    return {p for group in trainable_groups(engine) for p in group}


def require_untouched(engine: Any, layers: Mapping[str, AdaptedLinear], ranks: Mapping[str, int]) -> None:
    """Look whether nobody else has changed the adapters since the last look.

    Args:
        ranks: those that the controller knows.

    Raises:
        UserError: another rank, or other parameters, as `load_state_dict(assign=True)` leaves.
    """
    held = _held(engine)
    for name, layer in layers.items():
        if layer.rank != ranks[name]:
            raise UserError(
                f"{name} has rank {layer.rank}, and this controller left it at {ranks[name]}",
                mend="let one controller alone change the ranks of a model",
            )
        if not held.issuperset((layer.P, layer.lam, layer.Q)):
            raise UserError(
                f"the parameters of {name} are other objects than those in the optimizer",
                mend="load values into them, with load_state_dict without assign",
            )


def warn_of_rates(engine: Any, layers: Mapping[str, AdaptedLinear], config: FlexLoRAConfig) -> bool:
    """Warn where a schedule gives all groups one rate, as OneCycleLR and DeepSpeed's WarmupLR do with one number.

    Returns whether there was a rate to look at: in a warm-up from 0 it is too early. Only `build_optimizer` gives λ
    groups of its own, after that of P and Q.
    """
    optimizer = engine.basic_optimizer
    base, *others = optimizer.param_groups
    if not isinstance(optimizer, FlexLoRAAdamW) or base["lr"] == 0:
        return not isinstance(optimizer, FlexLoRAAdamW)
    factors = sorted({lambda_factor(layer, config) for layer in layers.values()})
    for group, factor in zip(others, factors, strict=False):
        ratio = float(group["lr"]) / float(base["lr"])
        if not math.isclose(ratio, factor, rel_tol=0.01):
            warnings.warn(
                f"λ learns at {ratio:.3g} times the rate of P and Q, and lambda_lr means {factor:.3g} times: give the "
                "schedule a rate for each group, or one that multiplies rates (LambdaLR)",
                stacklevel=3,
            )
            break
    return True


def next_update(count: int, before: int) -> int:
    """The number of updates that an engine has made, checked.

    A change of ranks drops gradients, so one before the update that they are for would lose it.

    Args:
        count: as the engine has it now.
        before: what it was at the last call.

    Raises:
        UserError: it is the same.
    """
    if count == before:
        raise UserError(
            f"there was no update since the last call; the engine counts {count}",
            "after_step",
            "call it after the engine.step() that ends an update, in a loop of your own after counting global_steps",
        )
    return count


def next_step(step: Any, last: int | None, total: int) -> int:
    """The number of an update, checked.

    Args:
        step: as it was given.
        last: the one before it, where one is known.
        total: of the whole run.

    Raises:
        UserError: it is no number of a step, or not the one after the last. A warning says that the run is longer than
            it was said to be.
    """
    try:
        number = index(step)
    except TypeError:
        raise UserError(f"{step!r} is no number of a step", "after_step", "count updates from 1") from None
    if number < 1:
        raise UserError(f"there is no step {number}", "after_step", "count updates from 1")
    if last is not None and number != last + 1:
        raise UserError(
            f"step {number} follows step {last}",
            "after_step",
            "call it once after every update of the run, with their numbers in turn",
        )
    if number == total + 1:
        warnings.warn(
            f"step {number} of a run of {total}: ranks change by total_steps, and are fixed from here on",
            stacklevel=3,
        )
    return number
