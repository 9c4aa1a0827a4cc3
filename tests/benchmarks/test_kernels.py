"""What a step starts, counted without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import count_kernels, count_operations, named_graph_kernels
from tests.helpers.processes import Processes

CPU = torch.device("cpu")
LAYERS = 30
"""SmolLM2-135M's, of small widths: the number of operations depends on layers and matrices alone."""


def test_views_and_room_are_no_operations_and_a_graph_counts_by_its_kernels() -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)

    def work() -> torch.Tensor:
        return torch.empty_like(a).copy_((a @ b.t()).view(64).reshape(8, 8)) + 1

    work()
    assert count_kernels(work, CPU) == count_operations(work) == 3  # product, copy, sum


def operations() -> dict[str, int]:
    """Of one step each, at rank 8 with dropout, in padded batches; whole layers compiled in the last."""
    from benchmarks.contenders import Contender, Kind, options_of
    from benchmarks.shapes import SHAPES, random_model, records
    from launch.engine.methods.flexlora import FlexLoRA
    from launch.engine.methods.peft_lora import PeftLoRA
    from tests.helpers import tiny

    tiny.start()
    SHAPES["deep"] = SHAPES["tiny"] | {"num_hidden_layers": LAYERS}
    base, found = random_model("deep", torch.float32, "sdpa"), {}
    options = options_of("deep", 2, "fp32", 8, 0.05, False, 4)
    for kind in (Kind("LoRA", PeftLoRA), Kind("plain", FlexLoRA), Kind("compiled", FlexLoRA, compiled=True)):
        contender = Contender(kind, base, options, 20, CPU)

        def step(number: int, contender: Contender = contender) -> None:
            rows = records(4, 512, train_on_inputs=False, seed=1)
            contender.update(contender.batch_of(rows, number))
            contender.method.after_step(number)

        with named_graph_kernels():
            step(1)
        step(2)
        found[kind.name] = count_operations(lambda step=step: step(3))  # type: ignore[misc]
        contender.engine.destroy()
    return found


@pytest.mark.full
def test_compiled_layers_start_no_more_operations_than_pefts_lora() -> None:
    with Processes(1, timeout=300) as processes:
        (found,) = processes.run(operations)
    print(found)
    assert found["compiled"] <= found["LoRA"] < found["plain"]
