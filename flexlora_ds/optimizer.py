"""AdamW whose bias correction knows the age of every element. Pure.

A direction that joins a trained matrix starts with zero moments. Under a step count that is already large
nothing corrects their bias, and it moves by several times the learning rate a step. Here each element counts
the updates it has had itself; the count is one more state shaped like the parameter, so whatever shards,
saves or resizes the moments does the same with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_Columns: TypeAlias = dict[str, list[Tensor]]
_Moments: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_CPU_RUN = 2**17  # elements


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

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: torch's own method knows nothing of a subclass's settings."""
        own = ("per_element_age", "sensitivity", "sensitivity_betas")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`, with states of full precision also where a parameter is not.

        Torch casts states to the dtype of their parameter: an age in bfloat16 would end at 256.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key in self.state_keys() and value.dtype != p.dtype:
                    self.state[p][key] = value.to(p.device, copy=True)

    def state_keys(self) -> tuple[str, ...]:
        """The per-element states that this optimizer keeps."""
        ages = ("age",) if self.per_element_age else ()
        averages = ("sensitivity", "uncertainty") if self.sensitivity else ()
        return ("exp_avg", "exp_avg_sq", *ages, *averages)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            self._prepare(p)
            self.state[p]["step"] += 1
        held = [p for p in params if p.numel() > 0]
        rows = [self._row(p) for p in held]
        for batch in _batches(rows):
            self._update(batch, group)
        for p, row in zip(held, rows, strict=True):
            if row.tensors["weight"] is not p:
                p.copy_(row.tensors["weight"])

    def _row(self, p: Tensor) -> _Row:
        """What the update of one parameter reads and writes; a copy of it where it is of low precision."""
        assert p.grad is not None
        state = self.state[p]
        tensors = {key: state[key] for key in self.state_keys()}
        dtype = state["exp_avg"].dtype
        return _Row(state["step"], tensors | {"weight": p.to(dtype), "grad": p.grad.to(dtype)})

    def _update(self, rows: list[_Row], group: dict[str, Any]) -> None:
        columns = {key: [row.tensors[key] for row in rows] for key in rows[0].tensors}
        if self.sensitivity:
            _track_sensitivity(columns, self.sensitivity_betas)
        _update_moments(columns, group["betas"])
        if self.per_element_age:
            numerators, denominators = _corrected_by_age(columns, group["betas"])
        else:
            numerators, denominators = _corrected_by_step(
                columns, [float(row.step) for row in rows], group["betas"]
            )
        torch._foreach_add_(denominators, group["eps"])
        lr = float(group["lr"])
        if group["weight_decay"] != 0:
            torch._foreach_mul_(columns["weight"], 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(columns["weight"], numerators, denominators, value=-lr)

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


@dataclass(frozen=True)
class _Row:
    """A parameter, or a run of its elements: its step, and its tensors by name, all of one shape."""

    step: Tensor
    tensors: dict[str, Tensor]


def _batches(rows: list[_Row]) -> Iterator[list[_Row]]:
    """What to update at once: on an accelerator all, on a CPU runs of elements that its cache holds.

    There a temporary as large as a partition costs more in page faults than the arithmetic on it.
    """
    if any(row.tensors["weight"].device.type != "cpu" for row in rows):
        yield rows
        return
    for row in rows:
        if not all(tensor.is_contiguous() for tensor in row.tensors.values()):
            yield [row]
            continue
        runs = {key: torch.split(tensor.view(-1), _CPU_RUN) for key, tensor in row.tensors.items()}
        for i in range(len(runs["weight"])):
            yield [_Row(row.step, {key: parts[i] for key, parts in runs.items()})]


def _track_sensitivity(columns: _Columns, betas: tuple[float, float]) -> None:
    """Ī ← β1 Ī + (1 − β1) I and Ū ← β2 Ū + (1 − β2) |I − Ī| with I = |w · ∂L/∂w|, before w moves."""
    current = torch._foreach_mul(columns["weight"], columns["grad"])
    torch._foreach_abs_(current)
    torch._foreach_lerp_(columns["sensitivity"], current, 1 - betas[0])
    torch._foreach_sub_(current, columns["sensitivity"])
    torch._foreach_abs_(current)
    torch._foreach_lerp_(columns["uncertainty"], current, 1 - betas[1])


def _update_moments(columns: _Columns, betas: tuple[float, float]) -> None:
    grads = columns["grad"]
    torch._foreach_lerp_(columns["exp_avg"], grads, 1 - betas[0])
    torch._foreach_mul_(columns["exp_avg_sq"], betas[1])
    torch._foreach_addcmul_(columns["exp_avg_sq"], grads, grads, 1 - betas[1])


def _corrected_by_age(columns: _Columns, betas: tuple[float, float]) -> _Moments:
    """m / (1 − β1^age) and √(v / (1 − β2^age)), ages counted up first."""
    ages = columns["age"]
    torch._foreach_add_(ages, 1)
    ages = _without_repetition(ages)
    numerators = torch._foreach_div(columns["exp_avg"], _corrections(ages, betas[0]))
    denominators = torch._foreach_div(columns["exp_avg_sq"], _corrections(ages, betas[1]))
    torch._foreach_sqrt_(denominators)
    return numerators, denominators


def _without_repetition(ages: list[Tensor]) -> list[Tensor]:
    """One age for all where a run of elements on a CPU has but one: the quotients keep every bit, and cost a third.

    On an accelerator the question would wait for the device.
    """
    if len(ages) != 1 or ages[0].device.type != "cpu" or ages[0].dim() != 1:
        return ages
    low, high = torch.aminmax(ages[0])
    return [ages[0][:1]] if low == high else ages


def _corrections(ages: list[Tensor], beta: float) -> tuple[Tensor, ...]:
    """1 − β^age, as −expm1(age · ln β): the plain difference would lose its digits while β^age is near 1."""
    corrections = torch._foreach_mul(ages, math.log(beta))
    torch._foreach_expm1_(corrections)
    torch._foreach_neg_(corrections)
    return corrections


def _corrected_by_step(columns: _Columns, steps: list[float], betas: tuple[float, float]) -> _Moments:
    """The same with one step count per parameter in place of the ages."""
    numerators = torch._foreach_div(columns["exp_avg"], [1 - betas[0] ** step for step in steps])
    denominators = torch._foreach_sqrt(columns["exp_avg_sq"])
    torch._foreach_div_(denominators, [math.sqrt(1 - betas[1] ** step) for step in steps])
    return numerators, denominators
