"""The life of ranks during a run: after each step, is a change due? decide -> apply -> record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from flexlora_ds.adapter.layer import AdaptedLinear, adapters, forward_context, require_scale
from flexlora_ds.adapter.parameter_groups import lambda_factor
from flexlora_ds.adapter.penalty import PenaltyGradient
from flexlora_ds.allocation import RankPlan
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.directions import TensorEdit, matrix_edits
from flexlora_ds.gradient.growth import StepSketch
from flexlora_ds.gradient.sketch import Growth
from flexlora_ds.importance import spectrum_error
from flexlora_ds.orthogonality import LARGEST_STEP
from flexlora_ds.partitions import (
    forget_construction,
    live_shards,
    loss_scale,
    require_boundary,
    require_engine,
    resize,
)
from flexlora_ds.rank_changes.decision import Decision, by_price, by_score
from flexlora_ds.rank_changes.market import Prices, gain_of, rises_of, with_common_noise
from flexlora_ds.rank_changes.orthogonalise import Orthogonaliser
from flexlora_ds.rank_changes.premises import (
    next_step,
    next_update,
    require_trained,
    require_untouched,
    warn_of_rates,
)
from flexlora_ds.rank_changes.rank_warnings import Limits, PruneWatch, unreached, warnings_of
from flexlora_ds.rank_changes.record import RankChange, newborn_of
from flexlora_ds.rank_changes.spectra import Grams, MatrixView, read_grams, read_matrices
from flexlora_ds.schedule import adjustment_size, resolve_calendar

Validate = Callable[[], float]


class RankController:
    """Changes the ranks of an engine's adapters while it trains.

    Call `after_step(step)` once per attempted update, right after `engine.step()` at the accumulation boundary, on
    every process. `validate`, where given, returns a loss that is the same on every process; it is called just
    before and just after each change that moves a direction.

    Raises:
        UserError: no adapters in the model, or those of another scale; a calendar that contradicts itself; or a
            DeepSpeed optimizer whose state cannot be carried; or no engine, or one whose optimizer holds other
            parameters.
    """

    def __init__(
        self, engine: Any, config: FlexLoRAConfig, total_steps: int, validate: Validate | None = None
    ) -> None:
        require_engine(engine, "RankController")
        self.engine = engine
        self.config = config
        self.total_steps = total_steps
        self.validate = validate
        self.layers: dict[str, AdaptedLinear] = adapters(engine.module)
        require_scale(self.layers, config)
        self._context = context = forward_context(engine.module)
        self.interval = resolve_calendar(total_steps, config).interval
        forget_construction(engine)
        live_shards(engine)
        # Also where an earlier controller of this model has left its own.
        context.observer = context.renew = context.penalty = None
        self._penalty: PenaltyGradient | None = None
        if config.orth_form != "decoupled":
            self._penalty = PenaltyGradient(config.orth_form, self._penalty_coefficient)
        require_trained(engine, self.layers)
        self._orthogonaliser = Orthogonaliser(engine, self.layers)
        self.changes = 0
        self.watch = PruneWatch()
        self.births: dict[str, list[tuple[int, int]]] = {n: [(0, 0)] * r for n, r in self.ranks.items()}
        self.parameter_limit = self.trainable_parameters(with_lambda=False)
        self.initial_total_rank = self.total_rank
        self._pending = 0
        self._skipped = int(engine.skipped_steps)
        self._step = 0
        self._last: int | None = None
        self._updates = int(engine.global_steps)
        self._rates_seen = False
        self._sketch = StepSketch(engine, config) if config.new_direction == "gradient" else None
        self._prepare(1)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every matrix, in module order."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """The current rank of every matrix, in module order."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def total_rank(self) -> int:
        """Σ ranks."""
        return sum(self.ranks.values())

    @property
    def step(self) -> int:
        """The update that `after_step` was called for last; 0 before the first."""
        return self._step

    def trainable_parameters(self, *, with_lambda: bool = True) -> int:
        """Σ r · (in + out), plus r for λ."""
        return sum(
            layer.rank * (layer.out_features + layer.in_features + with_lambda)
            for layer in self.layers.values()
        )

    def after_step(self, step: int) -> RankChange | None:
        """Regularise, and change ranks if a change is due after `step` (counted from 1); collective.

        A change due on a step that was skipped (numbers not finite) happens after the next applied one. Returns the
        change that was applied, or None.

        Raises:
            UserError: `step` is not the one after the last, or someone else has changed the adapters.
            RunError: inside a gradient accumulation window.
        """
        require_boundary(self.engine)
        step = next_step(step, self._last, self.total_steps)
        self._updates = next_update(int(self.engine.global_steps), self._updates)
        self._last = step
        self._rates_seen = self._rates_seen or warn_of_rates(self.engine, self.layers, self.config)
        if self._sketch is not None:
            self._sketch.end()
        change = self._after_step(step)
        self._prepare(step + 1)
        return change

    def _prepare(self, step: int) -> None:
        """Look at the gradients of `step`, where ranks may change after it; each matrix gets its penalty again."""
        self._step = step - 1
        self._context.penalty = self._penalty
        if self._penalty is not None:
            self._penalty.begin_update()
        if self._sketch is not None and max(
            self._pending, adjustment_size(step, self.total_steps, self.config)
        ):
            self._sketch.begin(step)

    def _after_step(self, step: int) -> RankChange | None:
        due = adjustment_size(step, self.total_steps, self.config)
        self._pending = max(self._pending, due)
        skipped = int(self.engine.skipped_steps)
        if skipped > self._skipped:
            self._skipped = skipped
            return None
        if self._pending:
            require_untouched(self.engine, self.layers, {n: len(births) for n, births in self.births.items()})
        grams = None
        if self.config.orth_form == "decoupled" and self.config.orth_strength > 0:
            # Above it a step would overshoot; a schedule's factor may be more than 1.
            eta = min(LARGEST_STEP, self.config.orth_strength * self._lr_factor())
            grams = self._orthogonaliser.step(eta, with_grams=self._pending > 0)
        if not self._pending:
            return None
        size, self._pending = self._pending, 0
        return self._change(step, size, grams)

    def orthogonality(self) -> float:
        """Mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all matrices, of the masters; collective."""
        grams = read_grams(live_shards(self.engine), self.layers)
        return sum(g.violation for g in grams.values()) / len(grams)

    def _change(self, step: int, size: int, grams: Mapping[str, Grams] | None = None) -> RankChange:
        """`grams`: those of the masters as they are now, where they are known already."""
        started = time.perf_counter()
        matrices = read_matrices(
            live_shards(self.engine),
            self.layers,
            {name: self._mature(name) for name in self.layers},
            grams=grams,
            with_sensitivity=self.config.importance == "sensitivity",
        )
        error = max(spectrum_error(matrix.lam, matrix.exact) for matrix in matrices.values())
        decision = self._decide(step, size, matrices)
        plan = decision.plan
        loss_before, seconds_before = self._timed_validation(plan)
        born = self._born(decision)
        newborn = newborn_of(self.births, {name: matrix.lam for name, matrix in matrices.items()})
        ages = self._apply(step, decision, matrices, born)
        loss_after, seconds_after = self._timed_validation(plan)
        self.changes += 1
        change = RankChange(
            step=step,
            adjust_size=size,
            importance=decision.scores,
            score_margin=plan.score_margin,
            pruned=plan.pruned,
            expanded=plan.expanded,
            prune_age=ages,
            ranks=self.ranks,
            total_rank=self.total_rank,
            trainable_params=self.trainable_parameters(),
            loss_before=loss_before,
            loss_after=loss_after,
            spectrum_error=error,
            sigma={name: growth.sigma for name, growth in born.items()},
            noise={name: growth.error for name, growth in born.items() if math.isfinite(growth.error)},
            market=decision.market,
            newborn=newborn,
            seconds=time.perf_counter() - started - seconds_before - seconds_after,
        )
        limits = Limits(self.initial_total_rank, self.parameter_limit, self.interval)
        found = warnings_of(change, self.config, limits, self.watch)
        if self.changes == 1:
            found += unreached({name: matrix.lam for name, matrix in matrices.items()})
        return replace(change, warnings=found)

    def _timed_validation(self, plan: RankPlan) -> tuple[float | None, float]:
        if self.validate is None or plan.empty:
            return None, 0.0
        started = time.perf_counter()
        return self.validate(), time.perf_counter() - started

    def _decide(self, step: int, size: int, matrices: Mapping[str, MatrixView]) -> Decision:
        if self.config.importance == "growth":
            return by_price(matrices, self._prices(matrices), size, self.config, self.parameter_limit)
        return by_score(matrices, size, self.config, self.parameter_limit, step)

    def _born(self, decision: Decision) -> dict[str, Growth]:
        """The gradient's directions for the matrices that expand; collective where they are not known yet."""
        if decision.growths is not None:
            return {name: decision.growths[name] for name in decision.plan.expanded}
        return {} if self._sketch is None else self._sketch.growths(decision.plan.expanded)

    def _prices(self, matrices: Mapping[str, MatrixView]) -> Prices:
        """What a direction more would gain and one less would cost, by the records of this step; collective."""
        assert self._sketch is not None, "importance growth comes with new_direction gradient"
        growths = with_common_noise(self._sketch.growths(list(matrices)))
        living = self._sketch.living()
        travel = float(self.engine.basic_optimizer.param_groups[0]["lr"]) * self.interval
        return Prices(
            gain={
                name: gain_of(growths.get(name), layer.scaling, travel * lambda_factor(layer, self.config))
                for name, layer in self.layers.items()
            },
            rises={
                name: rises_of(m.lam, living[name], self.layers[name].scaling) for name, m in matrices.items()
            },
            growths=growths,
        )

    def _mature(self, name: str) -> list[bool]:
        """Which directions are at least `grace` changes old; those there from the start always are."""
        return [born == 0 or self.changes - change >= self.config.grace for born, change in self.births[name]]

    def _apply(
        self,
        step: int,
        decision: Decision,
        matrices: Mapping[str, MatrixView],
        born: Mapping[str, Growth],
    ) -> list[int]:
        """Resize what was decided; returns the ages in steps of the pruned directions.

        `born`: directions along the gradient, for those matrices that have one.
        """
        plan = decision.plan
        if plan.empty:
            return []
        edits: dict[nn.Parameter, TensorEdit] = {}
        ages = []
        births = dict(self.births)
        for name in (*plan.pruned, *plan.expanded):
            gone = decision.leaving.get(name)
            keep = [i for i in range(len(matrices[name].lam)) if i != gone]
            added = int(name in plan.expanded)
            ages += [] if gone is None else [step - births[name][gone][0]]
            births[name] = [births[name][i] for i in keep] + [(step, self.changes + 1)] * added
            pair = (born[name].left, born[name].right) if name in born else None
            edits.update(matrix_edits(self.layers[name], keep, added, self.config, step, pair))
        self._orthogonaliser.forget()
        resize(self.engine, edits)
        self.births = births
        return ages

    def _lr_factor(self) -> float:
        """The learning-rate schedule's factor: current over base rate of the first group."""
        initial = self._initial_lr()
        return float(self.engine.basic_optimizer.param_groups[0]["lr"]) / initial if initial else 1.0

    def _initial_lr(self) -> float:
        """The rate of P and Q before any schedule; of one that names its highest rate (OneCycleLR), that."""
        optimizer = self.engine.basic_optimizer
        group = optimizer.param_groups[0]
        known = [group[key] for key in ("max_lr", "initial_lr") if group.get(key)]
        return float(known[0] if known else optimizer.defaults.get("lr", 0.0))

    def _penalty_coefficient(self) -> float:
        """γ/n in the units of the scaled loss; `PenaltyGradient` gives it to a matrix once in an update.

        The engine divides the accumulated gradient by nothing that this one has not been multiplied by: it averages
        over processes, which all add the same.
        """
        return self.config.orth_strength / (2 * len(self.layers)) * loss_scale(self.engine)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the parameters; JSON."""
        return {
            "changes": self.changes,
            "births": {n: [list(b) for b in birth] for n, birth in self.births.items()},
            "parameter_limit": self.parameter_limit,
            "initial_total_rank": self.initial_total_rank,
            "pending": self._pending,
            "step": self._step,
            "watch": asdict(self.watch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the parameters and the engine's counts must already be the saved ones."""
        self._skipped = int(self.engine.skipped_steps)
        self.changes = int(state["changes"])
        self.births = {n: [(int(a), int(b)) for a, b in birth] for n, birth in state["births"].items()}
        self.parameter_limit = int(state["parameter_limit"])
        self.initial_total_rank = int(state["initial_total_rank"])
        self._pending = int(state["pending"])
        self.watch = PruneWatch(**state["watch"])
        self._last = int(state.get("step", self.engine.global_steps))
        self._updates = int(self.engine.global_steps)
        self._prepare(self._last + 1)
