"""ZeRO-1 and 2: gradients copied by the bucket, and from it straight to their place in this process's partition.

DeepSpeed 0.19.8 copies every gradient by itself, in a hook written in Python, into the bucket that is reduced next,
once more into memory of its partition, and joins those copies before the update (stage_1_and_2.py
`reduce_independent_p_g_buckets_and_remove_grads`, `copy_grads_in_partition`, `get_flat_partition`). With the 480 small
tensors of an 8B model's adapters a GPU waits for the host there.

Here the hook only notes the gradient. A bucket is filled by one copy, and a second one moves what this process owns
to its place in the partition, where the update reads it (`GradPartitionBufferGroup`, DeepSpeed's own form of that).
Buckets, their order, reductions and all values are DeepSpeed's.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor


def copy_gradients_together(engine: Any) -> None:
    """Let ZeRO-1 and 2 copy gradients by the bucket; other stages, and gradients on the host, stay as they are."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and _is_plain(wrapper):
        buckets, partitions = _Buckets(wrapper), _Partitions(wrapper)
        wrapper.reduce_independent_p_g_buckets_and_remove_grads = buckets.note
        wrapper.reduce_ipg_grads = lambda comm_dtype=None: _reduce(buckets, partitions, comm_dtype)
        wrapper.copy_grads_in_partition = partitions.keep
        wrapper.get_all_grad_tensors = partitions.take
        wrapper.get_flat_partition = partitions.averaged


def _is_plain(wrapper: DeepSpeedZeroOptimizer) -> bool:
    """Whether gradients take the way that is shortened here: a contiguous bucket of the parameters' own dtype."""
    special = wrapper.cpu_offload or wrapper.zenflow or wrapper.use_grad_accum_attribute
    one_dtype = wrapper.gradient_accumulation_dtype == wrapper.dtype
    muon = any(getattr(p, "use_muon", False) for group in wrapper.bit16_groups for p in group)
    return bool(wrapper.contiguous_gradients) and one_dtype and not special and not muon


def _reduce(buckets: _Buckets, partitions: _Partitions, comm_dtype: torch.dtype | None) -> None:
    """Reduce the buckets, or one of them, and take what this process owns out of them."""
    wrapper = buckets.wrapper
    buckets.fill([*wrapper.ipg_buckets] if comm_dtype is None else [comm_dtype])
    partitions.prepare()
    type(wrapper).reduce_ipg_grads(wrapper, comm_dtype=comm_dtype)
    partitions.collect()


class _Buckets:
    """Holds gradients from their hook until their bucket is reduced, a bucket's elements at most."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.noted: dict[torch.dtype, list[Tensor]] = {}
        """By the dtype of communication: the last gradients of the bucket, not yet in its buffer."""
        self.streams: set[Any] = set()
        """Where the noted gradients were computed."""

    def note(self, param: Any, group: int) -> None:
        """In the gradient's hook: it is the bucket's next, and a full bucket is reduced before."""
        wrapper, size = self.wrapper, param.numel()
        if not 0 < size <= wrapper.reduce_bucket_size or not getattr(param, "ds_grad_is_ready", True):
            type(wrapper).reduce_independent_p_g_buckets_and_remove_grads(wrapper, param, group)
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

    def fill(self, dtypes: list[torch.dtype]) -> None:
        """Copy what was noted into the buckets' buffers; each gradient is its part of one from then on."""
        streams, self.streams = self.streams, set()
        for dtype in dtypes:
            gradients, bucket = self.noted.pop(dtype, []), self.wrapper.ipg_buckets[dtype]
            if not gradients:
                continue
            if streams:
                _wait_for(streams, gradients)
                bucket.copy_streams.add(get_accelerator().current_stream())
            sizes = [gradient.numel() for gradient in gradients]
            room = bucket.buffer[bucket.index].narrow(0, bucket.elements - sum(sizes), sum(sizes))
            places = [
                part.view(gradient.shape)
                for part, gradient in zip(torch.split(room, sizes), gradients, strict=True)
            ]
            torch._foreach_copy_(places, gradients)
            for gradient, place in zip(gradients, places, strict=True):
                gradient.data = place


