"""Back to an earlier checkpoint inside a live engine, whatever its ranks were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexlora_ds.checkpoint.state import Checkpoint
from flexlora_ds.errors import RunError


@dataclass(frozen=True)
class _Saved:
    """An edit that puts a parameter's saved state in place of what there is."""

    states: Mapping[str, Tensor]
    """By key, whole."""

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The saved one."""
        return tuple(next(iter(self.states.values())).shape)

    def __call__(self, whole: Tensor, key: str) -> Tensor:
        """The saved tensor of a key, where there is one."""
        return self.states[key].to(whole)


def return_to(engine: Any, checkpoint: Checkpoint) -> None:
    """Give the model the ranks and values of a checkpoint, and the optimizer its states; collective, between steps.

    Counts, schedule and random generators stay as they are: the run is not to be continued from there.

    Raises:
        RunError: the checkpoint is of other parameters.
    """
    from flexlora_ds.partitions import resize, state_by_name

    names = state_by_name.named_trainable(engine)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for label, value in checkpoint.tensors():
        name, key = state_by_name.split_label(label)
        if name not in states:
            raise RunError(f"{name} of the checkpoint is not trained here", str(checkpoint.folder))
        states[name][key] = value
    edits: dict[nn.Parameter, _Saved] = {names[name]: _Saved(held) for name, held in states.items() if held}
    resize(engine, edits)
