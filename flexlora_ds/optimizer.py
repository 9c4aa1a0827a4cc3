"""AdamW whose bias correction knows the age of every element. Pure.

A direction that joins a trained matrix starts with zero moments. Under a step count that is already large
nothing corrects their bias, and it moves by several times the learning rate a step. Here each element counts
the updates it has had itself; the count is one more state shaped like the parameter, so whatever shards,
saves or resizes the moments does the same with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FlexLoRAAdamW(Optimizer):
    """AdamW (decoupled weight decay) with an age per element, and AdaLoRA's sensitivity averages on request.

    State of a parameter, shaped like it, in float32 (float64 for a float64 parameter): `exp_avg`,
    `exp_avg_sq`, `age` (updates of this element), and with `sensitivity` also `sensitivity` and
    `uncertainty`; and `step`, a float32 scalar on the CPU. Parameters may be of any shape, empty and flat
    ones (ZeRO's partitions) included; one whose gradient is None is left alone, its state too. Where all
    ages equal the step, an update is that of `torch.optim.AdamW` up to rounding.

    Args:
        params: parameters, or parameter groups that may set their own `lr`, `betas`, `eps`, `weight_decay`.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled: a step multiplies the parameter by 1 − lr · weight_decay.
        per_element_age: False keeps no ages and corrects by the step alone: plain AdamW.
        sensitivity: keep the averages of |w · ∂L/∂w| and of their deviation (the paper's Eqs. 5 and 6).
        sensitivity_betas: decay of these two.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        per_element_age: bool = True,
        sensitivity: bool = False,
        sensitivity_betas: tuple[float, float] = (0.85, 0.85),
    ) -> None:
        if min(lr, eps, weight_decay) < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        for beta in (*betas, *sensitivity_betas):
            if not 0 < beta < 1:
                raise ValueError(
                    f"betas {betas} and sensitivity_betas {sensitivity_betas} lie between 0 and 1"
                )
        self.per_element_age = per_element_age
        self.sensitivity = sensitivity
        self.sensitivity_betas = sensitivity_betas
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def state_keys(self) -> tuple[str, ...]:
        """The per-element states that this optimizer keeps."""
        ages = ("age",) if self.per_element_age else ()
        averages = ("sensitivity", "uncertainty") if self.sensitivity else ()
        return ("exp_avg", "exp_avg_sq", *ages, *averages)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            self._prepare(p)
        if not params:
            return
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        params = [p for p in params if p.numel() > 0]
        if not params:
            return

        states = {key: [self.state[p][key] for p in params] for key in self.state_keys()}
        moments = states["exp_avg"]
        weights = [
            p.to(m.dtype) for p, m in zip(params, moments, strict=True)
        ]  # p itself unless of low precision
        grads = [p.grad.to(m.dtype) for p, m in zip(params, moments, strict=True)]
        if self.sensitivity:
            _track_sensitivity(
                weights, grads, states["sensitivity"], states["uncertainty"], self.sensitivity_betas
            )
        _update_moments(grads, moments, states["exp_avg_sq"], group["betas"])
        if self.per_element_age:
            numerators, denominators = _corrected_by_age(states, group["betas"], group["eps"])
        else:
            steps = [float(self.state[p]["step"]) for p in params]
            numerators, denominators = _corrected_by_step(states, steps, group["betas"], group["eps"])
        lr = float(group["lr"])
        if group["weight_decay"] != 0:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, numerators, denominators, value=-lr)
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    def _prepare(self, p: Tensor) -> None:
        """Make the state of a parameter that has none yet."""
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("FlexLoRAAdamW has no update for sparse gradients")
        state = self.state[p]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        dtype = torch.promote_types(p.dtype, torch.float32)
        for key in self.state_keys():
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _track_sensitivity(
    weights: list[Tensor],
    grads: list[Tensor],
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    betas: tuple[float, float],
) -> None:
    """Ī ← β1 Ī + (1 − β1) I and Ū ← β2 Ū + (1 − β2) |I − Ī| with I = |w · ∂L/∂w|, before w moves."""
    current = torch._foreach_mul(weights, grads)
    torch._foreach_abs_(current)
    torch._foreach_lerp_(sensitivity, current, 1 - betas[0])
    torch._foreach_sub_(current, sensitivity)
    torch._foreach_abs_(current)
    torch._foreach_lerp_(uncertainty, current, 1 - betas[1])


def _update_moments(
    grads: list[Tensor], first: list[Tensor], second: list[Tensor], betas: tuple[float, float]
) -> None:
    torch._foreach_lerp_(first, grads, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, grads, grads, 1 - betas[1])


def _corrected_by_age(
    states: dict[str, list[Tensor]], betas: tuple[float, float], eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Numerators m / (1 − β1^age) and denominators √(v / (1 − β2^age)) + ε, ages counted up first."""
    ages = states["age"]
    torch._foreach_add_(ages, 1)
    # 1 − β^age as −expm1(age · ln β): exact where β^age is near 1, and no power of a tensor.
    corrections = []
    for beta in betas:
        correction = torch._foreach_mul(ages, math.log(beta))
        torch._foreach_expm1_(correction)
        torch._foreach_neg_(correction)
        corrections.append(correction)
    first, second = corrections
    numerators = torch._foreach_div(states["exp_avg"], first)
    denominators = torch._foreach_div(states["exp_avg_sq"], second)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    return numerators, denominators


def _corrected_by_step(
    states: dict[str, list[Tensor]], steps: list[float], betas: tuple[float, float], eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The same with one step count per parameter in place of the ages."""
    numerators = torch._foreach_div(states["exp_avg"], [1 - betas[0] ** step for step in steps])
    denominators = torch._foreach_sqrt(states["exp_avg_sq"])
    torch._foreach_div_(denominators, [math.sqrt(1 - betas[1] ** step) for step in steps])
    torch._foreach_add_(denominators, eps)
    return numerators, denominators