class _Partitions:
    """This process's reduced gradients: one flat tensor for each parameter group, in the order of its partition."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.layouts = [_Layout(wrapper, group) for group in range(len(wrapper.bit16_groups))]
        self.flat: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        """Of the backward pass that runs: the group's partition, and its parts."""
        self.kept: list[tuple[Any, int]] = []
        """(parameter of this process's partition, its group): reduced, still in the bucket's buffer."""

    def prepare(self) -> None:
        """Make the partitions before a reduction, on the stream for which the reduction waits."""
        if self.flat:
            return
        device = get_accelerator().current_device_name()
        for group, layout in enumerate(self.layouts):
            flat = torch.zeros(layout.elements, dtype=self.wrapper.dtype, device=device)
            self.flat[group] = flat, torch.split(flat, layout.sizes)

    def keep(self, param: Any, group: int | None = None) -> None:
        """A reduced gradient of this process's partition: it leaves the bucket with the others."""
        self.kept.append((param, self.wrapper._get_param_group_idx(param) if group is None else group))

    def collect(self) -> None:
        """Move what was kept out of the bucket, whose buffer is needed for the next."""
        kept, self.kept = self.kept, []
        if not kept:
            return
        wrapper, places, values = self.wrapper, [], []
        for param, group in kept:
            index, start = self.layouts[group].places[wrapper.get_param_id(param)]
            place, gradient = self.flat[group][1][index], wrapper.get_gradient_for_reduction(param).view(-1)
            places.append(place)
            values.append(
                gradient if place.numel() == gradient.numel() else gradient.narrow(0, start, place.numel())
            )
        accelerator = get_accelerator()
        stream = wrapper.reduction_stream if wrapper.overlap_comm else accelerator.current_stream()
        with accelerator.stream(stream):
            torch._foreach_copy_(places, values)

    def take(self, params: list[Any], dtype: torch.dtype) -> list[Tensor]:
        """What DeepSpeed adds up over micro-batches: the group's partition, in place of a gradient per parameter."""
        self.prepare()
        group = next(i for i, held in enumerate(self.wrapper.params_in_partition) if held is params)
        flat, _ = self.flat.pop(group)
        assert flat.dtype == dtype
        return [flat]

    def averaged(self, *args: Any, param_group_idx: int, **others: Any) -> GradPartitionBufferGroup:
        """What the norm, the verdict and the update read."""
        (flat,) = self.wrapper.all_grad_tensors[param_group_idx]
        return _Averaged(flat, self.layouts[param_group_idx])


class _Layout:
    """The parts of a group's partition: parameters, and padding between and behind them."""

    def __init__(self, wrapper: Any, group: int) -> None:
        parts = wrapper._build_compact_grad_partition_buffer(group)
        self.elements = parts.flat_partition.numel()
        self.sizes = [part.numel() for part in parts]
        self.padding = [i for i, part in enumerate(parts) if getattr(part, "_zero_padding", False)]
        rank = comm.get_rank(group=wrapper.real_dp_process_group[group])
        holding = iter(i for i in range(len(parts)) if i not in set(self.padding))
        self.places: dict[int, tuple[int, int]] = {}
        """By the parameter's number: its part, and the first of its elements there."""
        for param in wrapper.params_in_partition[group]:
            number = wrapper.get_param_id(param)
            start = int(wrapper.grad_start_offset[group][rank][number])
            if param.numel() > start:
                self.places[number] = next(holding), start


class _Averaged(GradPartitionBufferGroup):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's form of a partition's gradients, made without a loop over them."""

    def __init__(self, flat: Tensor, layout: _Layout) -> None:
        list.__init__(self)
        self.flat_partition, self._layout = flat, layout
        self._split()

    def move_flat_partition(self, device: Any, non_blocking: bool = False) -> None:
        """To another device and back (`engine.offload_states`)."""
        self.flat_partition.data = self.flat_partition.data.to(device, non_blocking=non_blocking)
        self._split()

    def _split(self) -> None:
        self[:] = torch.split(self.flat_partition, self._layout.sizes)
        for index in self._layout.padding:
            self[index]._zero_padding = True


def _wait_for(streams: set[Any], gradients: list[Tensor]) -> None:
    """Let the current stream go on after others, and keep their memory until it has read the gradients."""
    here = get_accelerator().current_stream()
    elsewhere = [stream for stream in streams if stream != here]
    for stream in elsewhere:
        here.wait_stream(stream)
    for gradient in gradients if elsewhere else []:
        gradient.record_stream(here)
