"""One look at all gradients gives ZeRO's own norm and verdict, in real processes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers import rank_worker as worker
from tests.helpers import tiny
from tests.helpers.processes import Processes

STAGES = [1, 2, 3]
VALUES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with Processes(request.param, timeout=240) as started:
        yield started


def backward(case: dict[str, Any]) -> tuple[Any, int]:
    """An engine whose gradients are there, reduced and shared out, but not yet applied; the rank."""
    config = worker.configuration(adjust_size=0)
    engine, _ = worker.setup({"dtype": "bf16", **case}, config)
    rank, world = tiny.start()
    rows = worker.batches(1)[0]
    mine = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
    engine.backward(tiny.token_loss(engine, mine) / tiny.targets(rows))
    return engine, rank


def gradients_of(wrapper: Any) -> list[torch.Tensor]:
    """This process's reduced gradients, as the wrapper holds them."""
    return [
        g for group in wrapper.averaged_gradients.values() for g in group or () if g is not None and g.numel()
    ]


def norms(case: dict[str, Any]) -> dict[str, list[float]]:
    """In each process: for each group DeepSpeed's norm of the gradients, the fused one, and that of float64."""
    from flexlora_ds.partitions.fused_checks import fused_norm

    engine, _ = backward(case)
    wrapper = engine.optimizer
    found: dict[str, list[float]] = {"original": [], "fused": []}
    for index, gradients in wrapper.averaged_gradients.items():
        params = wrapper.fp16_groups[index] if case["stage"] == 3 else wrapper.params_in_partition[index]
        found["original"].append(float(wrapper.get_grad_norm_direct(gradients, params)))
        found["fused"].append(float(fused_norm(wrapper.get_grad_norm_direct)(gradients, params)))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_is_deepspeeds_own(processes: Processes, stage: int) -> None:
    results = processes.run(norms, {"stage": stage})
    for result in results:
        assert result["fused"] == results[0]["fused"], "all processes know the same norm"
        assert all(norm > 0 for norm in result["fused"])
        for fused, original in zip(result["fused"], result["original"], strict=True):
            assert fused == pytest.approx(original, rel=1e-6)


def verdicts(case: dict[str, Any]) -> dict[str, bool]:
    """In each process: DeepSpeed's verdict and ours, after a value was put into the last process's gradients."""
    from flexlora_ds.partitions.fused_checks import overflow_of

    engine, rank = backward(case)
    wrapper = engine.optimizer
    _, world = tiny.start()
    if case["value"] is not None and rank == world - 1:
        gradients_of(wrapper)[-1].view(-1)[-1] = VALUES[case["value"]]
    ours = overflow_of(wrapper.averaged_gradients.values())
    found = {"own part": bool(ours)}
    if case["stage"] < 3:
        found["original part"] = bool(wrapper.has_overflow_partitioned_grads_serial())
        found["original"] = bool(wrapper.has_overflow())
        wrapper.has_overflow_partitioned_grads_serial = lambda: overflow_of(
            wrapper.averaged_gradients.values()
        )
    found["fused"] = bool(wrapper.has_overflow())
    return found


@pytest.mark.parametrize("value", [None, *VALUES])
@pytest.mark.parametrize("stage", STAGES)
def test_the_verdict_is_deepspeeds_own(processes: Processes, stage: int, value: str | None) -> None:
    results = processes.run(verdicts, {"stage": stage, "value": value})
    for rank, result in enumerate(results):
        assert result["own part"] == (value is not None and rank == len(results) - 1)
        assert result.get("original part", result["own part"]) == result["own part"]
        assert result["fused"] == result.get("original", result["fused"]) == (value is not None)


def test_what_is_replaced_exists_in_this_deepspeed() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for wrapper in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "get_grad_norm_direct(self.averaged_gradients[i]," in inspect.getsource(wrapper)
    names = list(inspect.signature(DeepSpeedZeroOptimizer.get_grad_norm_direct).parameters)
    assert names == ["self", "gradients", "params", "norm_type"]
    assert "has_overflow_partitioned_grads_serial" in inspect.getsource(DeepSpeedZeroOptimizer.has_overflow)
    assert list(
        inspect.signature(DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial).parameters
    ) == ["self"]
    assert "averaged_gradients" in inspect.getsource(DeepSpeedZeroOptimizer)
