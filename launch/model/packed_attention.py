"""Attention over packed examples: each attends to itself alone, without a mask as wide as the batch.

transformers' flash attention takes the boundaries as they are; its `sdpa` would compute the whole square of the batch
under a block-diagonal mask, which for 16 examples is 16 times the work. Here `sdpa` runs example by example; torch's
own variable-length attention, where a GPU has it, takes all examples at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PACKED_SDPA = "packed_sdpa"
"""The name under which transformers finds `packed_sdpa`, once registered."""
PACKED_VARLEN = "packed_varlen"
"""The name under which transformers finds `packed_varlen`, once registered."""

_MOST_APART = (
    0.03  # of bf16 results from fp32 ones, by norm; a wrong boundary or head is apart by 0.5 and more
)


def register_packed_sdpa() -> str:
    """Make `attn_implementation="packed_sdpa"` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, _mask)
    return PACKED_SDPA


def packed_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every segment [1, heads, Σ lengths, size] -> [1, Σ lengths, heads, size].

    Without `segment_lengths` (a padded batch) it is transformers' `sdpa`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segment_lengths is None:
        mask = _band(query, sliding_window) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **others)  # type: ignore[no-any-return]
    parts = zip(*(torch.split(t, list(segment_lengths), dim=2) for t in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, _band(q, sliding_window), **others)[0] for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


class Varlen:
    """torch's variable-length attention (`torch.nn.attention.varlen`, from 2.10 on), with the signature it has here.

    Query heads that share a key and value head are given as they are, or the shared heads repeated (`repeat`).
    """

    def __init__(self, function: Callable[..., Any], *, repeat: bool = False) -> None:
        self._function, self._repeat = function, repeat
        takes = inspect.signature(function).parameters
        self._scales, self._windows = "scale" in takes, "window_size" in takes
        self._asks_grouped = "enable_gqa" in takes

    def serves(self, query: Tensor, window: int | None) -> bool:
        """Whether the kernel computes this: half precision, heads of a multiple of 8 up to 256, a window if any."""
        size, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
        return half and size <= 256 and size % 8 == 0 and (window is None or self._windows)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention [Σ lengths, heads, size]; `ends` int32, from 0; a token sees `window` tokens with itself."""
        others: dict[str, Any] = {}
        if self._windows:
            others["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            others["is_causal"] = True
        if self._scales:
            others["scale"] = scale
        elif scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and self._repeat:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        elif groups > 1 and self._asks_grouped:
            others["enable_gqa"] = True
        found: Tensor = self._function(query, key, value, ends, ends, longest, longest, **others)
        return found


def register_packed_varlen(varlen: Varlen) -> str:
    """Make `attn_implementation="packed_varlen"` known to transformers; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_VARLEN, partial(packed_varlen, varlen=varlen))
    AttentionMaskInterface.register(PACKED_VARLEN, _mask)
    return PACKED_VARLEN


def packed_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    varlen: Varlen,
    segment_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`packed_sdpa` in one kernel for all segments; itself where that cannot be had (a padded batch, fp32, dropout)."""
    window = None if sliding_window is None or sliding_window >= (max_length_q or 0) else sliding_window
    plain = getattr(module, "is_causal", True) and not any(
        others.get(name) for name in ("dropout", "softcap")
    )
    if cu_seq_lens_q is None or max_length_q is None or not plain or not varlen.serves(query, window):
        return packed_sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            segment_lengths=segment_lengths,
            sliding_window=sliding_window,
            scaling=scaling,
            **others,
        )
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    return varlen(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=window).unsqueeze(0), None


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The kernel of `torch.nn.attention.varlen.varlen_attn`, without the operator in Python that torch puts before it.

    That operator costs the host 0.1 ms a call, forward and backward. Arguments as there; heads may be shared.
    """
    # torch/nn/attention/varlen.py `_varlen_attn`, 2.11 to 2.13: no dropout, no mask for debugging.
    causal = window_size == (-1, 0)
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, causal, False,
        scale=scale, window_size_left=window_size[0], window_size_right=window_size[1],
    )  # fmt: skip
    output: Tensor = found[0]
    return output


def working_varlen(
    functions: Sequence[Callable[..., Any]], device: torch.device, dtype: torch.dtype
) -> Varlen | None:
    """The first way of calling one of them that computes what `packed_sdpa` does, forward and backward; None: none.

    Raises:
        Exception: whatever the last way raised, where none computed anything.
    """
    failure: Exception | None = None
    for function, repeat in product(functions, (False, True)):
        varlen = Varlen(function, repeat=repeat)
        try:
            if agrees(varlen, device, dtype):
                return varlen
        except Exception as error:  # a kernel that is missing says so in many ways
            failure = error
    if failure is not None:
        raise failure
    return None


def agrees(varlen: Varlen, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether outputs and gradients are those of `packed_sdpa` in fp32, for a few segments and grouped heads."""
    lengths, heads, shared, size = (5, 1, 40, 17), 4, 2, 64
    module = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True, training=True)
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, h, sum(lengths), size, generator=rng) for h in (heads, shared, shared)]
    push = torch.randn(1, sum(lengths), heads, size, generator=rng).to(device, dtype)
    sums = torch.tensor([0, *lengths]).cumsum(0)
    boundaries: dict[str, Any] = {
        "segment_lengths": lengths,
        "cu_seq_lens_q": sums.to(device, torch.int32),
        "max_length_q": max(lengths),
    }

    def results(attention: Callable[..., Any], precision: torch.dtype) -> Sequence[Tensor]:
        inputs = [t.to(device, dtype).to(precision).requires_grad_() for t in drawn]
        with torch.enable_grad():
            output, _ = attention(module, *inputs, None, **boundaries)
        return [output.detach(), *torch.autograd.grad(output, inputs, push.to(precision))]

    found = results(partial(packed_varlen, varlen=varlen), dtype)
    expected = results(packed_sdpa, torch.float32)
    return all(
        bool((f.float() - e).norm() <= _MOST_APART * e.norm()) for f, e in zip(found, expected, strict=True)
    )


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sliding window; None, which means causal, where it covers the segment."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=query.device)
    distance = at[:, None] - at[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _mask(*args: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """sdpa's mask of a padded batch; none where nothing is padded."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **others)  # type: ignore[no-any-return]
