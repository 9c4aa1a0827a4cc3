"""ZeRO-1 and 2: gradients go into a bucket, and from it into this process's partition, many in one copy.

DeepSpeed 0.19.8 copies every gradient by itself, in a hook written in Python, into the bucket that is reduced next,
and once more into its partition (stage_1_and_2.py `reduce_independent_p_g_buckets_and_remove_grads`,
`copy_grads_in_partition`). With the 480 small tensors of an 8B model's adapters a GPU waits for the host there. Here
the hook only notes the gradient. Buckets, their order, reductions and all values are DeepSpeed's own.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def copy_gradients_together(engine: Any) -> None:
    """Let ZeRO-1 and 2 copy gradients by the bucket; other stages, and gradients on the host, stay as they are."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and _is_plain(wrapper):
        together = _Together(wrapper)
        wrapper.reduce_independent_p_g_buckets_and_remove_grads = together.note
        wrapper.reduce_ipg_grads = together.reduce
        wrapper.copy_grads_in_partition = together.keep


def _is_plain(wrapper: DeepSpeedZeroOptimizer) -> bool:
    """Whether gradients take the way that is shortened here: a contiguous bucket of the parameters' own dtype."""
    special = wrapper.cpu_offload or wrapper.zenflow or wrapper.use_grad_accum_attribute
    groups = range(len(wrapper.bit16_groups))
    compact = any(wrapper._use_compact_grad_partition_buffer(group) for group in groups)
    return bool(wrapper.contiguous_gradients) and not special and not compact


class _Together:
    """Stands in for three methods of one wrapper; holds gradients from their hook to their bucket's reduction.

    A bucket's elements are the most that it holds beyond DeepSpeed's own buffers.
    """

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.theirs = type(wrapper)
        self.noted: dict[torch.dtype, list[Tensor]] = {}
        """By the dtype of communication: the last gradients of the bucket, not yet in its buffer."""
        self.streams: set[Any] = set()
        """Where the noted gradients were computed."""
        self.kept: list[tuple[Any, int | None]] = []
        """(parameter of this process's partition, its group): reduced, still in the bucket's buffer."""

    def note(self, param: Any, group: int) -> None:
        """In the gradient's hook: it is the bucket's next, and a full bucket is reduced before."""
        wrapper, size = self.wrapper, param.numel()
        if not 0 < size <= wrapper.reduce_bucket_size or not getattr(param, "ds_grad_is_ready", True):
            self.theirs.reduce_independent_p_g_buckets_and_remove_grads(wrapper, param, group)
            return
        dtype = wrapper.get_param_comm_dtype(param)
        bucket = wrapper.ipg_buckets[dtype]
        if bucket.elements + size > wrapper.reduce_bucket_size:
            wrapper.reduce_ipg_grads(comm_dtype=dtype)
            if wrapper.overlap_comm:
                bucket.index = 1 - bucket.index
        number, gradient = wrapper.get_param_id(param), wrapper.get_gradient_for_reduction(param)
        assert not wrapper.params_already_reduced[number], "a gradient came twice"
        self.noted.setdefault(dtype, []).append(gradient)
        if gradient.is_cuda:
            self.streams.add(get_accelerator().current_stream())
        bucket.elements += size
        bucket.grads.append(gradient)
        bucket.params.append((group, param.param_idx_in_group, number))

    def reduce(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the buckets, or one of them, and take what this process owns out of them."""
        wrapper = self.wrapper
        for dtype in list(wrapper.ipg_buckets) if comm_dtype is None else [comm_dtype]:
            self._fill(wrapper.ipg_buckets[dtype], self.noted.pop(dtype, []))
        self.theirs.reduce_ipg_grads(wrapper, comm_dtype=comm_dtype)
        kept, self.kept = self.kept, []
        if not kept:
            return
        accelerator = get_accelerator()
        stream = wrapper.reduction_stream if wrapper.overlap_comm else accelerator.current_stream()
        with accelerator.stream(stream):
            # The first makes the partition's buffer where there is none.
            self.theirs.copy_grads_in_partition(wrapper, *kept[0])
            gradients = [wrapper.get_gradient_for_reduction(param) for param, _ in kept[1:]]
            _move(gradients, wrapper.grads_in_partition, wrapper.grads_in_partition_offset)
            wrapper.grads_in_partition_offset += sum(g.numel() for g in gradients)

    def keep(self, param: Any, group: int | None = None) -> None:
        """A reduced gradient of this process's partition: it leaves the bucket with the others."""
        self.kept.append((param, group))

    def _fill(self, bucket: Any, gradients: list[Tensor]) -> None:
        if not gradients:
            return
        streams, self.streams = self.streams, set()
        if len(streams) > 1 or (streams and get_accelerator().current_stream() not in streams):
            _wait_for(streams, gradients)
        if gradients[0].is_cuda and self.wrapper.overlap_comm:
            bucket.copy_streams.add(get_accelerator().current_stream())
        _move(gradients, bucket.buffer[bucket.index], bucket.elements - sum(g.numel() for g in gradients))


def _move(gradients: list[Tensor], buffer: Tensor, offset: int) -> None:
    """Copy gradients into a flat buffer from `offset` on, one behind the other, and let each be its part of it."""
    if not gradients:
        return
    sizes = [gradient.numel() for gradient in gradients]
    parts = torch.split(buffer.view(-1).narrow(0, offset, sum(sizes)), sizes)
    places = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(places, gradients)
    for gradient, place in zip(gradients, places, strict=True):
        gradient.data = place


def _wait_for(streams: set[Any], gradients: list[Tensor]) -> None:
    """Let the current stream go on after others, and keep their memory until it has read the gradients."""
    here = get_accelerator().current_stream()
    for stream in streams - {here}:
        here.wait_stream(stream)
    for gradient in gradients:
        gradient.record_stream(here)
