"""ZeRO-1 and 2: parameters are made views of their group's flat tensor only where they are none.

DeepSpeed 0.19.8 makes every view anew after each update, though the update changed the flat tensor in place
(stage_1_and_2.py `_update_model_bit16_weights`). For the 480 tensors of an 8B model's adapters the host needs
milliseconds, in which a GPU waits.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def keep_parameter_views(engine: Any) -> None:
    """Let ZeRO-1 and 2 leave parameters that lie where they lay; other stages stay as they are."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper._update_model_bit16_weights = _Views(wrapper).renew


class _Views:
    """Parameters are views of their group's flat tensor, which the update changes in place."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.known: dict[int, tuple[int, ...]] = {}

    def renew(self, group: int) -> None:
        """Make the views anew, where one of them lies elsewhere than it did after the last time."""
        if self.known.get(group) == self._pointers(group):
            return
        type(self.wrapper)._update_model_bit16_weights(self.wrapper, group)
        self.known[group] = self._pointers(group)

    def _pointers(self, group: int) -> tuple[int, ...]:
        wrapper = self.wrapper
        return (
            wrapper.bit16_groups_flat[group].data_ptr(),
            *(p.data_ptr() for p in wrapper.bit16_groups[group]),
        )
