"""Gradients that are copied together are DeepSpeed's, bit for bit, in real processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import rank_worker as worker
from tests.helpers.processes import Processes

SMALL = {"reduce_bucket_size": 300}
"""Elements: below the largest parameters of the tiny model, and several buckets for the others."""
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, bf16, two micro-batches": {"stage": 2, "dtype": "bf16", "gas": 2},
    "ZeRO-2, small buckets": {"stage": 2, "zero": SMALL},
    "ZeRO-2, small buckets, overlapped": {"stage": 2, "zero": SMALL | {"overlap_comm": True}},
    "ZeRO-2, buckets below every matrix, round robin": {
        "stage": 2,
        "gas": 2,
        "zero": {"reduce_bucket_size": 20, "round_robin_gradients": True},
    },
    "ZeRO-2, not contiguous": {"stage": 2, "zero": {"contiguous_gradients": False}},
    "ZeRO-2, every process has all gradients": {"stage": 2, "zero": {"reduce_scatter": False}},
    "ZeRO-1": {"stage": 1},
    "ZeRO-1, bf16, two micro-batches": {"stage": 1, "dtype": "bf16", "gas": 2},
    "ZeRO-2, optimizer on the host": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "ZeRO-3": {"stage": 3},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with Processes(request.param, timeout=240) as started:
        yield started


@pytest.mark.parametrize("name", CASES)
def test_losses_ranks_and_masters_are_deepspeeds(processes: Processes, name: str) -> None:
    case = {"steps": 30, **CASES[name]}
    theirs = processes.run(worker.trajectory, case)
    ours = processes.run(worker.trajectory, case | {"spare": True})
    assert len(theirs[0]["ranks"]) == 2, "ranks changed on the way"
    assert ours == theirs


def buckets(case: dict[str, Any]) -> dict[str, int]:
    """How often gradients were copied, alone and together, in the step after a rank change."""
    from torch.profiler import ProfilerActivity, profile

    from flexlora_ds.partitions import resize
    from tests.helpers import tiny

    engine, _ = worker.setup(case, worker.configuration(adjust_size=0))
    tiny.train_step(engine, worker.batches(1)[0])
    resize(engine, {})
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        tiny.train_step(engine, worker.batches(1)[0])
    parents = [e.cpu_parent.name for e in seen.events() if e.name == "aten::copy_" and e.cpu_parent]
    trained = sum(p.requires_grad for p in engine.module.parameters())
    return {"alone": sum("AccumulateGrad" in name for name in parents), "trained": trained}


def test_no_gradient_is_copied_by_itself_after_a_rank_change_either(processes: Processes) -> None:
    for result in processes.run(buckets, {"stage": 2}):
        assert result["alone"] >= result["trained"], "DeepSpeed does"
    for result in processes.run(buckets, {"stage": 2, "spare": True}):
        # autograd itself turns the gradient of every P, one of three, to its parameter's strides
        assert result["alone"] <= result["trained"] / 3 + 4


def test_what_is_replaced_exists_in_this_deepspeed() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    expected = {
        "reduce_independent_p_g_buckets_and_remove_grads": ["self", "param", "i"],
        "reduce_ipg_grads": ["self", "comm_dtype"],
        "copy_grads_in_partition": ["self", "param", "group_idx"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(DeepSpeedZeroOptimizer, name)).parameters) == parameters
    noted = inspect.getsource(DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads)
    for line in (
        "bucket.elements += param.numel()",
        "bucket.grads.append(grad_reduc)",
        "bucket.params.append((i, param.param_idx_in_group, param_id))",
        "bucket.index = 1 - bucket.index",
    ):
        assert line in noted
