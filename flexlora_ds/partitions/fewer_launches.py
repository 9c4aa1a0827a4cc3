"""What DeepSpeed does with every gradient by itself, done with many at once; it lasts through rank changes."""

from __future__ import annotations

from typing import Any

from flexlora_ds.partitions.fused_checks import fuse_gradient_checks
from flexlora_ds.partitions.gradient_buckets import copy_gradients_together
from flexlora_ds.partitions.parameter_views import keep_parameter_views

_MARK = "_flexlora_spares_launches"


def spare_launches(engine: Any) -> None:
    """Let a DeepSpeed engine's wrapper look at gradients together, and copy them together (ZeRO-1 and 2).

    On a GPU each operation on each of an adapter's hundreds of small tensors costs the host more than the device.
    Losses and states stay as they are, bit for bit; a gradient norm may differ in its last digit. Call it between two
    updates: gradients that are half summed up have another form.
    """
    fuse_gradient_checks(engine)
    copy_gradients_together(engine)
    keep_parameter_views(engine)
    setattr(engine.optimizer, _MARK, True)


def spares_launches(wrapper: Any) -> bool:
    """Whether `spare_launches` was asked for: a wrapper constructed anew has forgotten what it replaced."""
    return bool(getattr(wrapper, _MARK, False))
