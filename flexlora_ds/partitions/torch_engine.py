"""A model that torch trains by itself, alone or in DistributedDataParallel, with the face of a DeepSpeed engine.

The rest of the library asks an engine for its module, its optimizer and its counts, and asks nothing more. So rank
changes, checkpoints and saving need no second form for plain torch, and no DeepSpeed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class TorchEngine:
    """`engine(…)`, `engine.backward(loss)`, `engine.step()` in plain torch, on one process or in each of several.

    Whoever has a loop of its own needs none of these three: it keeps `micro_steps`, `global_steps` and `skipped_steps`.

    Args:
        model: what `inject_adapters` has adapted, as it is or in `DistributedDataParallel`.
        optimizer: `build_optimizer`'s. Its states are edited in place when ranks change.
        lr_scheduler: advanced once per applied update.
        accumulation_steps: backward passes of one update; gradients are their mean.
        max_grad_norm: gradients are clipped to this norm; None or 0 clips nothing.
        scaler: for fp16 under autocast. An update that it skips counts as skipped, and no element grows older by it.
            Its own state is the caller's to save.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        lr_scheduler: LRScheduler | None = None,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.module = model if self.ddp is None else cast("nn.Module", self.ddp.module)
        self.optimizer = self.basic_optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.loss_scale: Callable[[], float] = scaler.get_scale if scaler is not None else lambda: 1.0
        """What a gradient scaler multiplies the loss by now."""
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.device: torch.device = optimizer.param_groups[0]["params"][0].device
        self.world_size = dist.get_world_size() if self.ddp is not None else 1
        self.global_rank = dist.get_rank() if self.ddp is not None else 0
        self._accumulation_steps = accumulation_steps
        _warn_of_low_precision(optimizer)

    def gradient_accumulation_steps(self) -> int:
        """Backward passes of one update."""
        return self._accumulation_steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. Gradients of a pass that does not end an update are not reduced."""
        if self.ddp is None:
            return self.module(*args, **kwargs)
        with nullcontext() if self._ends_update() else self.ddp.no_sync():
            return self.ddp(*args, **kwargs)

    def parameters(self) -> Any:
        """The model's."""
        return self.module.parameters()

    def train(self, mode: bool = True) -> None:
        """Whether the model trains: dropout and the like."""
        self.module.train(mode)

    def eval(self) -> None:
        """The model as it is used."""
        self.module.eval()

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient, divided by the passes of an update."""
        share = loss / self._accumulation_steps
        (share if self.scaler is None else self.scaler.scale(share)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """After a backward pass; the last of an update also applies it, unless a gradient is not finite."""
        ends = self._ends_update()
        self.micro_steps += 1
        if not ends:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained(), self.max_grad_norm or float("inf"))
        self.global_steps += 1
        if bool(torch.isfinite(norm)):
            self._apply()
        else:
            self.skipped_steps += 1
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()

    def _apply(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _ends_update(self) -> bool:
        return (self.micro_steps + 1) % self._accumulation_steps == 0

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _warn_of_low_precision(optimizer: Optimizer) -> None:
    """Torch updates the parameters themselves, and in half precision most updates are too small to be seen."""
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            warnings.warn(
                f"what is trained is held in {name}, where most updates are lost: call "
                "flexlora_ds.adapter.inject.use_fp32_adapters(model) before build_optimizer",
                stacklevel=3,
            )
            return
