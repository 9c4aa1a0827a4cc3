"""What a run has decided before its first weight: the engine and all around it are built from this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launch.data.batch_layout import BatchLayout
from launch.engine.adam import AdamSettings
from launch.model.computation import Computation
from launch.model.skeleton import Skeleton
from launch.options.parameter_match import ParameterMatch
from launch.options.train_options import TrainOptions


@dataclass(frozen=True)
class Settled:
    """The decisions of one run, the same on all of its processes. `launch.planning.settle` makes them."""

    options: TrainOptions
    """Every option as this run uses it; what an engine needs of `auto` ones stands below."""
    repeatable: TrainOptions
    """The same for `options.yaml`: what depends on this machine alone (micro-batch, kernels, packing) is as asked."""
    given: frozenset[str]
    """The options that could have been left to `auto`, and were not."""
    skeleton: Skeleton
    computation: Computation
    layout: BatchLayout
    """How a global batch is divided."""
    ds_config: Mapping[str, Any]
    """For `deepspeed.initialize`."""
    adam: AdamSettings
    match: ParameterMatch | None = None
    """What `match_params` came to."""
    doubts: tuple[str, ...] = ()
    """Of the adapter that the run goes on from."""

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return int(self.ds_config["zero_optimization"]["stage"])

    def line(self) -> str:
        """Every decision in one line, whether it was asked for or left to `auto`."""
        precision, attention, packed, *others = self.computation.words(self.given)
        layout = self.layout
        batch = (
            f"micro-batch {layout.micro_batch_size} × accumulation {layout.accumulation_steps} × "
            f"processes {layout.processes}{' (given)' if 'micro_batch_size' in self.given else ''}"
        )
        day = f" of {self.options.prompt_date}" if self.options.prompt_date else ""
        return ", ".join([precision, attention, packed, batch, *others, f"prompt {self.options.prompt}{day}"])

    def with_match(self, match: ParameterMatch | None) -> Settled:
        """The same with what `match_params` comes to over the run's real length."""
        return replace(self, match=match)

    def dated(self, day: str) -> Settled:
        """The same with the value of `template_date`, which the processes agree on."""
        return replace(
            self,
            options=self.options.replace(template_date=day),
            repeatable=self.repeatable.replace(template_date=day),
        )
