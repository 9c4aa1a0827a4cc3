"""What runs inside the processes of `engines`; every function returns JSON."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from flexlora_ds import adapters
from tests.helpers import rank_worker, tiny


def ready() -> str:
    """Start communication, with exact fp32 products; the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    tiny.start()
    return str(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")


def ready_on_one_card() -> str:
    """The same for several processes on one card, which NCCL refuses: over gloo."""
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes the card of this number
    deepspeed.init_distributed("gloo", verbose=False)
    return ready()


def computes_fp16() -> bool:
    """Whether DeepSpeed does, here."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def trajectory(case: dict[str, Any]) -> dict[str, Any]:
    """`rank_worker.trajectory` with a loss scale that rests, so that no update is skipped."""
    with _patient_scale():
        found = rank_worker.trajectory(case)
    gc.collect()
    return found


@contextmanager
def _patient_scale() -> Iterator[None]:
    made = tiny.ds_config

    def ds_config(*args: Any, **options: Any) -> dict[str, Any]:
        config = made(*args, **options)
        if "fp16" in config:
            config["fp16"]["loss_scale_window"] = 1000
        return config

    with patch.object(tiny, "ds_config", ds_config):
        yield


def memory_over_changes(case: dict[str, Any]) -> dict[str, Any]:
    """What the card holds after some changes, [changes, allocated, reserved] in bytes; every one moves directions."""
    config = rank_worker.configuration(
        adjust_start=0, adjust_freeze=0, adjust_interval=1, schedule="constant", adjust_size=3
    )
    changes = int(case["changes"])
    engine, controller = rank_worker.setup({**case, "total": changes + 10}, config)
    rows = rank_worker.batches(1)[0]
    found, moved = [], 0
    for step in range(1, changes + 1):
        tiny.train_step(engine, rows)
        change = controller.after_step(step)
        moved += len(change.pruned) if change else 0
        if step in case["at"] and torch.cuda.is_available():
            gc.collect()
            torch.cuda.synchronize()
            found.append([step, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()])
    return {"memory": found, "moved": moved, "one layout": 16 * controller.trainable_parameters()}


def busy_changes(case: dict[str, Any]) -> dict[str, Any]:
    """Losses of a run whose ranks change while ZeRO-3's fetches are under way, beside one that waits for them first.

    The base lies in the host's memory, so that a fetch is a real copy. Before a change comes a forward pass that nobody
    waits for: after it, what a backward pass would need first is being fetched.
    """
    tiny.start()
    return {kind: _with_changes(case, wait=kind == "waiting") for kind in ("waiting", "busy")}


def _with_changes(case: dict[str, Any], *, wait: bool) -> dict[str, Any]:
    from flexlora_ds.directions import matrix_edits
    from flexlora_ds.partitions import resize

    config = rank_worker.configuration(adjust_size=0)
    engine = _large_engine(case, config)
    layers = adapters(engine.module)
    batches = rank_worker.batches(int(case["steps"]))
    losses, in_flight, at_work = [], [], []
    for step, rows in enumerate(batches, 1):
        losses.append(tiny.train_step(engine, rows))
        if step < 4 or step % 2:  # DeepSpeed records for two steps what it will fetch ahead
            continue
        edits: dict[Any, Any] = {}
        for i, layer in enumerate(layers.values()):
            if (i + step) % 3 != 0:
                shrinks = layer.rank > 3 and (i + step) % 3 == 1
                keep = range(int(shrinks), layer.rank)
                edits.update(matrix_edits(layer, keep, int(not shrinks), config, step))
        ids, mask, _ = (t.to(engine.device) for t in tiny.collate(rows))
        _wait()
        # Without gradients DeepSpeed would fetch nothing ahead of its end.
        engine(input_ids=ids, attention_mask=mask)
        at_work.append(_at_work(engine))
        in_flight.append(
            sum(getattr(p, "ds_status", None) is not None and p.ds_status.name == "INFLIGHT"
                for p in engine.module.parameters())
        )  # fmt: skip
        if wait:
            _wait()
        resize(engine, edits)
    ranks = [layer.rank for layer in layers.values()]
    engine.destroy()
    del engine, layers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"losses": losses, "in flight": in_flight, "at work": at_work, "ranks": ranks}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _at_work(engine: Any) -> bool:
    """Whether the card has not yet done what was asked for, the fetches on their own stream included."""
    if not torch.cuda.is_available():
        return False
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetching = getattr(coordinator, "_PartitionedParameterCoordinator__allgather_stream", None)
    streams = [torch.cuda.current_stream(), *([] if fetching is None else [fetching])]
    return not all(stream.query() for stream in streams)


def _large_engine(case: dict[str, Any], config: Any) -> Any:
    """A Llama of a few wide layers, made on the card."""
    from flexlora_ds import inject_adapters

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: nn.Module = tiny.tiny_llama("bf16", hidden=case["hidden"], layers=case["layers"])
    inject_adapters(model, config)
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.lam.data.copy_(0.3 * torch.randn(layer.rank, generator=rng))
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ds = tiny.ds_config(
        3,
        "bf16",
        offload_optimizer=host,
        offload_param=host,
        stage3_prefetch_bucket_size=int(case["ahead"]),
        stage3_param_persistence_threshold=0,
        stage3_max_reuse_distance=0,  # else the last layers stay, and nothing is fetched at the end of a pass
        reduce_bucket_size=10**6,
    )
    return tiny.make_engine(model, config, ds)


def with_and_without_liger() -> list[list[float]]:
    """Three losses each at stage 3."""
    from transformers.models.llama import modeling_llama

    from launch.model.liger import apply_liger

    tiny.start()
    config = rank_worker.configuration()
    rotary = modeling_llama.apply_rotary_pos_emb  # Liger puts its own in its place, for all models
    found = []
    try:
        for fused in (False, True):
            model = tiny.adapted_llama(config)
            if fused:
                apply_liger(model.to("cuda"))
            engine = tiny.make_engine(model.train(), config, tiny.ds_config(3))
            found.append([tiny.train_step(engine, rows) for rows in rank_worker.batches(3)])
            engine.destroy()
    finally:
        modeling_llama.apply_rotary_pos_emb = rotary
    return found


def train_deterministically(arguments: list[str], warn_only: bool = False) -> dict[str, Any]:
    """The training command under torch's deterministic algorithms."""
    from tests.helpers import training

    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        return training.command(arguments)
    finally:
        torch.use_deterministic_algorithms(False)
