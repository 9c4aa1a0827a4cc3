"""Before the first step the largest micro-batch is computed once, so that too little memory shows at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flexlora_ds.adapter.layer import adapters
from flexlora_ds.devices import is_out_of_memory
from flexlora_ds.errors import UserError
from flexlora_ds.partitions import try_backward
from flexlora_ds.terminal.command import one_line
from launch.data.batch_layout import BatchLayout, smaller_micro_batch
from launch.data.batches import MicroBatch
from launch.distributed.agreement import on_all_ranks
from launch.engine.settled import Settled
from launch.loop.session import Session
from launch.model.token_loss import head_of, token_loss


def check_memory(run: Session, settled: Settled, done: int, to_come: float) -> None:
    """Compute the largest micro-batch of the steps after `done`, forward and backward, where the run asks for it.

    Nothing of the run changes: no gradient, no generator, no count. Where processes compute alone all of them come out
    with the same error; at ZeRO-3 the others wait for one that has none, and notice when it is gone.

    Args:
        to_come: bytes that the first update will make beside it.

    Raises:
        UserError: it does not fit into a device's memory.
    """
    if not settled.options.memory_check or done >= run.data.steps:
        return
    started = time.perf_counter()
    batch = run.data.train.largest(done, run.data.steps)

    def work() -> None:
        _try(run, settled, batch, int(to_come))

    if settled.stage == 3:
        work()
    else:
        on_all_ranks(run.process, work)
    run.log.progress.message(
        f"memory check: the largest micro-batch, {_size(batch)}, fits ({time.perf_counter() - started:.1f} s)"
    )


def _try(run: Session, settled: Settled, batch: MicroBatch, to_come: int) -> None:
    try:
        reserved = torch.empty(to_come, dtype=torch.uint8, device=run.process.device)
        compute_once(run, batch)
        del reserved
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(settled, batch, error) from error


def compute_once(run: Session, batch: MicroBatch) -> None:
    """Forward and backward as in a step, of which nothing stays; the engine's own forward would prepare one."""
    device, model = run.process.device, run.engine.module
    gpus = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=gpus),
        _unobserved(run),
    ):  # PEFT's dropout draws from torch's own generator
        run.method.before_forward(batch, device)
        try_backward(run.engine, token_loss(model, batch, device, head_of(model)))
    if gpus:
        torch.cuda.synchronize(device)
    run.guard.forget_gradients()


@contextmanager
def _unobserved(run: Session) -> Iterator[None]:
    """What collects the gradients of the first step (`new_direction gradient`) does not see this one's.

    Nor does this pass count as the one that gave the matrices their penalty.
    """
    contexts = {id(layer.context): layer.context for layer in adapters(run.engine.module).values()}
    before = {key: context.observer for key, context in contexts.items()}
    for context in contexts.values():
        context.observer = None
    try:
        yield
    finally:
        for key, context in contexts.items():
            context.observer = before[key]
            if context.penalty is not None:
                context.penalty.begin_update()


def _too_large(settled: Settled, batch: MicroBatch, error: RuntimeError) -> UserError:
    options = settled.options
    fault = UserError(
        f"too little memory for the run's largest micro-batch, {_size(batch)} ({one_line(str(error), 120)})",
        options.place("micro_batch_size"),
        "; or ".join(_remedies(settled, settled.layout)),
    )
    # Who waits for this process in a collective can say nothing.
    fault.said_here = True if settled.stage == 3 and settled.layout.processes > 1 else None
    return fault


def _remedies(settled: Settled, layout: BatchLayout) -> Iterator[str]:
    """What takes less, the cheapest first."""
    if layout.micro_batch_size > 1:
        yield f"set micro_batch_size {smaller_micro_batch(layout)}: the same updates, in more micro-batches"
    if not settled.computation.gradient_checkpointing:
        yield "set gradient_checkpointing true"
    if layout.micro_batch_size == 1 and settled.stage < 3 and layout.processes > 1:
        yield "share the base out with ds_configs/zero3.json"
    if layout.micro_batch_size == 1:
        yield f"lower cutoff_len, now {settled.options.cutoff_len}"


def _size(batch: MicroBatch) -> str:
    records, positions = len(batch.record_ids), batch.input_ids.numel()
    return f"{records} record{'s' * (records > 1)} in {positions:,} positions"
