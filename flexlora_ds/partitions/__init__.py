"""The training state of parameters in a live engine, DeepSpeed's or plain torch's: read it, write it, reshape it.

The only package that touches DeepSpeed's internals (read from 0.19.8), and none of it is imported before there is an
engine of DeepSpeed's. The training state of a parameter is its fp32 master weight, every per-element optimizer state
and its step, whole, by name, whatever the ZeRO stage, the offload or the number of processes; nothing outside this
package knows how ZeRO lays memory out.
"""

from flexlora_ds.partitions.finite import GradientProbe, skip_non_finite
from flexlora_ds.partitions.layout import (
    live_shards,
    loss_scale,
    require_engine,
    trainable_groups,
    whereabouts,
)
from flexlora_ds.partitions.rebuild import forget_construction, require_boundary, resize
from flexlora_ds.partitions.shards import BUCKET_ELEMENTS, MASTER, Shards, copy_all
from flexlora_ds.partitions.torch_engine import TorchEngine
from flexlora_ds.partitions.transfer import Edit
from flexlora_ds.partitions.trial import try_backward

__all__ = [
    "BUCKET_ELEMENTS",
    "MASTER",
    "Edit",
    "GradientProbe",
    "Shards",
    "TorchEngine",
    "copy_all",
    "forget_construction",
    "live_shards",
    "loss_scale",
    "require_boundary",
    "require_engine",
    "resize",
    "skip_non_finite",
    "trainable_groups",
    "try_backward",
    "whereabouts",
]
