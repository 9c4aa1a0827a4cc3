"""PEFT's rank allocator for AdaLoRA over a DeepSpeed engine: it sees whole tensors, whatever ZeRO has made of them.

PEFT's own multiplies a parameter by its whole gradient after every step, which ZeRO-2 and 3 have no longer, and masks
the parameter that the model computes with, which the next update overwrites from its master. Here the optimizer
averages where it has both (`average_after_step`), and a mask goes into the master.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.adalora import RankAllocator
from torch import Tensor, nn

from flexlora_ds.partitions import MASTER, live_shards
from launch.engine.methods.adalora_averages import AVERAGE, DEVIATION


class _Named:
    """As much of a model as PEFT's allocator asks for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors.items())


class ShardedAllocator(RankAllocator):  # type: ignore[misc]
    """PEFT's allocator; the `model` that its callers give is looked for in the engine instead."""

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine = engine
        self._parameters: dict[str, nn.Parameter] = {
            name: p for name, p in engine.module.base_model.model.named_parameters() if p.requires_grad
        }
        shapes = live_shards(engine).shapes
        whole = {name: torch.empty(shapes[p], device="meta") for name, p in self._parameters.items()}
        super().__init__(_Named(whole), config, "default")

    def update_ipt(self, model: Any) -> None:
        """The optimizer has done it."""

    def mask_to_budget(self, model: Any, budget: int) -> dict[str, list[bool]] | None:
        """Mask the directions of least importance, on all processes alike; collective.

        Returns:
            By E's name, which of its directions are left; None where no update has been applied yet.
        """
        shards = live_shards(self._engine)
        if AVERAGE not in shards.keys or budget >= self.init_bgt:
            return None
        names = {p: name for name, p in self._parameters.items()}
        for key, into in ((AVERAGE, self.exp_avg_ipt), (DEVIATION, self.exp_avg_unc)):
            into.update((names[p], value.clone()) for p, value in shards.read(list(names), key))
        with self._masters() as seen:
            pattern: dict[str, list[bool]] = super().mask_to_budget(seen, budget)
        self.reset_ipt()
        return pattern

    def mask_using_rank_pattern(self, model: Any, rank_pattern: Any) -> None:
        """Mask once more what an update has moved; collective."""
        if rank_pattern:
            with self._masters() as seen:
                super().mask_using_rank_pattern(seen, rank_pattern)

    def _masters(self) -> _Masters:
        return _Masters(self._engine, self._parameters)


class _Masters:
    """While active, all parameters by name, E's being copies of their masters; what they become is written back."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._shards, self._parameters = live_shards(engine), parameters

    def __enter__(self) -> _Named:
        singular = [p for name, p in self._parameters.items() if ".lora_E." in name]
        self._copies = {p: value.clone() for p, value in self._shards.read(singular, MASTER)}
        return _Named({name: self._copies.get(p, p.data) for name, p in self._parameters.items()})

    def __exit__(self, *error: object) -> None:
        self._shards.write_all(MASTER, self._copies)
