"""The memory that training steps take on a CPU, by torch's own profiler, beside what was planned."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.data.batches import collate, pack
from launch.data.examples import Example
from launch.distributed.process import join_processes
from launch.engine.build import build_engine
from launch.model.token_loss import head_of, token_loss
from launch.options.train_options import TrainOptions
from launch.planning.memory_plan import memory_of
from launch.planning.settle import settle
from tests.helpers import zoo

RECORDS, TOKENS, VOCABULARY = 4, 128, 2048
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
}


def planned_and_measured(
    folder: str, kind: str, dtype: str, stage: int, others: dict[str, Any]
) -> dict[str, float]:
    """Bytes at the peak of two steps over the longest records, all of whose tokens are targets."""
    root = Path(folder)
    zoo.write_model(root / "model", kind, **SHAPE)
    row = {"instruction": "a", "input": "", "output": "b", "answer": "b"}
    (root / "records.json").write_text(json.dumps([row] * 40))
    settled = settle(options(root, dtype, stage, others), 1)
    process = join_processes()
    gc.collect()
    earlier = storages()
    engine, method = build_engine(settled, 10, process)
    method.attach(engine, 10, None)
    gc.collect()
    resident = sum(size for place, size in storages().items() if place not in earlier)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed:
        for step in (1, 2):
            update(engine, method, batch(step, packed=settled.computation.packed))
            method.after_step(step)
    events = observed.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    made = sorted(found for event in events for found in allocations(event))
    _, total, size = made[0]
    before = total - size  # what earlier profiles of this process saw made, and not freed
    peak = max(total for _, total, _ in made) - before
    return {"planned": memory_of(settled).at(RECORDS).total, "measured": resident + peak}


def options(root: Path, dtype: Any, stage: int, others: dict[str, Any]) -> TrainOptions:
    """Of a run in which every matrix of the decoder is adapted."""
    return TrainOptions(
        model=str(root / "model"),
        data=str(root / "records.json"),
        out=str(root / "run"),
        ds=f"ds_configs/zero{stage}.json",
        dtype=dtype,
        target_modules=("all-linear",),
        batch_size=RECORDS,
        cutoff_len=TOKENS,
        **others,
    )


def batch(step: int, *, packed: bool) -> Any:
    """Records of the greatest length."""
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(2, VOCABULARY, (RECORDS, TOKENS), generator=rng).tolist()
    rows = [Example(number, row, row) for number, row in enumerate(ids)]
    return (pack if packed else partial(collate, pad_token_id=0))(rows, seed=0, step=step)


def update(engine: Any, method: Any, micro_batch: Any) -> None:
    """As `launch.train.train_step`."""
    device = torch.device("cpu")
    method.before_forward(micro_batch, device)
    loss = token_loss(engine, micro_batch, device, head_of(engine.module))
    engine.backward(loss / micro_batch.target_tokens)
    engine.step()


def storages() -> dict[int, int]:
    """By address the bytes of what tensors hold now, also of files mapped into memory."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    held = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    found = {}
    for storage in held:
        with contextlib.suppress(RuntimeError):  # one that a cycle holds after it was freed
            found[storage.data_ptr()] = storage.nbytes()
    return found


def allocations(event: Any) -> Iterator[tuple[int, int, int]]:
    """Time, bytes allocated in all by then, and bytes of it, of every allocation below one of a profiler's events."""
    from torch._C._profiler import _EventType

    waiting = [event]
    while waiting:
        found = waiting.pop()
        waiting.extend(found.children)
        if found.tag == _EventType.Allocation:
            of = found.extra_fields
            yield found.start_time_ns, of.total_allocated, of.alloc_size
