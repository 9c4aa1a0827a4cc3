"""PEFT's AdaLoRA: ΔW = alpha / r₀ · B diag(E) A, whose directions compete for a falling budget.

Zhang et al. 2023, AdaLoRA, arXiv 2303.10512. PEFT (0.21) decides: its `update_and_allocate` is called after every step,
and its loss has ½ · the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all matrices beside the task's. What it asks of the
model is answered from where ZeRO keeps it, at every stage:

| what it needs | where it is |
|---|---|
| the averages of \\|w ∂L/∂w\\| | states of the optimizer, `adalora_averages` |
| a direction that is masked | E's fp32 master becomes 0, and not the rounded copy alone |
| the regulariser's gradient | added in the backward pass, where ZeRO-3 holds A and B whole |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.penalty import PenaltyGradient
from flexlora_ds.orthogonality import violation
from flexlora_ds.partitions import MASTER, live_shards, loss_scale
from flexlora_ds.rank_changes.record import RankChange
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.engine.methods.adalora_averages import average_after_step
from launch.engine.methods.adalora_calendar import calendar_of, initial_rank
from launch.engine.methods.peft_adapter import PeftAdapter

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import AdaLoraConfig

_NOT_YET = 10**9
"""Steps of the run, until they are known."""


class AdaLoRA(PeftAdapter):
    """PEFT's AdaLoRA; what it has masked counts as pruned."""

    def peft_config(self) -> AdaLoraConfig:
        """Without its calendar, which the run's length decides (`attach`)."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=initial_rank(self.options.rank),
            target_r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            target_modules=self.matrices,
            total_step=_NOT_YET,
            task_type="CAUSAL_LM",
        )

    def wrapped(self, model: nn.Module) -> nn.Module:
        """With the regulariser's gradient at every layer."""
        wrapped: Any = super().wrapped(model)
        self._config = wrapped.peft_config["default"]
        self._penalty = PenaltyGradient("norm", self._coefficient)
        self._layers = {name: wrapped.base_model.model.get_submodule(name) for name in self.matrices}
        for layer in self._layers.values():
            # Before DeepSpeed's own hook, which lets ZeRO-3's weights go.
            layer.register_forward_hook(self._regularised)
        return wrapped  # type: ignore[no-any-return]

    def _regularised(self, layer: Any, inputs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        return self._penalty.attach(output, layer.lora_B["default"], layer.lora_A["default"])

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Each matrix gets the regulariser's gradient again; `_coefficient` says in which micro-batch."""
        self._penalty.begin_update()

    def _coefficient(self) -> float:
        """γ / n in the units of the scaled loss, on the first micro-step of each update; 0 on the others."""
        if self.engine.micro_steps % self.engine.gradient_accumulation_steps() != 0:
            return 0.0
        return float(self._config.orth_reg_weight) / (2 * len(self._layers)) * loss_scale(self.engine)

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """torch's AdamW, which also keeps the averages that the allocator needs."""
        optimizer = super().optimizer(model, adam)
        self._averages = average_after_step(optimizer, (self._config.beta1, self._config.beta2))
        return optimizer

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Give PEFT its calendar, and an allocator that looks into the engine."""
        from launch.engine.methods.adalora_allocator import ShardedAllocator

        super().attach(engine, total_steps, validate)
        calendar = calendar_of(total_steps, self.options)
        config = self._config
        config.total_step, config.tinit = total_steps, calendar.start
        config.tfinal, config.deltaT = calendar.freeze, calendar.interval
        self._tuner: Any = engine.module.base_model
        self._tuner.rankallocator = ShardedAllocator(engine, config)
        self._averages.active = self._averages_at(1)

    def _averages_at(self, step: int) -> bool:
        """Whether PEFT still averages at a step."""
        return bool(step < self._config.total_step - self._config.tfinal)

    def after_step(self, step: int) -> RankChange | None:
        """Let PEFT mask what its budget has no room for."""
        started, before = time.perf_counter(), self.ranks
        self._tuner.update_and_allocate(step)
        self._averages.active = self._averages_at(step + 1)
        after = self.ranks
        return None if after == before else self._change(step, before, after, time.perf_counter() - started)

    @property
    def ranks(self) -> dict[str, int]:
        """Directions of every matrix that are not masked."""
        everything = self._config.init_r
        pattern = {name.partition(".lora_E")[0]: sum(kept) for name, kept in self._pattern.items()}
        return {name: pattern.get(name, everything) for name in self.matrices}

    @property
    def _pattern(self) -> Mapping[str, list[bool]]:
        return self._config.rank_pattern or {}

    def _change(
        self, step: int, before: Mapping[str, int], after: Mapping[str, int], seconds: float
    ) -> RankChange:
        return RankChange(
            step=step,
            adjust_size=sum(abs(after[name] - before[name]) for name in after),
            importance={},
            score_margin=None,
            pruned=[name for name in after for _ in range(before[name] - after[name])],
            expanded=[name for name in after for _ in range(after[name] - before[name])],
            prune_age=[],
            ranks=dict(after),
            total_rank=sum(after.values()),
            trainable_params=self.trainable_parameters,
            loss_before=None,
            loss_after=None,
            spectrum_error=float("nan"),
            seconds=seconds,
        )

    @property
    def total_rank(self) -> int:
        """Σ of the directions that are not masked."""
        return sum(self.ranks.values())

    @property
    def trainable_parameters(self) -> int:
        """Those of the directions that are not masked."""
        return sum(
            rank * (self._layers[name].out_features + self._layers[name].in_features + 1)
            for name, rank in self.ranks.items()
        )

    def orthogonality(self) -> float:
        """Mean ‖Bᵀ B − I‖_F and ‖A Aᵀ − I‖_F, of the masters; collective."""
        pairs = [(layer.lora_B["default"], layer.lora_A["default"]) for layer in self._layers.values()]
        whole = dict(live_shards(self.engine).read([p for pair in pairs for p in pair], MASTER))
        found = [norm for B, A in pairs for norm in violation(whole[B], whole[A])]
        return float(torch.stack(found).mean())

    def state_dict(self) -> dict[str, Any]:
        """Which directions are masked; the averages are states of the optimizer."""
        return {"kept": {name: [int(one) for one in kept] for name, kept in self._pattern.items()}}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after `step`."""
        kept = {name: [bool(one) for one in row] for name, row in state["kept"].items()}
        self._config.rank_pattern = kept or None
        self._averages.active = self._averages_at(step + 1)
