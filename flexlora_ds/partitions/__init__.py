"""The training state of parameters inside a live DeepSpeed engine: read it, write it, give parameters new shapes.

The only package that touches DeepSpeed's internals (read from 0.19.8). The training state of a parameter is its fp32
master weight, every per-element optimizer state and its step, whole, by name, whatever the ZeRO stage, the offload or
the number of processes; nothing outside this package knows how ZeRO lays memory out.
"""

from flexlora_ds.partitions.finite import GradientProbe, fuse_gradient_checks, skip_non_finite
from flexlora_ds.partitions.layout import live_shards, loss_scale, trainable_groups
from flexlora_ds.partitions.rebuild import resize
from flexlora_ds.partitions.rebuild_wrapper import forget_construction
from flexlora_ds.partitions.shards import BUCKET_ELEMENTS, MASTER, Shards
from flexlora_ds.partitions.transfer import Edit

__all__ = [
    "BUCKET_ELEMENTS",
    "MASTER",
    "Edit",
    "GradientProbe",
    "Shards",
    "forget_construction",
    "fuse_gradient_checks",
    "live_shards",
    "loss_scale",
    "resize",
    "skip_non_finite",
    "trainable_groups",
]
