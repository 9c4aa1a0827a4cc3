"""`init gradient`: before the first step, directions from the gradient of the run's first batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from flexlora_ds.gradient.start import start_from_gradient
from launch.loop.session import Session
from launch.model.token_loss import head_of, token_loss


def begin_directions(run: Session) -> None:
    """Replace the Gaussian P and Q of a run that begins, where `init` asks for it; collective.

    The gradient is the mean over `init_batches` global batches, those of the first steps, or as many as the records
    fill.
    """
    config = run.options.to_flexlora_config()
    if run.options.method != "flexlora" or config.init != "gradient":
        return
    available = max(1, len(run.data.tokenised.train) // run.options.batch_size)
    batches = min(config.init_batches, available)
    started = time.perf_counter()
    found = start_from_gradient(run.engine, config, lambda: _losses(run, batches))
    run.log.progress.message(
        f"directions from the gradient of {batches * run.options.batch_size:,} records: {len(found.sigma)} matrices, "
        f"median σ₁ {_median_of_first(found.sigma.values()):.3g}, {time.perf_counter() - started:.1f} s"
    )
    if batches < config.init_batches:
        run.log.warn(f"the records fill {batches} batches, fewer than init_batches {config.init_batches}")
    if found.gaussian:
        few = ", ".join(found.gaussian[:3]) + (", …" if len(found.gaussian) > 3 else "")
        run.log.warn(
            f"no finite gradient but zero: {len(found.gaussian)} matrices keep Gaussian directions ({few})"
        )


def _losses(run: Session, batches: int) -> Iterator[Tensor]:
    """This process's part of the mean loss per target token, micro-batch by micro-batch."""
    model, device = run.engine.module, run.process.device
    head = head_of(model)
    for step in range(1, batches + 1):
        batch = run.data.train.batch(step)
        for micro_batch in batch.micro_batches:
            run.method.before_forward(micro_batch, device)
            yield token_loss(model, micro_batch, device, head) / (batch.target_tokens * batches)


def _median_of_first(spectra: Iterable[list[float]]) -> float:
    return statistics.median([sigma[0] for sigma in spectra] or [0.0])
