"""Whether the adapter's one autograd node trains as its plain form does: the losses of the same run in both.

    python -m benchmarks.same_loss --model MODEL --data RECORDS [--max_steps 200] [any option of launch/train.py]

Both runs have the same seed, records, dropout masks and rank calendar; the second computes P diag(λ) Q x in single
operations with autograd's gradients. It prints the largest relative difference of two losses, and whether all ranks
came out the same; the exit code is 1 where the losses part by more than 1e-4.
"""

from __future__ import annotations

import sys
from typing import Any

from flexlora_ds.errors import RunError
from flexlora_ds.terminal.command import CommandParser, exit_code_of
from launch.command import quiet_libraries
from launch.options.train_options import TrainOptions, parse_options

BOUND = 1e-4
SHOWN = 20  # steps between printed lines


def losses_of(options: TrainOptions, *, plain: bool) -> tuple[list[float], dict[str, int]]:
    """The mean token loss of every step, and the ranks at the end."""
    from flexlora_ds.adapter.layer import forward_context
    from launch.data.prepare import load_tokenizer_of, prepare_data, share_batches
    from launch.distributed.process import join_processes
    from launch.engine.build import build_engine
    from launch.planning.settle import settle

    settled = settle(options, 1)
    options = settled.options
    tokenizer = load_tokenizer_of(options)
    process = join_processes()
    batches = share_batches(
        options,
        prepare_data(options, tokenizer),
        settled.layout,
        process,
        tokenizer.pad_token_id,
        packed=settled.computation.packed,
    )
    engine, method = build_engine(settled, batches.steps, process)
    forward_context(engine.module).plain = plain
    method.attach(engine, batches.steps, None)
    losses = []
    for step in range(1, batches.steps + 1):
        losses.append(one_step(engine, method, batches.train, step, process.device))
        method.after_step(step)
        if step % SHOWN == 0:
            print(f"{'plain' if plain else 'node':5}  step {step:5}  loss {losses[-1]:.6f}", flush=True)
    assert method.controller is not None
    ranks = method.controller.ranks
    engine.destroy()
    return losses, ranks


def one_step(engine: Any, method: Any, batches: Any, step: int, device: Any) -> float:
    """One update; the mean loss over the targets of the global batch."""
    from launch.model.token_loss import head_of, token_loss

    head = head_of(engine.module)
    step_batch, total = batches.batch(step), 0.0
    targets = step_batch.target_tokens
    for batch in step_batch.micro_batches:
        method.before_forward(batch, device)
        loss = token_loss(engine, batch, device, head)
        engine.backward(loss * (engine.gradient_accumulation_steps() / targets))
        engine.step()
        total += float(loss.detach())
    return total / targets


def main() -> int:
    """Train twice and compare."""
    quiet_libraries()

    def run() -> None:
        _, words = CommandParser("python -m benchmarks.same_loss", __doc__).parse_known_args()
        given = (
            words if any(word.startswith("--max_steps") for word in words) else [*words, "--max_steps=200"]
        )
        options = parse_options(given)
        (node, ranks), (plain, plain_ranks) = (losses_of(options, plain=p) for p in (False, True))
        worst = max(abs(a - b) / b for a, b in zip(node, plain, strict=True))
        print(
            f"{len(node)} steps: the losses differ by {worst:.1e} at most; same ranks: {ranks == plain_ranks}"
        )
        if worst > BOUND:
            raise RunError(f"the losses differ by {worst:.1e}, more than {BOUND:g}")

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
