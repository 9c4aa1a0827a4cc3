"""The token losses of a frozen output head, a few hundred tokens' logits at a time, gradient included.

Logits of a whole micro-batch are its largest tensor: at a vocabulary of 128,256 one copy of 2,048 tokens takes 1 GB in
fp32, and the usual loss holds three. The head's weight gets no gradient, so each chunk's gradient with respect to its
hidden states is known as soon as its logits are, and nothing as wide as the vocabulary outlives its chunk. Liger's
fused loss is built the same way; this one needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from launch.model.liger import LLAMA_LIKE

CHUNK_BYTES = 2**27
"""Of the fp32 logits that exist at once."""


def computes_losses(config: Any, *, fp16: bool) -> bool:
    """Whether a model's head can: where nothing follows it but the loss.

    Not in fp16: the gradient would be rounded before the loss scale reaches it.
    """
    return config.model_type in LLAMA_LIKE and not fp16


def chunk_rows(vocabulary: int) -> int:
    """Tokens whose logits exist at once."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def chunked_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
    """−ln p(target) of every token, fp32 [n], from hidden [n, d] and the head's weight [V, d]; targets int64 [n].

    Weight and bias get no gradient. `rows`: tokens at a time.
    """
    losses: Tensor = _ChunkedLosses.apply(hidden, weight, bias, targets, rows)  # type: ignore[no-untyped-call]
    return losses


class _ChunkedLosses(torch.autograd.Function):
    """The node of `chunked_losses`. Shapes, with n tokens, c ≤ rows of them at a time, d features and V words:

    | tensor | shape | |
    |---|---|---|
    | hidden, gradient | [n, d] | the head's input; its gradient for a loss of weight 1, made in the forward pass |
    | weight, bias | [V, d], [V] | frozen |
    | targets, losses, grad | [n] | int64; −ln p(target); the gradient of each loss |
    | logits, probabilities | [c, V] | of one chunk, in one buffer |
    | normaliser | [c] | the logarithm of the sum of exponentials |
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, begin + rows)
            logits = F.linear(hidden[chunk], weight, bias).to(wide)
            at = (torch.arange(len(logits), device=logits.device), targets[chunk])
            normaliser = torch.logsumexp(logits, dim=-1)
            losses[chunk] = normaliser - logits[at]
            if gradient is not None:
                probabilities = logits.sub_(normaliser.unsqueeze(1)).exp_()
                probabilities[at] -= 1
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(1).to(gradient.dtype), None, None, None, None


class HeadLoss:
    """The forward pass of a model's output head; while it expects targets, it gives losses where logits would be."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self._expected: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., d]; the losses, [n], inside `expecting`."""
        weight, bias = self.head.weight, self.head.bias
        if self._expected is None:
            return F.linear(hidden, weight, bias)
        rows, targets = self._expected
        wanted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
        return chunked_losses(wanted, weight, bias, targets, chunk_rows(weight.shape[0]))

    @contextmanager
    def expecting(self, rows: Tensor, targets: Tensor) -> Iterator[None]:
        """For one forward pass: at `rows` of the flattened tokens, `targets` are to be predicted; both int64 [n]."""
        self._expected = rows, targets
        try:
            yield
        finally:
            self._expected = None


def install_head_loss(model: Any) -> HeadLoss | None:
    """Let a model's frozen head compute losses; None where it cannot (`computes_losses`)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not computes_losses(
        model.config, fp16=head.weight.dtype == torch.float16
    ):
        return None
    loss = HeadLoss(head)
    head.forward = loss  # type: ignore[method-assign, assignment]
    return loss


def head_loss_of(model: Any) -> HeadLoss | None:
    """What `install_head_loss` put into a model, however wrapped since."""
    find = getattr(model, "get_output_embeddings", None)
    forward = getattr(find(), "forward", None) if callable(find) else None
    return forward if isinstance(forward, HeadLoss) else None
